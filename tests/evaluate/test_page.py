"""The report page: it says what the scores are worth, needs nothing else, and trusts no text."""

import base64
import errno
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attending.errors import CheckpointError, UsageError
from attending.evaluate.page import Change, changes, draw_changes, write_page
from tests.evaluate.making import CANARY, JUDGE, make_run, pair, read_report, row, write_lines

HOSTILE = (
    "</script><script>window.hacked=1</script><!--<img src=x onerror=hacked=1>\u2028\u2029&amp;'"
)


class Page(HTMLParser):
    """What a browser would make of a page: its scripts, styles, attributes and shown words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text("utf-8")
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.comments: list[str] = []
        self._words: list[str] = []
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(self.html)
        self.words = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.raw.append((*self._open, data))
            self._open = None
        else:
            self._words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def texts(self, tag: str, **wanted: str) -> list[str]:
        """Of scripts and styles with these attributes."""
        return [
            text
            for name, own, text in self.raw
            if name == tag and all(own.get(key) == value for key, value in wanted.items())
        ]

    @property
    def examples(self) -> list[dict[str, Any]]:
        """What the page's script reads."""
        return [one for text in self.texts("script", **{"class": "piece"}) for one in _load(text)]

    @property
    def policy(self) -> str:
        return next(v for tag, name, v in self.attributes if tag == "meta" and "default-src" in v)


def _load(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text)
    return found


def drawn(folder: Path, **how: Any) -> Page:
    return Page(write_page(make_run(folder, **how)))


def test_page_needs_and_allows_nothing_else(tmp_path: Path) -> None:
    page = drawn(tmp_path)
    assert [path.name for path in tmp_path.glob("report.html*")] == ["report.html"]
    links = [v for _, name, v in page.attributes if name in ("src", "href", "action", "srcset")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not [name for _, name, _ in page.attributes if name == "style" or name.startswith("on")]
    assert "url(" not in page.texts("style")[0] and "@import" not in page.texts("style")[0]
    (script,) = [text for tag, own, text in page.raw if tag == "script" and "type" not in own]
    (style,) = page.texts("style")
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    assert page.policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
    )
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert word not in script


def test_no_text_leaves_its_place(tmp_path: Path) -> None:
    quiet = drawn(tmp_path / "quiet", examples=4)
    folder = make_run(tmp_path / "loud", examples=4, warnings=[HOSTILE], canary=HOSTILE)
    answers = folder / "default/healthbench.answers.jsonl"
    lines = [json.loads(line) for line in answers.read_text("utf-8").split("\n") if line]
    lines[0]["text"] = HOSTILE
    write_lines(answers, lines)
    page = Page(write_page(folder))
    assert [(tag, own) for tag, own, _ in page.raw] == [(tag, own) for tag, own, _ in quiet.raw]
    assert not [tag for tag, name, _ in page.attributes if name == "onerror"]
    assert page.examples[0]["answers"][0][0]["text"] == HOSTILE
    assert " ".join(HOSTILE.split()) in page.words
    assert len(page.comments) == len(quiet.comments) == 1


def test_half_a_surrogate_pair_is_shown_as_unknown(tmp_path: Path) -> None:
    folder = make_run(tmp_path, models=("default",), examples=2)
    line = '{"id": "h-0", "repeat": 0, "text": "half \\ud83d"}\n'
    (folder / "default/healthbench.answers.jsonl").write_text(line)
    assert Page(write_page(folder)).examples[0]["answers"][0][0]["text"] == "half ?"


def test_what_the_judge_is_worth_stands_above_the_scores(tmp_path: Path) -> None:
    page = drawn(tmp_path / "physicians")
    worth = "macro-F1 0.710 (0.690 to 0.730) against physicians, n = 29,511"
    assert worth in page.words and page.words.index(worth) < page.words.index("0.262")
    assert "a-judge, version a-judge-2026-01-01" in page.words and "cdcdcdcdcdcd" in page.words
    assert JUDGE["caution"] in page.words and "no agreement with physicians" not in page.words
    labels = {**JUDGE["agreement"], "against": "constructed labels", "interval": None}
    page = drawn(tmp_path / "constructed", judge=JUDGE | {"agreement": labels})
    assert "0.710 against constructed labels, n = 29,511" in page.words
    assert "no agreement with physicians" in page.words
    page = drawn(tmp_path / "unknown", judge=JUDGE | {"agreement": None})
    assert page.words.index("not measured") < page.words.index("0.262")
    assert "No judge was asked" in drawn(tmp_path / "none", judge=None).words


def test_table_says_how_far_to_trust_a_score(tmp_path: Path) -> None:
    seen = {"n": 3, "share": 0.003, "score_without": 0.2717}
    rows = [
        row("default", "medqa", 0.27, chance=0.25, says="at chance", contamination=seen),
        row("default", "kqa", 0.5, unscored=0.125, bounds=[0.44, 0.56], n_answers=4000, judge="j"),
    ]
    words = drawn(tmp_path, models=("default",), rows=rows, pairs=[]).words
    assert "0.270 0.240 to 0.300" in words
    assert "at chance chance is 0.250" in words
    assert "1,000 4,000 answers" in words
    assert "12.5 % all counted, 0.440 to 0.560" in words
    assert "3 (0.3 %) 0.272 without" in words and "not checked" in words
    assert "judge: j" in words and "by rules" in words
    assert "no evidence of clinical fitness" in words
    assert "Differences between models" not in words
    assert "Q4_1 as float32" in words


def test_canary_is_in_the_page_three_times(tmp_path: Path) -> None:
    page = drawn(tmp_path / "with")
    assert any(CANARY in comment for comment in page.comments)
    assert ("meta", "content", CANARY) in page.attributes
    assert "never train on this page. Canary: " + CANARY in page.words
    page = drawn(tmp_path / "without", canary=None)
    assert not page.comments and "anary" not in page.html.partition("<script")[0]


def test_a_change_is_better_where_it_is_more() -> None:
    rows = [row(model, "qa", score) for model, score in (("a", 0.5), ("b", 0.4))]
    bits = {"is_loss": True, "metric": "bits per byte"}
    rows += [row(model, "text", score, **bits) for model, score in (("a", 1.5), ("b", 1.25))]
    unknown = {**pair("qa", "b", "a", 0.1), "interval": None}
    pairs = [pair("qa", "a", "b", -0.1, 0.05), pair("text", "a", "b", -0.25, 0.25), unknown]
    lost, bits_change, bare = changes({"rows": rows, "pairs": pairs})
    assert lost == Change("qa", "accuracy", "a", "b", 0.5, 0.4, -0.1, (-0.15, -0.05), False)
    assert (lost.is_clear, lost.says) == (True, "clear loss")
    assert (bits_change.gain, bits_change.interval) == (0.25, (0.0, 0.5))
    assert (bits_change.before, bits_change.after) == (1.5, 1.25)
    assert bits_change.says == "no clear change"  # 0 is not excluded
    assert (bare.gain, bare.interval, bare.is_clear) == (0.1, None, False)
    assert lost._replace(interval=(0.01, 0.2), gain=0.1).says == "clear gain"


def test_figure_of_changes_has_a_bar_a_task() -> None:
    loss = Change("qa", "accuracy", "a", "b", 0.5, 0.4, -0.1, (-0.15, -0.05), False)
    gain = Change("text", "bits per byte", "a", "b", 1.5, 1.25, 0.25, None, True)
    shares, bits = draw_changes([loss, gain]).axes
    assert [bar.get_width() for axes in (shares, bits) for bar in axes.patches] == [-0.1, 0.25]
    assert [text.get_text() for text in shares.get_yticklabels()] == ["qa, accuracy"]
    assert shares.texts[0].get_text() == "−0.100  clear loss"
    assert len(draw_changes([loss]).axes) == 1


def test_retention_is_drawn_and_said(tmp_path: Path) -> None:
    bits = {"is_loss": True, "metric": "bits per byte"}
    told = [("maths", 0.42, 0.31, {}), ("text", 1.5, 1.44, bits), ("facts", 0.3, 0.3, {})]
    rows = [row("default", task, before, **how) for task, before, _, how in told]
    rows += [row("other", task, after, **how) for task, _, after, how in told]
    pairs = [pair(task, "default", "other", round(b - a, 2)) for task, a, b, _ in told]
    page = drawn(tmp_path, suite="retention", rows=rows, pairs=pairs)
    assert "maths : accuracy fell from 0.420 to 0.310. Clear loss" in page.words
    assert "−0.110 (−0.130 to −0.090)" in page.words
    assert "fell from 1.500 to 1.440, and less is better. Clear gain : 0.060" in page.words
    assert "facts : accuracy stayed at 0.300. No clear change" in page.words
    assert len(re.findall(r'<img src="data:image/png', page.html)) == 1
    page = drawn(tmp_path / "medical", rows=rows, pairs=pairs)
    assert "gained and lost" not in page.words and "clear loss" in page.words


def test_radar_only_where_every_model_has_three_parts(tmp_path: Path) -> None:
    page = drawn(tmp_path / "all", repeats=2)
    assert page.html.count("<polygon") == 4 and page.html.count("<polyline") == 2
    some = {f"axis:{name}": {"score": 0.5, "n": 9} for name in ("a", "b", "c")}
    rows = [row("default", "x", 0.5, parts=some), row("other", "x", 0.5, parts={})]
    page = drawn(tmp_path / "some", rows=rows, pairs=[])
    assert "<polygon" not in page.html and "x: 3 parts" in page.words
    rows[1]["parts"] = some | {"axis:a": {"score": None, "interval": None, "n": 0}}
    assert "<polygon" not in drawn(tmp_path / "null", rows=rows, pairs=[]).html
    rows[1]["parts"] = some | {"axis:a": {"score": -0.5, "interval": None, "n": 9}}
    page = drawn(tmp_path / "low", rows=rows, pairs=[])
    polygons = re.findall(r'<polygon class="shape m(\d)" points="([^ ]+) ', page.html)
    assert polygons == [("0", "230.0,112.5"), ("1", "230.0,165.0")]  # up half of 105; clipped


def test_published_scores_stand_beside_their_tasks_only(tmp_path: Path) -> None:
    words = drawn(tmp_path / "judged").words
    assert "Baichuan-M2-32B 60.1 34.7 91.5" in words and "not comparable" in words
    assert "Not stated by the authors" in words and "GSM8K" not in words
    rows = [row("default", "gsm8k", 0.1)]
    words = drawn(tmp_path / "maths", models=("default",), rows=rows, pairs=[]).words
    assert "GSM8K, percent" in words and "Baichuan-M2-32B" not in words
    rows = [row("default", "own-task", 0.1)]
    page = drawn(tmp_path / "own", models=("default",), rows=rows, pairs=[])
    assert "Published" not in page.words and page.examples == []
    assert "None lie beside this report" in page.words


def test_examples_are_joined_with_answers_and_grades(tmp_path: Path) -> None:
    folder = make_run(tmp_path, examples=150, repeats=2)
    with (folder / "default/healthbench.grades.jsonl").open("a") as file:
        file.write('{"id": "h-0", "repeat": 1, "score": 0.125, "verdicts": []}\n')  # graded anew
    (folder / "other/medqa.answers.jsonl").unlink()
    (folder / "other/medqa.grades.jsonl").unlink()
    page = Page(write_page(folder))
    assert [len(_load(text)) for text in page.texts("script", **{"class": "piece"})] == [
        100,
        100,
        25,
    ]
    examples = {(one["task"], one["id"]): one for one in page.examples}
    assert len(examples) == 150 + 75
    first = examples["healthbench", "h-0"]["answers"]
    assert [[one["repeat"] for one in own] for own in first] == [[0, 1], [0, 1]]
    assert first[0][1]["score"] == 0.125 and first[0][1]["text"].startswith("<think>")
    assert [len(own) for own in examples["medqa", "q/0"]["answers"]] == [1, 0]


def test_an_answer_without_a_grade_is_unscored(tmp_path: Path) -> None:
    folder = make_run(tmp_path, models=("default",), examples=2)
    (folder / "default/healthbench.grades.jsonl").unlink()
    (one,) = Page(write_page(folder)).examples[0]["answers"][0]
    assert one["score"] is None and one["verdicts"] == []


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"rows": []}',
        '{"rows": [{"task": "x"}], "models": [], "pairs": []}',
    ],
)
def test_damaged_reports_are_refused_and_the_old_page_stays(tmp_path: Path, damage: str) -> None:
    before = drawn(tmp_path).html
    (tmp_path / "report.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"report\.json or a file that it names is damaged"):
        write_page(tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8") == before


def test_other_damage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"has no report\.json"):
        write_page(tmp_path)
    folder = make_run(tmp_path, models=("default",))
    line = '{"id": "h-0", "repeat": 0, "score": NaN}\n'
    grades = folder / "default/healthbench.grades.jsonl"
    grades.write_text(line)
    with pytest.raises(CheckpointError, match="ValueError"):
        write_page(folder)
    grades.write_text('{"id": "h-0"')
    with pytest.raises(CheckpointError, match=r"healthbench\.grades\.jsonl:1 is no JSON"):
        write_page(folder)
    grades.unlink()

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_page(folder)
    assert read_report(folder)["suite"] == "medical"
