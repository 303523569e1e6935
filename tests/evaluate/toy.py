"""An endpoint of one fixed distribution over tokens, as far as the tests of tasks need it."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

import httpx

from attending.endpoint import Endpoint, EndpointOptions
from attending.evaluate import tasks
from attending.evaluate.recipe import EvalConfig
from attending.evaluate.sample import Answer as Said
from attending.evaluate.sample import Example, Grade
from attending.verifier.judge.verdict import Verdict

TOKEN = re.compile(r" ?\w+|\s|[^\w\s]")


@dataclass
class Toy:
    """Every token has the same probability wherever it stands; what is not listed has 1e-6."""

    probability: Mapping[str, float] = field(default_factory=dict)
    says: str = "yes"
    top: int = 20
    writes: bool = False  # refuses max_tokens=0
    echoes: bool = True
    counts: bool = True
    head: str = ""  # a token that the server puts before a text
    status: int = 0
    context: int = 10_000  # characters
    asked: list[Any] = field(default_factory=list)

    def logprob(self, token: str) -> float:
        return log(self.probability.get(token, 1e-6))

    def serve(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked.append(body)
        if self.status:
            return httpx.Response(self.status, json={"error": {"message": "no"}})
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        if "messages" in body:
            message = {"content": self.says}
            choices = [{"message": message, "finish_reason": "stop"}]
            return httpx.Response(200, json={"choices": choices, "usage": usage})
        text, most = body["prompt"], body["max_tokens"]
        bad = len(text) > self.context or body["logprobs"] > self.top
        if bad or (self.writes and not most):
            return httpx.Response(400, json={"error": {"message": "no"}})
        prompt = [self.head] * bool(self.head) + TOKEN.findall(text)
        likely = sorted(self.probability, key=lambda t: -self.probability[t])
        new, echoed = likely[:most], prompt if body.get("echo") and self.echoes else []
        offsets = [sum(map(len, prompt[:i])) for i in range(len(prompt) + 1)]
        logprobs = {
            "tokens": echoed + new,
            "token_logprobs": [None if not i else self.logprob(t) for i, t in enumerate(echoed)]
            + [self.logprob(t) for t in new],
            "top_logprobs": [{t: self.logprob(t) for t in likely[: body["logprobs"]]}]
            * len(echoed + new),
            "text_offset": offsets[: len(echoed)] + offsets[-1:] * len(new),
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": most} if self.counts else {}
        choices = [{"text": "".join(new), "logprobs": logprobs, "finish_reason": "length"}]
        return httpx.Response(200, json={"choices": choices, "usage": usage})


@asynccontextmanager
async def asking(toy: Toy) -> AsyncIterator[Endpoint]:
    options = EndpointOptions(max_tries=1)
    line = httpx.MockTransport(toy.serve)
    async with Endpoint("http://toy", "toy", options=options, wire=lambda _: line) as endpoint:
        yield endpoint


def task(folder: Path, kind: str, *rows: Mapping[str, Any], **config: Any) -> Any:
    """A task over rows, by way of their file."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text("".join(lines), "utf-8")
    values = {"kind": kind, "name": kind, "data": "rows.jsonl", **config}
    [one] = EvalConfig.build({"tasks": {values["name"]: values}}).tasks.values()
    return tasks.build(one, folder)


def said(text: str, **more: Any) -> Said:
    return Said("0", 0, text, **more)


def graded(one: Any, text: str, verdicts: tuple[Verdict, ...] = (), at: int = 0) -> Grade:
    example: Example = one.examples[at]
    grade: Grade = one.grade(example, said(text), verdicts)
    return grade
