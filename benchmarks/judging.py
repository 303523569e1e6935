"""How fast criteria are judged: our order and pool beside a wide map in row order, and the cache.

    python benchmarks/judging.py KQA [REPEATS]

KQA is K-QA's .jsonl, for conversations and criteria. The endpoint is the default model's own
engine, started anew for each measurement. Budget: 64 verdicts of some 1,200 tokens, two ways, three
times, at 500 to 5,000 tokens a second: about 10 minutes.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from page import Measure, write

from attending import endpoint
from attending.endpoint import Endpoint, EndpointOptions
from attending.errors import AttendingError
from attending.verifier import ask
from attending.verifier.judge.ask import EndpointJudge, JudgeOptions, Positive, judge_all
from attending.verifier.rubric.schema import Criterion, Rubric

CONVERSATIONS, CRITERIA, TOKENS, WIDTH = 8, 8, 24, 120
CACHED = 5_000
NOTES = f"""
{CONVERSATIONS} conversations of three exchanges, with {CRITERIA} criteria each; {TOKENS} tokens
are written for each, under the JSON schema of a verdict. *Ours* is `judge_all`: the conversation
first, one question of it ahead of the others, a few conversations at a time. *Row order* is the
reference's way (openai/simple-evals): its template's order (task, conversation, rubric item,
instructions) and {WIDTH} requests at once. Same engine, same model, same number of criteria and of
written tokens; the prompts have the same parts in another order. The share of prompt tokens that
came from the prefix cache is as the engine counts it. The default model is far too small to judge:
what it writes is thrown away, only the time counts.

*Cached* is {CACHED:,} verdicts that are in the endpoint's cache already, ten criteria an answer.
"""


def work(path: Path) -> list[tuple[Rubric, str]]:
    """Questions with enough statements and the physician's answer, after two other exchanges."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for at, row in enumerate(rows):
        told = (text.strip() for text in row["Must_have"] + row["Nice_to_have"])
        texts = [*dict.fromkeys(filter(None, told))][:CRITERIA]
        if len(texts) < CRITERIA:
            continue
        turns = []
        for before in (rows[at - 2], rows[at - 1]):
            turns.append({"role": "user", "content": before["Question"]})
            turns.append({"role": "assistant", "content": before["Free_form_answer"]})
        turns.append({"role": "user", "content": row["Question"]})
        criteria = tuple(Criterion(text, 5) for text in texts)
        found.append((Rubric(str(at), tuple(turns), criteria), row["Free_form_answer"]))
    return found[:CONVERSATIONS]


async def ours(served: Endpoint, answers: Sequence[tuple[Rubric, str]]) -> int:
    ask.TRIES = 1  # every reply is cut, and none is asked for again
    judge = EndpointJudge(served, JudgeOptions(max_tokens=TOKENS, max_unscored_share=1.0))
    async for _ in judge_all(judge, answers):
        pass
    return judge.verdicts


async def in_row_order(served: Endpoint, answers: Sequence[tuple[Rubric, str]]) -> int:
    """Every criterion of every row at once: task, conversation, rubric item, instructions."""
    source = Path(__file__).parents[1] / "attending/verifier/judge/prompts/positive.jinja"
    task, instructions = source.read_text(encoding="utf-8").rpartition("#}")[2].split("# Instr")
    schema = {"name": "verdict", "strict": True, "schema": Positive.model_json_schema()}
    gate = asyncio.Semaphore(WIDTH)

    async def one(rubric: Rubric, answer: str, criterion: Criterion) -> None:
        turns = [*rubric.conversation, {"role": "assistant", "content": answer}]
        said = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        item = f"[{criterion.points}] {criterion.text}"
        prompt = f"{task}\n# Conversation\n{said}\n\n# Rubric item\n{item}\n\n# Instr{instructions}"
        async with gate:
            await served.chat(
                [{"role": "user", "content": prompt}],
                max_tokens=TOKENS,
                temperature=0.0,
                response_format={"type": "json_schema", "json_schema": schema},
            )

    asked = [one(rubric, answer, c) for rubric, answer in answers for c in rubric.criteria]
    await asyncio.gather(*asked)
    return len(asked)


async def timed(way: str, answers: Sequence[tuple[Rubric, str]]) -> tuple[float, float]:
    """Criteria a second, and the share of prompt tokens from the prefix cache."""
    options = EndpointOptions(max_concurrency=WIDTH, max_tries=1)
    async with endpoint.open("default", options=options, engine={"context": 4096}) as served:
        await served.chat([{"role": "user", "content": "Hello."}], max_tokens=4)
        before = served.totals.input_tokens
        start = time.monotonic()
        count = await (ours if way == "ours" else in_row_order)(served, answers)
        seconds = time.monotonic() - start
        share = served.totals.cached_tokens / (served.totals.input_tokens - before)
    return count / seconds, share


async def cached() -> float:
    """Verdicts a second from the cache, which a server of one answer has filled."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = json.dumps({"explanation": "e", "acceptable": True})
        reply = {"choices": [{"message": {"content": body}, "finish_reason": "stop"}]}
        data = json.dumps(reply).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        try:
            while line := await reader.readuntil(b"\r\n\r\n"):
                size = next(
                    r for r in line.lower().split(b"\r\n") if r.startswith(b"content-length")
                )
                await reader.readexactly(int(size.split(b":")[1]))
                writer.write(head.encode() + b"\r\n\r\n" + data)
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.close()

    turns = ({"role": "user", "content": "What helps against a headache? " * 40},)
    criteria = tuple(Criterion(f"Names measure number {n}.", 5) for n in range(10))
    answers = [(Rubric(str(n), turns, criteria), f"Answer {n}.") for n in range(CACHED // 10)]
    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    with TemporaryDirectory() as folder:
        options = EndpointOptions(cache=Path(folder) / "judge.sqlite")
        async with listener, Endpoint(f"http://127.0.0.1:{port}", "m", options=options) as served:
            judge = EndpointJudge(served)
            seconds = 0.0
            for _ in range(2):
                start = time.monotonic()
                async for _ in judge_all(judge, answers):
                    pass
                seconds = time.monotonic() - start
    assert judge.unscored == 0
    return CACHED / seconds


def main(path: Path, repeats: int) -> Path:
    answers = work(path)
    speed: dict[str, list[float]] = {"ours": [], "row order": []}
    shares: dict[str, list[float]] = {"ours": [], "row order": []}
    for repeat in range(repeats):
        for way in list(speed)[:: 1 if repeat % 2 == 0 else -1]:
            rate, share = asyncio.run(timed(way, answers))
            speed[way].append(rate)
            shares[way].append(share)
    found = [Measure("criteria a second", way, rates) for way, rates in speed.items()]
    found += [Measure("prompt tokens from the cache, share", w, s) for w, s in shares.items()]
    rates = [asyncio.run(cached()) for _ in range(repeats)]
    found.append(Measure("cached verdicts a second", "ours", rates))
    return write("judging", "Criteria judged a second", NOTES, found)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    except (IndexError, OSError, AttendingError) as error:
        sys.exit(f"{error}\n{__doc__}")
