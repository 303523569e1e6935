"""Answers on the chat page: a real browser, a real gateway, a scripted upstream."""

import json
import re
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway import browsing, fake
from tests.gateway.browsing import Chat, expect
from tests.gateway.serving import until

if TYPE_CHECKING:
    from playwright.sync_api import Route

gateway, browser, chat = browsing.gateway, browsing.browser, browsing.chat
SLOW = fake.Script(pieces=tuple(f"word{number} " for number in range(200)), seconds_between=0.02)
WARNING = "Demonstration. Answers may be wrong. Not a medical device; not for clinical use."
MARKDOWN = """Some **bold** text.

| a | b |
|---|---|
| 1 | 2 |

```python
x = "<b>"
```

[a page](https://example.org)
"""
HOSTILE = (
    "<img src=x onerror='window.hacked=1'>\n\n<script>window.hacked=1</script>\n\n"
    "[x](javascript:window.hacked=1) ![p](https://example.org/p.png)\n\n"
    "<svg onload='window.hacked=1'></svg>\n\n<iframe src='javascript:window.hacked=1'></iframe>"
)


def test_page_introduces_itself(chat: Chat) -> None:
    page = chat.page
    assert page.title() == "attending"
    expect(page.locator("#empty h2")).to_have_text("attending")
    expect(page.locator("#warning")).to_have_text(WARNING)
    expect(page.locator("#kept")).to_contain_text("kept in this browser only")
    card = page.locator("#card").inner_text()
    assert all(fact in card for fact in ("4,096", "Apache-2.0", "a test", "A script, not a model."))
    expect(page.locator("#input")).to_be_focused()
    chat.button("What is hypertension?").click()
    expect(page.locator(".prose")).to_have_text("Hello.")
    assert page.locator("#empty").is_hidden()


def test_answer_streams_and_is_measured(chat: Chat) -> None:
    gate = threading.Event()
    chat.upstream.script = fake.Script(pieces=("One ", "two ", "**three**"), gate=gate)
    chat.ask("Count.", is_over=False)
    expect(chat.page.locator(".prose")).to_have_text("One", use_inner_text=True)
    expect(chat.page.locator("#stop")).to_be_visible()
    expect(chat.page.locator(".answer")).to_have_attribute("aria-busy", "true")
    gate.set()
    expect(chat.page.locator(".prose strong")).to_have_text("three")
    expect(chat.page.locator("#stop")).to_be_hidden()
    stats = chat.page.locator(".stats").inner_text()
    assert stats.startswith("2 tokens · ") and "tokens/s" in stats and "first after 0." in stats
    assert stats.endswith("prompt of 7 tokens (4 from the cache)")
    expect(chat.page.locator("#announce")).to_have_text("The answer is complete. One two **three**")
    sent = chat.upstream.requests[-1]
    assert sent.pop("messages") == [{"role": "user", "content": "Count."}]
    options = {"include_usage": True}
    assert sent == {"model": fake.MODEL, "stream": True, "stream_options": options}
    expect(chat.page.locator("#input")).to_be_focused()


def test_reasoning_is_folded(chat: Chat) -> None:
    chat.upstream.script = fake.Script(reasoning=("Let me ", "think."), seconds_between=0.2)
    chat.ask("Why?")
    details = chat.page.locator(".answer details")
    assert details.get_attribute("open") is None
    expect(details.locator("summary")).to_have_text(re.compile(r"^Reasoning 0\.\d s$"))
    expect(chat.page.locator(".reasoning")).to_be_hidden()
    details.locator("summary").click()
    expect(chat.page.locator(".reasoning")).to_have_text("Let me think.")
    chat.upstream.script = fake.Script()
    chat.ask("And?")
    told = [message["content"] for message in chat.upstream.requests[-1]["messages"]]
    assert told == ["Why?", "Hello.", "And?"]


def test_markdown_is_shown_and_code_copied(chat: Chat) -> None:
    chat.upstream.script = fake.Script(pieces=(MARKDOWN,))
    chat.ask("Show me.")
    prose = chat.page.locator(".prose")
    expect(prose.locator("strong")).to_have_text("bold")
    expect(prose.get_by_role("region", name="Table").locator("td")).to_have_text(["1", "2"])
    expect(prose.locator("a")).to_have_attribute("rel", "noopener noreferrer nofollow")
    chat.button("Copy this code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == 'x = "<b>"\n'
    chat.button("Copy this answer").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_copying_without_tls(chat: Chat) -> None:
    chat.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    chat.ask("Hi")
    chat.button("Copy this answer").click()
    expect(chat.page.locator("#announce")).to_have_text("Copied")
    tab = chat.open()
    assert tab.evaluate("navigator.clipboard.readText()") == "Hello."


def test_hostile_answers_are_inert(chat: Chat) -> None:
    chat.upstream.script = fake.Script(pieces=(HOSTILE,))
    chat.ask("Attack.")
    expect(chat.page.locator(".prose a[href]")).to_have_text("p")
    assert chat.complaints == []
    # Where only the page itself is left to clean, the browser says what it blocks while parsing.
    chat.expected = ["Executing inline event handler violates", "Applying inline style violates"]
    chat.page.route("**/page/render", lambda route: route.fulfill(json={"html": [HOSTILE_HTML]}))
    chat.ask("Attack through a broken server.")
    expect(chat.page.locator(".prose").last).to_contain_text("plain words")
    prose = chat.page.locator(".prose")
    forbidden = "script, img, svg, iframe, form, style, object, [onclick], [id], [style]"
    assert prose.locator(forbidden).count() == 0
    hrefs = prose.locator("[href]").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert set(hrefs) <= {"https://example.org/p.png", "https://example.org/"}
    for link in prose.locator("a:not([href])").all():
        link.click()
    assert chat.page.evaluate("window.hacked") is None


HOSTILE_HTML = (
    HOSTILE.split("[x]")[0] + "<p onclick='window.hacked=1' id=input style='color:red'>plain words"
    " <a href='javascript:window.hacked=1'>x</a> <a href=' java\tscript:window.hacked=1'>y</a>"
    " <a href='https://example.org/'>z</a></p><form><input></form><style>p{color:red}</style>"
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=1>"
)


def test_without_rendering_the_text_stays(chat: Chat) -> None:
    chat.expected = ["Failed to load resource"]
    chat.page.route("**/page/render", lambda route: route.abort())
    chat.upstream.script = fake.Script(pieces=(MARKDOWN,))
    chat.ask("Show me.")
    expect(chat.page.locator(".prose.unrendered")).to_contain_text("Some **bold** text.")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_keeps_what_was_written(chat: Chat, way: str) -> None:
    chat.upstream.script = SLOW
    before = chat.upstream.cancelled
    chat.ask("Go on.", is_over=False)
    expect(chat.page.locator(".prose")).to_contain_text("word3")
    if way == "button":
        chat.button("Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    expect(chat.page.locator(".ending")).to_have_text("Stopped.")
    until(lambda: chat.upstream.cancelled == before + 1)
    expect(chat.page.locator(".prose")).to_contain_text("word3")
    expect(chat.page.locator("#input")).to_be_focused()


def test_retry_and_edit(chat: Chat) -> None:
    chat.ask("First?")
    chat.ask("Second?")
    chat.upstream.script = fake.Script(pieces=("Another.",))
    chat.button("Retry: answer again").click()
    expect(chat.page.locator(".prose")).to_have_text(["Hello.", "Another."])
    assert chat.upstream.requests[-1] == chat.upstream.requests[-2]
    first = chat.page.locator(".turn").first
    assert first.get_by_role("button", name="Retry: answer again").is_hidden()
    first.get_by_role("button", name="Edit this question").click()
    area = chat.page.get_by_label("Edit your question")
    expect(area).to_be_focused()
    area.fill("thrown away")
    area.press("Escape")
    expect(chat.page.locator(".bubble")).to_have_text(["First?", "Second?"])
    first.get_by_role("button", name="Edit this question").click()
    area.fill("Changed?")
    area.press("Enter")
    expect(chat.page.locator(".bubble")).to_have_text(["Changed?"])
    expect(chat.page.locator(".prose")).to_have_text(["Another."])
    assert [m["content"] for m in chat.upstream.requests[-1]["messages"]] == ["Changed?"]
    expect(chat.page.locator("button.title")).to_have_text(["Changed?"])  # nobody has named it


def test_cut_at_the_limit_is_said(chat: Chat) -> None:
    cut = {"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": "length"}]}
    events = f": ping\r\n\r\ndata: {json.dumps(cut)}\r\n\r\ndata: [DONE]\r\n\r\n"
    answer_with(chat, events)
    chat.ask("Long?")
    expect(chat.page.locator(".ending")).to_have_text(
        "Cut at the limit: the answer is not complete."
    )
    expect(chat.page.locator(".stats")).to_contain_text("about 1 tokens")


def answer_with(chat: Chat, body: str) -> None:
    """Every question is answered with these events."""

    def fulfill(route: "Route") -> None:
        route.fulfill(body=body, content_type="text/event-stream")

    chat.page.route("**/v1/chat/completions", fulfill)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ('data: {"choices": [{"delta": {"content": "Half"}}]}\n\n', "The stream ended before"),
        ('data: {"choices": [{"delta": {"content": "Half"}}]}\n\ndata: {"error": '
         '{"message": "The engine stopped."}}\n\n', "The engine stopped."),
        ('data: {"choices": [{"delta": {"content": "Half"}}]}\n\ndata: {"chTORN\n\n', "broke"),
    ],
)  # fmt: skip
def test_broken_streams_keep_what_came(chat: Chat, events: str, said: str) -> None:
    answer_with(chat, events)
    chat.ask("Well?")
    expect(chat.page.locator(".error")).to_contain_text(said)
    expect(chat.page.locator(".prose")).to_have_text("Half")
    chat.page.unroute("**/v1/chat/completions")
    chat.button("Retry").click()
    expect(chat.page.locator(".prose")).to_have_text("Hello.")
    assert chat.page.locator(".error").is_hidden()


def test_upstream_that_dies_within_an_answer(chat: Chat) -> None:
    chat.upstream.script = fake.Script(pieces=("One. ", "Two. ", "Three."), breaks_after=3)
    chat.ask("Well?")
    expect(chat.page.locator(".error")).to_contain_text("Retry")
    expect(chat.page.locator(".prose")).to_contain_text("One.")


@pytest.mark.parametrize(
    ("status", "code", "message", "said"),
    [
        (429, None, "16 requests are being answered.", ["busy", "16 requests", "Try again in 3"]),
        (503, None, "The model is loading.", ["not ready", "The model is loading.", "Try again"]),
        (400, "context_length_exceeded", "5,000 tokens, at most 4,096.",
         ["Too long", "5,000 tokens", "A new chat", "Ask in a new chat"]),
    ],
)  # fmt: skip
def test_refusals(chat: Chat, status: int, code: str | None, message: str, said: Any) -> None:
    chat.expected = ["Failed to load resource"]
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    refused = {"status": status, "headers": {"Retry-After": "3"} if status != 400 else {}}
    chat.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(json={"error": error}, **refused)
    )
    chat.ask("Well?")
    box = chat.page.locator(".error")
    for words in said:
        expect(box).to_contain_text(words)
    chat.page.reload()
    expect(chat.page.locator(".bubble")).to_have_text("Well?")
    if code:
        chat.button("Ask in a new chat").click()
        expect(chat.page.locator("#input")).to_have_value("Well?")
    else:
        chat.page.unroute("**/v1/chat/completions")
        chat.button("Retry").click()
        expect(chat.page.locator(".prose")).to_have_text("Hello.")


def test_refusal_passes_the_gateway(chat: Chat) -> None:
    chat.expected = ["Failed to load resource"]
    body = b'{"error": {"message": "Full.", "type": "rate_limit_error", "code": null}}'
    chat.upstream.script = fake.Script(status=429, body=body, headers={"retry-after": "9"})
    chat.ask("Well?")
    expect(chat.page.locator(".error")).to_contain_text("The server is busy.")
    expect(chat.page.locator(".error")).to_contain_text("Try again in")


def test_ended_session_and_lost_network(chat: Chat) -> None:
    chat.expected = ["Failed to load resource"]
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.ask("Nobody there?")
    expect(chat.page.locator(".error")).to_contain_text("The server cannot be reached.")
    chat.page.unroute("**/v1/chat/completions")
    chat.context.clear_cookies()
    chat.button("Retry").click()
    expect(chat.page.locator(".error")).to_contain_text("Your session has ended.")
    with chat.context.expect_page() as opened:
        chat.page.get_by_role("link", name="Sign in again").click()
    expect(opened.value.get_by_label("Key")).to_be_visible()
    opened.value.goto(chat.gateway.sign_in_url)
    chat.button("Retry").click()
    expect(chat.page.locator(".prose")).to_have_text("Hello.")


def test_model_that_is_still_loading(chat: Chat) -> None:
    chat.expected = ["Failed to load resource"]
    refused = {"error": {"message": "The model is still being loaded."}}
    chat.page.route(
        "**/v1/models",
        lambda route: route.fulfill(status=503, json=refused, headers={"Retry-After": "1"}),
        times=1,
    )
    chat.page.reload()
    expect(chat.page.locator("#notice")).to_contain_text("still being loaded")
    expect(chat.page.locator("#model")).to_have_text(fake.MODEL)
    assert chat.page.locator("#notice").is_hidden()


def test_signing_out(chat: Chat) -> None:
    chat.expected = ["Failed to load resource"]  # the sign-in page's favicon.ico
    chat.ask("Hi")
    chat.button("Sign out").click()
    chat.button("Delete and sign out").click()
    expect(chat.page.get_by_label("Key")).to_be_visible()
    assert chat.page.evaluate("Object.keys(localStorage)") == []
