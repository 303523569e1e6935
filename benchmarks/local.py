"""`attending chat` on the default model: time to the first token, prefill and decode speed.

    python benchmarks/local.py

Beside transformers on the same float32 weights, in the same process, turn by turn. Budget: 5
repeats of about 20 seconds.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from page import Measure, write

import attending
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.engine.torch_runner import TorchRunner

REPEATS = 5
PROMPT_TOKENS = 512
ANSWER_TOKENS = 64
QUESTION = "What is the first-line drug for type 2 diabetes?"
NOTES = f"""
SmolLM2-135M-Instruct, the default model (Q4_1 GGUF, dequantised to float32 by both). *First token*
is from the start of the process to the first character of the answer, with the files in the
system's cache: Python, imports, reading 98 MB, dequantising, prompt. *Prefill* is one prompt of
{PROMPT_TOKENS} tokens; *decode* is {ANSWER_TOKENS} greedy tokens after a prompt of 16, batch 1.
transformers runs `generate` with its default cache and attention.
"""


def main() -> None:
    first = [first_token_seconds() for _ in range(REPEATS + 1)][1:]  # the first one warms the disk
    model = attending.load("default")
    runner = TorchRunner(model.decoder, (64,))
    ids = model.tokenizer.encode("The patient was admitted with chest pain and fever. " * 60)
    with tempfile.TemporaryDirectory() as folder:
        saved = model.save(Path(folder) / "model")
        peer = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    rates = {name: [] for name in ("our prefill", "prefill", "our decode", "decode")}
    measured_prefill(runner, ids), peer_prefill(peer, ids)  # warm both
    for _ in range(REPEATS):
        rates["our prefill"].append(measured_prefill(runner, ids))
        rates["prefill"].append(peer_prefill(peer, ids))
        rates["our decode"].append(measured_decode(runner, ids))
        rates["decode"].append(peer_decode(peer, ids))
    ours, theirs = "attending", "transformers"
    page = write(
        "local",
        "The default model in one process",
        NOTES,
        [
            Measure("first token, s", ours, first),
            Measure("prefill, tokens/s", ours, rates["our prefill"]),
            Measure("prefill, tokens/s", theirs, rates["prefill"]),
            Measure("decode, tokens/s", ours, rates["our decode"]),
            Measure("decode, tokens/s", theirs, rates["decode"]),
        ],
    )
    print(page.read_text(encoding="utf-8"))


def first_token_seconds() -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "attending.cli", "chat", QUESTION, "--temperature", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout and process.stdout.read(1), "no answer"
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds


def measured_prefill(runner: TorchRunner, ids: list[int]) -> float:
    scheduler = Scheduler(runner, step_tokens=512)  # as attending.load
    sampling = Sampling(temperature=0.0, max_tokens=1)
    scheduler.submit(Request(tuple(ids[:PROMPT_TOKENS]), sampling))
    start = time.perf_counter()
    while not scheduler.step():
        pass
    return PROMPT_TOKENS / (time.perf_counter() - start)


def measured_decode(runner: TorchRunner, ids: list[int]) -> float:
    scheduler = Scheduler(runner)
    sampling = Sampling(temperature=0.0, max_tokens=ANSWER_TOKENS + 1)
    scheduler.submit(Request(tuple(ids[:16]), sampling))
    scheduler.step()
    start = time.perf_counter()
    assert sum(len(scheduler.step()) for _ in range(ANSWER_TOKENS)) == ANSWER_TOKENS
    return ANSWER_TOKENS / (time.perf_counter() - start)


@torch.inference_mode()
def peer_prefill(peer: transformers.PreTrainedModel, ids: list[int]) -> float:
    prompt = torch.tensor([ids[:PROMPT_TOKENS]])
    start = time.perf_counter()
    peer(prompt, use_cache=True, logits_to_keep=1)
    return PROMPT_TOKENS / (time.perf_counter() - start)


@torch.inference_mode()
def peer_decode(peer: transformers.PreTrainedModel, ids: list[int]) -> float:
    prompt = torch.tensor([ids[:16]])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    seconds = []
    for count in (1, ANSWER_TOKENS + 1):
        start = time.perf_counter()
        out = peer.generate(prompt, max_new_tokens=count, **options)
        seconds.append(time.perf_counter() - start)
        assert out.shape[1] == 16 + count
    return ANSWER_TOKENS / (seconds[1] - seconds[0])


if __name__ == "__main__":
    main()
