"""The engine's service on a loopback port, for the tests of its API."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from attending.engine.server import EngineOptions, Service, prepare
from tests.hallway.test_chat import RAW
from tests.running import running

WEATHER = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["mg", "ml"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}
ENDLESS = {str(RAW.token_to_id("<|im_end|>")): -100}
ASK: list[Any] = [{"role": "user", "content": "has the patient a fever"}]


@contextmanager
def serve(model: Path, **options: Any) -> Iterator[tuple[str, Service]]:
    chosen = EngineOptions.build(options)
    service = Service(prepare(str(model), chosen), chosen)
    engine = threading.Thread(target=service.worker.run)
    engine.start()
    with running(service.app()) as url:
        yield url, service
    engine.join(10)
    assert not engine.is_alive()


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
