"""A signed-in browser for the tests of the chat page; a test module assigns the fixtures."""

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway import fake, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

expect: Callable[..., Any] = sync_api.expect


@pytest.fixture(scope="module")
def gateway() -> Iterator[serving.Gateway]:
    with serving.gateway() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Chat:
    """A signed-in browser of its own; what goes wrong on its pages is collected."""

    def __init__(self, browser: "Browser", gateway: serving.Gateway, **options: Any) -> None:
        options.setdefault("permissions", ["clipboard-read", "clipboard-write"])
        self.gateway = gateway
        self.upstream = gateway.fake
        self.upstream.script = fake.Script()
        self.upstream.requests.clear()
        self.complaints: list[str] = []
        self.expected: list[str] = []  # beginnings of complaints that the test provokes
        self.context: BrowserContext = browser.new_context(**options)
        self.context.set_default_timeout(5000)
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.page = self.open(gateway.sign_in_url)

    def open(self, url: str | None = None) -> "Page":
        """A tab."""
        page = self.context.new_page()
        page.on("console", self._hear)
        page.goto(url or self.gateway.url)
        expect(page.locator("#model")).to_have_text(fake.MODEL)
        return page

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def ask(self, question: str, *, is_over: bool = True) -> None:
        """Type and send; by default, wait for the end."""
        self.page.fill("#input", question)
        self.page.keyboard.press("Enter")
        expect(self.page.locator(".bubble").last).to_have_text(question)
        if is_over:
            expect(self.page.locator("#stop")).to_be_hidden()

    def button(self, name: str) -> Any:
        """The last button of this accessible name."""
        return self.page.get_by_role("button", name=name, exact=True).last

    def texts(self, selector: str) -> list[str]:
        """Of all that match."""
        return self.page.locator(selector).all_inner_texts()

    def end(self) -> None:
        """Close, and fail on anything that was complained about."""
        self.context.close()
        known = tuple(self.expected)
        assert [text for text in self.complaints if not (known and text.startswith(known))] == []


@pytest.fixture
def chat(browser: "Browser", gateway: serving.Gateway) -> Iterator[Chat]:
    chat = Chat(browser, gateway)
    yield chat
    chat.end()
