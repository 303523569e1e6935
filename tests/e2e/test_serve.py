"""`attending serve` as a user starts it: real weights, a real port, the client, the page."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

MODEL = "SmolLM2-135M-Instruct-Q4_1"
ASK: list[Any] = [{"role": "user", "content": "What is hypertension?"}]


@pytest.fixture
def told(default_cache: Path) -> Iterator[dict[str, Any]]:
    """What the server announces; it must end well when it is told to."""
    command = [sys.executable, "-m", "attending.cli", "serve", "--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = server.stdout.readline()
            assert line, "the server did not start"
            text += line
        yield json.loads(text)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_the_assistant_answers_through_api_and_page(told: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{told['url']}/v1", api_key=told["new_key"], max_retries=0)
    assert [model.id for model in client.models.list()] == [told["model"]] == [MODEL]
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0.0, max_tokens=24
    )
    streamed = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0.0, max_tokens=24, stream=True
    )
    text = "".join(event.choices[0].delta.content or "" for event in streamed if event.choices)
    assert text == answer.choices[0].message.content and "Hypertension" in text
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{told['url']}/v1", api_key="atd-wrong").models.list()
    page_says_what_it_is(told["sign_in_url"])
    assert "not for clinical use" in told["note"]
    metrics = httpx.get(
        f"{told['url']}/metrics", headers={"Authorization": f"Bearer {told['new_key']}"}
    ).text
    assert "attending_engine_output_tokens_total" in metrics


def page_says_what_it_is(address: str) -> None:
    """Signs in and asks, in a real browser where there is one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("textbox").fill("What is hypertension?")
        page.keyboard.press("Enter")
        page.get_by_text("tokens/s").wait_for(timeout=120_000)
        sync_api.expect(page.get_by_text("not for clinical use").first).to_be_visible()
        shots = os.environ.get("SCREENSHOTS")
        if shots:
            page.set_viewport_size({"width": 1200, "height": 820})
            page.screenshot(path=Path(shots) / "page.png")
        browser.close()
