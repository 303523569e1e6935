"""Rollouts with numbers of their own, and batches of them."""

from collections.abc import Sequence

import numpy as np

from attending.rl.types import Rollout, Sample


def rollout(
    prompt: Sequence[int] = (5, 6, 7),
    ids: Sequence[int] = (8, 2),
    logprobs: Sequence[float] | None = None,
    case: str = "case",
) -> Rollout:
    told = (-1.0,) * len(ids) if logprobs is None else tuple(logprobs)
    return Rollout(case, tuple(prompt), tuple(ids), told, "stop", 0, 0)


def groups_of(shapes: Sequence[Sequence[int]], vocab: int, seed: int = 0) -> list[list[Sample]]:
    """`shapes`: of each group, ids of the prompt and of each answer; random ids and numbers."""
    random = np.random.default_rng(seed)
    found = []
    for number, (size, *sizes) in enumerate(shapes):
        prompt = random.integers(vocab, size=size).tolist()
        group = []
        for count in sizes:
            ids, logs = random.integers(vocab, size=count).tolist(), -random.random(count) - 0.5
            one = rollout(prompt, ids, logs.tolist(), f"case {number}")
            group.append(Sample(one, 0.0, float(random.normal())))
        found.append(group)
    return found
