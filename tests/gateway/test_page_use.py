"""Using the chat page: conversations, tabs, storage, keyboard, phone, colours, scrolling."""

from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway import browsing, fake, serving
from tests.gateway.browsing import Chat, expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

gateway, browser, chat = browsing.gateway, browsing.browser, browsing.chat
SLOW = fake.Script(pieces=tuple(f"word{number} " for number in range(200)), seconds_between=0.02)


def titles(page: "Page") -> list[str]:
    return page.locator("nav .title").all_inner_texts()


def test_conversations_are_kept_renamed_and_deleted(chat: Chat) -> None:
    page = chat.page
    chat.ask("About the heart?")
    page.keyboard.press("Control+Shift+O")
    assert page.locator("#empty").is_visible()
    chat.ask("About the lung?")
    assert titles(page) == ["About the lung?", "About the heart?"]
    page.fill("#input", "not sent yet")
    page.reload()
    expect(page.locator(".bubble")).to_have_text("About the lung?")
    expect(page.locator(".prose")).to_have_text("Hello.")
    expect(page.locator("#input")).to_have_value("not sent yet")
    page.get_by_role("button", name="About the heart?", exact=True).click()
    expect(page.locator(".bubble")).to_have_text("About the heart?")
    page.locator("nav li").last.hover()
    chat.button("Rename About the heart?").click()
    page.get_by_role("textbox", name="Name").fill("Cardiology")
    page.keyboard.press("Enter")
    expect(page.locator("nav .title").last).to_have_text("Cardiology")
    page.locator("nav li").last.hover()
    chat.button("Delete Cardiology").click()
    chat.button("Cancel").click()
    page.locator("nav li").last.hover()
    chat.button("Delete Cardiology").click()
    chat.button("Delete").click()
    expect(page.locator("nav .title")).to_have_text(["About the lung?"])
    assert page.locator("#empty").is_visible()
    chat.button("Delete all conversations").click()
    chat.button("Delete all").click()
    expect(page.locator("nav .title")).to_have_count(0)
    page.reload()
    assert titles(page) == []


def test_two_tabs_share_and_spare_conversations(chat: Chat) -> None:
    chat.ask("In the first tab?")
    other = chat.open()
    other.get_by_role("button", name="In the first tab?", exact=True).click()
    chat.upstream.script = SLOW
    chat.ask("Go on.", is_over=False)
    other.get_by_role("button", name="Rename In the first tab?").click()
    other.get_by_role("textbox", name="Name").fill("Renamed")
    other.keyboard.press("Enter")
    # Browsers take some milliseconds to tell a tab what another has written.
    chat.page.wait_for_function("JSON.stringify(localStorage).includes('Renamed')")
    chat.page.keyboard.press("Escape")
    both = ["In the first tab? (this tab)", "Renamed"]
    expect(chat.page.locator("nav .title")).to_have_text(both)
    expect(other.locator("nav .title")).to_have_text(both)
    other.get_by_role("button", name="Delete In the first tab? (this tab)").click()
    other.get_by_role("button", name="Delete", exact=True).click()
    expect(chat.page.locator("#notice")).to_contain_text("deleted in another tab")
    assert chat.page.locator("#empty").is_visible()
    assert titles(chat.page) == ["Renamed"]


@pytest.mark.parametrize("trouble", ["full", "forbids"])
def test_chat_without_storage(chat: Chat, trouble: str) -> None:
    script = "Storage.prototype.setItem = () => { throw new Error('full') };"
    if trouble == "forbids":
        script = "Object.defineProperty(window, 'localStorage', {get() { throw new Error() }});"
    chat.context.add_init_script(script)
    chat.page.reload()
    chat.ask("Hi")
    expect(chat.page.locator(".prose")).to_have_text("Hello.")
    expect(chat.page.locator("#notice")).to_contain_text(trouble)
    assert titles(chat.page) == ["Hi"]


def test_everything_by_keyboard(chat: Chat) -> None:
    page, keys = chat.page, chat.page.keyboard
    page.reload()
    page.evaluate("document.activeElement.blur()")
    keys.press("Tab")  # into the document
    seen: list[str] = []
    for _ in range(9):
        keys.press("Tab")
        named = "document.activeElement.ariaLabel || document.activeElement.innerText.trim()"
        seen.append(page.evaluate(named).split("\n")[0])
        style = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(style) != "none", seen
    assert seen[:4] == ["Skip to the question", "New chat", "Sign out", "About the model"]
    assert seen[4:7] == ["Settings", "Dark colours", "Conversation"]
    keys.press("Enter")
    expect(page.locator(".prose")).to_have_text("Hello.")
    keys.type("a")
    keys.press("Shift+Enter")
    keys.type("b")
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.getElementById('input').dispatchEvent({composing})")
    expect(page.locator("#input")).to_have_value("a\nb")
    keys.press("Enter")
    expect(page.locator(".bubble").last).to_have_text("a\nb", use_inner_text=True)


def test_settings_are_sent_and_kept(chat: Chat) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("0.2")
    chat.page.get_by_label("Seed").fill("7")
    chat.page.get_by_label("System message").fill("Be brief.")
    chat.button("Save").click()
    chat.page.reload()
    chat.ask("Hi")
    sent = chat.upstream.requests[-1]
    assert (sent["temperature"], sent["seed"], "top_p" in sent) == (0.2, 7, False)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_phone(browser: "Browser", gateway: serving.Gateway) -> None:
    size: Any = {"width": 360, "height": 640}
    chat = Chat(browser, gateway, viewport=size, has_touch=True, is_mobile=True)
    wide = "| " + " | ".join(["column"] * 12) + " |\n|" + "---|" * 12
    chat.upstream.script = fake.Script(pieces=("x" * 300, f"\n\n{wide}\n\n    {'y' * 300}"))
    chat.ask("z" * 300)
    expect(chat.page.locator(".scroll")).to_be_visible()
    width = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    assert chat.page.evaluate(width) <= 360
    assert chat.page.evaluate("document.getElementById('turns').scrollWidth") <= 360
    assert chat.page.locator("#input").evaluate("e => getComputedStyle(e).fontSize") == "16px"
    assert chat.page.locator(".actions").last.evaluate("e => getComputedStyle(e).opacity") == "1"
    assert chat.page.locator("#sidebar").is_hidden()
    chat.page.keyboard.press("Control+Shift+O")
    assert chat.page.locator("#log").evaluate("e => e.scrollTop") == 0
    chat.button("Conversations").click()
    expect(chat.page.locator("#close")).to_be_focused()
    chat.button("New chat").click()
    expect(chat.page.locator("#sidebar")).to_be_hidden()
    chat.end()


FOLLOWS = """() => {
  const { scrollTop, scrollHeight, clientHeight } = document.querySelector("#log");
  return scrollTop > 500 && scrollHeight - scrollTop - clientHeight < 100;
}"""


def test_scrolling_follows_only_at_the_end(chat: Chat) -> None:
    lines = tuple(f"line {number}\n\n" for number in range(120))
    chat.upstream.script = fake.Script(pieces=lines, seconds_between=0.02)
    chat.ask("Write.", is_over=False)
    expect(chat.page.locator(".prose")).to_contain_text("line 40")
    # The page scrolls when it lays out, so that between two frames new text may be out of sight.
    chat.page.wait_for_function(FOLLOWS, polling=20)
    chat.page.locator("#log").hover()
    chat.page.mouse.wheel(0, -5000)
    expect(chat.page.locator("#jump")).to_be_visible()
    expect(chat.page.locator("#stop")).to_be_hidden()
    expect(chat.page.get_by_text("line 119", exact=True)).not_to_be_in_viewport()
    chat.button("Jump to latest").click()
    expect(chat.page.get_by_text("line 119", exact=True)).to_be_in_viewport()


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => style.getPropertyValue(`--${name}`).match(/[0-9a-f]/g)
    .reduce((out, digit, i, all) => all.length === 3 ? [...out, digit + digit]
      : i % 2 ? out : [...out, digit + all[i + 1]], [])
    .map((pair) => parseInt(pair, 16) / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const grounds = ["paper", "ground", "raised", "tint", "danger-tint", "warn-tint"];
  const pairs = [...grounds.flatMap((g) => [["ink", g], ["soft", g]]), ["accent", "paper"],
    ["on-accent", "accent"], ["danger", "danger-tint"], ["paper", "danger"]];
  return pairs.map(([a, b]) => [a, b, (Math.max(light(a), light(b)) + 0.05)
    / (Math.min(light(a), light(b)) + 0.05)]);
}"""


def test_dark_and_light(browser: "Browser", gateway: serving.Gateway) -> None:
    chat = Chat(browser, gateway, color_scheme="dark")
    root = chat.page.locator("html")
    for theme in ("dark", "light"):
        expect(root).to_have_attribute("data-theme", theme)
        low = [pair for pair in chat.page.evaluate(CONTRAST) if pair[2] < 4.5]
        assert not low, f"{theme}: below AA"
        chat.button("Dark colours").click()
    chat.button("Dark colours").click()
    chat.page.reload()
    expect(root).to_have_attribute("data-theme", "light")
    chat.end()


def test_events_are_the_same_in_any_chunks(chat: Chat) -> None:
    text = (
        '\ufeff: ping\r\n\r\ndata: {"高": 1}\r\ndata:two\r\r\nid: 1\n\ndata\n\ndata: 🫀\n\ndata: x'
    )
    read = """async ([bytes, sizes]) => {
      const { EventParser } = await import("/page/stream.js");
      return sizes.map((size) => {
        const parser = new EventParser(), events = [];
        for (let at = 0; at < bytes.length; at += size)
          events.push(...parser.push(new Uint8Array(bytes.slice(at, at + size))));
        return events;
      });
    }"""
    data = list(text.encode())
    results = chat.page.evaluate(read, [data, list(range(1, len(data) + 1))])
    assert all(events == ['{"高": 1}\ntwo', "", "🫀"] for events in results), results
