"""HealthBench's grader asked the reference's way and ours, on one endpoint; and scoring alone.

    python benchmarks/grading.py KQA [REPEATS]

KQA is K-QA's .jsonl, for conversations and criteria. The endpoint is the default model's own
engine with its prefix cache, started anew for each measurement. Budget: 64 verdicts of some 1,100
tokens, two ways, three times, at 500 tokens a second: about 12 minutes; the rest is seconds.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from judging import work
from page import Measure, write

from attending import endpoint
from attending.endpoint import Endpoint, EndpointOptions
from attending.errors import AttendingError, ReplyError
from attending.evaluate import scores
from attending.evaluate.healthbench.grader import Grader, read_reply, read_template
from attending.evaluate.healthbench.task import HealthBench, recorded
from attending.evaluate.recipe import EvalConfig
from attending.verifier.judge.ask import JudgeOptions, judge_all
from attending.verifier.rubric.schema import Rubric

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.evaluate.making_recorded import write_recorded

WIDTH, TOKENS = 120, 64
REASON = 40  # characters of an explanation, so that the small judge comes to its verdict
SCHEMA = {
    "type": "object",
    "properties": {
        "explanation": {"type": "string", "maxLength": REASON},
        "criteria_met": {"type": "boolean"},
    },
    "required": ["explanation", "criteria_met"],
    "additionalProperties": False,
}
NOTES = f"""
Both ways send the same prompts (our grader's text with the conversation and one criterion) to the
same engine with the same greedy sampling, and get the same form of reply: the engine is held to a
JSON schema with a reason of at most {REASON} characters, because the default model is far too small
to judge by itself; only time counts here, and that both ways get equal verdicts. *Reference's way*
(openai/simple-evals): a map of {WIDTH} over all criteria in row order, no cache. *Ours*: one
question of a conversation ahead of its others, eight conversations at a time. *Again* is the same
run with the cache that the first one has filled. *Scoring* is 5,000 recorded answers with 48,562
verdicts, read, scored with intervals for every tag (1,000 resamples).

With equal prompts ours is no faster here: this engine shares beginnings also between requests under
way, so the wide map finds as much in the cache, and with eight conversations in all, the wave of
their first questions runs in small batches. What gains is the text's order (instructions before the
conversation, the criterion last): [judging.md](judging.md) measures it, 1.52 times on this engine.
"""


def held_to_schema(line: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
    """Adds the schema to what is sent; the client knows nothing of it."""

    async def send(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            held = {"name": "verdict", "strict": True, "schema": SCHEMA}
            body = json.loads(request.content)
            body["response_format"] = {"type": "json_schema", "json_schema": held}
            headers = {k: v for k, v in request.headers.items() if k.lower() != "content-length"}
            request = httpx.Request("POST", request.url, headers=headers, json=body)
        return await line.handle_async_request(request)

    return httpx.MockTransport(send)


async def ours(served: Endpoint, answers: Sequence[tuple[Rubric, str]]) -> dict[str, bool | None]:
    judge = Grader(served, read_template(), JudgeOptions(max_tokens=TOKENS))
    found: dict[str, bool | None] = {}
    async for at, verdicts in judge_all(judge, answers):
        rubric = answers[at][0]
        for criterion, verdict in zip(rubric.criteria, verdicts, strict=True):
            found[f"{rubric.name}: {criterion.text}"] = verdict.met
    return found


async def reference(
    served: Endpoint, answers: Sequence[tuple[Rubric, str]]
) -> dict[str, bool | None]:
    """Every criterion of every row, in order, as wide as the map; asked until it is well-formed."""
    judge = Grader(served, read_template())
    gate = asyncio.Semaphore(WIDTH)
    found: dict[str, bool | None] = {}

    async def one(rubric: Rubric, answer: str, at: int) -> None:
        criterion = rubric.criteria[at]
        asked = [{"role": "user", "content": judge.question(rubric, answer, criterion).text}]
        async with gate:
            while True:
                reply = await served.chat(asked, temperature=0.0, max_tokens=TOKENS)
                try:
                    met = read_reply(reply.text).criteria_met
                except ReplyError:
                    continue
                found[f"{rubric.name}: {criterion.text}"] = met
                return

    every = ((r, a, at) for r, a in answers for at in range(len(r.criteria)))
    await asyncio.gather(*(one(*each) for each in every))
    return found


async def timed(
    way: str, answers: Sequence[tuple[Rubric, str]], cache: Path
) -> tuple[float, float, dict[str, bool | None]]:
    """Seconds, the share of prompt tokens from the prefix cache, and the verdicts."""
    options = EndpointOptions(max_concurrency=WIDTH, cache=cache if way == "ours" else None)
    async with endpoint.open(
        "default", options=options, engine={"context": 4096}, wire=held_to_schema
    ) as served:
        await served.chat([{"role": "user", "content": "Hello."}], max_tokens=4)
        before = served.totals.input_tokens
        start = time.monotonic()
        found = await (ours if way == "ours" else reference)(served, answers)
        seconds = time.monotonic() - start
        read = served.totals.input_tokens - before
        share = served.totals.cached_tokens / read if read else 1.0
    return seconds, share, found


def scoring() -> float:
    """Seconds to read and score 5,000 recorded answers."""
    with TemporaryDirectory() as folder:
        files = write_recorded(Path(folder))
        start = time.monotonic()
        told = {"hb": {"kind": "healthbench", "data": str(files.rows)}}
        task = HealthBench(EvalConfig.build({"tasks": told}).tasks["hb"], None)  # type: ignore[arg-type]
        scores.row(task, recorded(task, files.graded), seed=0, resamples=1000)
        return time.monotonic() - start


def main(path: Path, repeats: int) -> Path:
    answers = work(path)
    count = sum(len(rubric.criteria) for rubric, _ in answers)
    rates: dict[str, list[float]] = {"ours": [], "reference's way": [], "ours, again": []}
    shares: dict[str, list[float]] = {"ours": [], "reference's way": []}
    equal = []
    for repeat in range(repeats):
        with TemporaryDirectory() as folder:
            cache, verdicts = Path(folder) / "verdicts.sqlite", {}
            for way in ("ours", "reference's way")[:: 1 if repeat % 2 == 0 else -1]:
                seconds, share, verdicts[way] = asyncio.run(timed(way, answers, cache))
                rates[way].append(count / seconds)
                shares[way].append(share)
            seconds, _, again = asyncio.run(timed("ours", answers, cache))
            rates["ours, again"].append(count / seconds)
            assert again == verdicts["ours"]
            both = zip(*(dict(sorted(v.items())).values() for v in verdicts.values()), strict=True)
            equal.append(sum(a == b for a, b in both) / count)
    found = [Measure("verdicts a second", way, values) for way, values in rates.items()]
    found += [Measure("prompt tokens from the cache, share", w, v) for w, v in shares.items()]
    found.append(Measure("verdicts equal to the reference's way, share", "ours", equal))
    found.append(Measure("scoring 48,562 verdicts, s", "ours", [scoring() for _ in range(repeats)]))
    return write("grading", "Grading HealthBench", NOTES, found)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    except (IndexError, OSError, AttendingError) as error:
        sys.exit(f"{error}\n{__doc__}")
