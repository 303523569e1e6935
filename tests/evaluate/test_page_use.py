"""The report page in a real browser: every example is found, readable and harmless."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attending.evaluate.page import write_page
from tests.evaluate.making import make_run, write_lines
from tests.gateway import browsing
from tests.gateway.browsing import expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

browser = browsing.browser
HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\u2028"
    "<think>plan</think> <b>End</b>"
)
Open = Callable[..., "Page"]


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Open]:
    """A tab with a page, ready; whatever it complains about fails the test."""
    complaints: list[str] = []
    contexts = []

    def go(folder: Path, place: str = "", width: int = 1100) -> "Page":
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
        context.set_default_timeout(5000)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.goto((folder / "report.html").as_uri() + place)
        expect(page.locator("body")).to_have_attribute("data-ready", "yes")
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"), examples=120, repeats=2)
    write_page(folder)
    return folder


def small(folder: Path) -> Path:
    """Three examples by hand: one with verdicts of every kind, one lost, one gained."""
    make_run(folder, examples=0)
    write_lines(
        folder / "examples/healthbench.jsonl",
        [
            {
                "id": f"c/{n} ü",
                "messages": [{"role": "user", "content": f"Case {n}?"}],
                "tags": [tag],
            }
            for n, tag in enumerate(("theme:a", "theme:b", "theme:b"))
        ],
    )
    verdicts = [
        {"criterion": name, "points": points, "met": met, "explanation": f"Because {name}."}
        for name, points, met in (
            ("Good", 5, True),
            ("Absent", 4, False),
            ("Harm", -5, True),
            ("Spared", -3, False),
            ("Open", 2, None),
            ("Risk", -2, None),
        )
    ]
    scores = {"default": (None, 0.75, 0.25), "other": (0.5, 0.5, 1.0)}
    for model, own in scores.items():
        keys = [{"id": f"c/{n} ü", "repeat": 0} for n in range(3)]
        text = HOSTILE if model == "default" else "Plain."
        answers = [key | {"text": text, "finish_reason": "length"} for key in keys]
        write_lines(folder / model / "healthbench.answers.jsonl", answers)
        grades = [
            key | {"score": score, "verdicts": []} for key, score in zip(keys, own, strict=True)
        ]
        grades[0] |= {"verdicts": verdicts, "bounds": [-0.2, 0.1]}
        if model == "other":
            grades[0]["verdicts"] = [one | {"met": True} for one in verdicts]
        write_lines(folder / model / "healthbench.grades.jsonl", grades)
    write_page(folder)
    return folder


def ids(page: "Page") -> list[str]:
    return [text.split(" · ")[1] for text in page.locator(".about").all_inner_texts()]


def test_examples_are_listed_fifty_at_a_time(visit: Open, folder: Path) -> None:
    page = visit(folder)
    expect(page.locator(".example")).to_have_count(50)
    expect(page.locator("#said")).to_have_text("50 of 180 examples shown.")
    for shown in (100, 150, 180):
        page.click("#more")
        expect(page.locator(".example")).to_have_count(shown)
    expect(page.locator("#more")).to_be_hidden()
    assert len({*ids(page)}) == 180


def test_examples_are_found_by_words_task_and_tag(visit: Open, folder: Path) -> None:
    page = visit(folder)
    page.fill("[name=search]", "(101) DANGER")  # in the question of h-101 and in every thought
    expect(page.locator(".example")).to_have_count(1)
    assert ids(page) == ["h-101"]
    page.fill("[name=search]", "no such words")
    expect(page.locator("#said")).to_have_text("No example matches.")
    page.fill("[name=search]", "")
    page.select_option("[name=task]", "medqa")
    expect(page.locator("#said")).to_have_text("50 of 60 examples shown; there are 180.")
    tags = page.locator("[name=tag] option").all_inner_texts()
    assert tags[0] == "all" and [tag.split(" ")[0] for tag in tags[1:]] == [
        "subject:anatomy",
        "subject:virology",
    ]
    page.select_option("[name=tag]", "subject:virology")
    count = int(tags[2].split("(")[1].rstrip(")"))
    expect(page.locator("#said")).to_have_text(f"{count} of {count} examples shown; there are 180.")


def test_an_example_says_what_was_judged_and_why(visit: Open, tmp_path: Path) -> None:
    page = visit(small(tmp_path))
    assert ids(page) == ["c/0 ü", "c/1 ü", "c/2 ü"]
    first = page.locator(".example").first
    expect(first.locator(".marks span").first).to_have_text("unscored")
    expect(first.locator(".about")).to_contain_text("changed between models · not wholly scored")
    first.locator("summary").first.click()
    ours = first.locator(".side.m0 strong")
    expect(ours.first).to_be_visible()  # drawn when it is opened
    assert ours.all_inner_texts() == [
        "met: earns +5",
        "not met: earns 0 of 4",
        "met, and it should not be: costs −5",
        "not met, as it should be: costs nothing",
        "unscored: could earn +2",
        "unscored: could cost −2",
    ]
    kinds = [item.get_attribute("class") for item in ours.all()]
    assert kinds == ["yes", "no", "bad", "yes", "open", "open"]
    assert first.locator(".side.m0 .text").first.inner_text() == "Because Good."
    assert (
        first.locator(".criterion").nth(1).inner_text().startswith("+4 Absent (the models differ)")
    )
    assert "differ" not in first.locator(".criterion").first.inner_text()
    card = first.locator(".answer").first.inner_text()
    assert "unscored, it lies between −0.20 and 0.10" in card and "Cut off at the limit" in card
    assert "score 0.50 (1 of 11 points)" in first.locator(".answer").nth(1).inner_text()


def test_texts_are_shown_as_texts(visit: Open, tmp_path: Path) -> None:
    page = visit(small(tmp_path))
    page.locator(".example > summary").first.click()
    card = page.locator(".answer").first
    assert card.locator(".text").last.inner_text() == "<b>End</b>"
    card.locator("summary").click()
    thought = card.locator("details .text").inner_text()
    assert thought.startswith("</script><script>window.hacked=1</script><img src=x onerror=")
    assert page.locator("img[src=x], .answer b").count() == 0
    assert page.evaluate("window.hacked") is None


def test_examples_are_sorted_and_narrowed_by_their_scores(visit: Open, tmp_path: Path) -> None:
    page = visit(small(tmp_path))
    orders = {
        "worst:0": "210",
        "best:0": "120",
        "worst:1": "012",
        "best:1": "201",
        "loss:1": "120",
        "gain:1": "210",
        "": "012",
    }
    for order, wanted in orders.items():
        page.select_option("[name=order]", order)
        expect(page.locator(".asks").first).to_have_text(f"Case {wanted[0]}?")
        assert ids(page) == [f"c/{n} ü" for n in wanted], order
    page.select_option("[name=show]", "unscored")
    expect(page.locator(".example")).to_have_count(1)
    page.select_option("[name=show]", "changed")
    expect(page.locator(".example")).to_have_count(3)


def test_a_link_opens_one_example(visit: Open, tmp_path: Path, folder: Path) -> None:
    page = visit(small(tmp_path), "#healthbench/c/1 ü")
    assert ids(page) == ["c/1 ü"]
    expect(page.locator(".turn .text").first).to_have_text("Case 1?")
    expect(page.locator("#filter")).to_be_hidden()
    page.get_by_role("link", name="Show all").click()
    expect(page.locator(".example")).to_have_count(3)
    page.locator(".example > summary").last.click()
    page.get_by_role("link", name="Link to this example").click()
    expect(page.locator(".example")).to_have_count(1)
    assert ids(page) == ["c/2 ü"]
    page.go_back()
    expect(page.locator(".example")).to_have_count(3)
    assert ids(visit(folder, "#medqa/q/7")) == ["q/7"]


def test_repeats_and_options_are_shown(visit: Open, folder: Path) -> None:
    page = visit(folder, "#healthbench/h-5")
    rows = (folder / "other/healthbench.answers.jsonl").read_text("utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in rows if '"h-5"' in line]
    shown = page.locator(".answer.m1 > .text")
    expect(shown).to_have_text(texts[0].split("</think>")[1])
    page.locator(".example select").select_option("1")
    expect(shown).to_have_text(texts[1].split("</think>")[1])
    card = visit(folder, "#medqa/q/0").locator(".answer").first.inner_text()
    assert "likelihoods are compared" in card and "Log-probabilities in nats: A −0." in card


@pytest.mark.parametrize("width", [400, 1100])
def test_nothing_runs_out_of_the_page(visit: Open, folder: Path, width: int) -> None:
    page = visit(folder, "#healthbench/h-1", width)
    for summary in page.locator("section > details > summary").all():
        summary.click()
    size: dict[str, Any] = page.evaluate(
        "({inner: innerWidth, wide: document.documentElement.scrollWidth})"
    )
    assert size["wide"] <= size["inner"]
