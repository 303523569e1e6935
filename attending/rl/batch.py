"""Samples side by side: the last step of `types`, and how much goes into one forward pass."""

from collections.abc import Mapping, Sequence

import torch

from attending.rl.types import Batch, Sample


def collate(
    groups: Sequence[Sequence[Sample]], kinds: Mapping[str, int], device: torch.device | str = "cpu"
) -> Batch:
    """Groups of samples, each of one case, as one forward pass.

    A sample of advantage 0 adds nothing to the gradient and may be left out, as long as the loss is
    still told the number of all samples. `kinds` gives each case's number in the metrics.

    Raises:
        ValueError: Two prompts of a group differ.
    """
    rows: list[list[int]] = []
    ids: list[int] = []
    at: list[int] = []
    for group in groups:
        prompt, case = group[0].rollout.prompt, group[0].rollout.case
        if any((one.rollout.prompt, one.rollout.case) != (prompt, case) for one in group):
            raise ValueError(f"samples beside those of case {case!r} have another prompt or case")
        ids += prompt
        last = len(ids) - 1
        for sample in group:
            at += [last, *range(len(ids), len(ids) + len(sample.rollout.ids) - 1)]
            ids += sample.rollout.ids[:-1]
        rows.append([len(prompt), *(len(sample.rollout.ids) - 1 for sample in group)])
    samples = [sample for group in groups for sample in group]
    sizes = torch.tensor([len(sample.rollout.ids) for sample in samples], device=device)

    def each(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device).repeat_interleave(sizes)

    logprobs = [one for sample in samples for one in sample.rollout.logprobs]
    return Batch(
        ids=torch.tensor(ids, device=device),
        targets=torch.tensor([i for one in samples for i in one.rollout.ids], device=device),
        weights=torch.ones(len(at), device=device),
        lengths=[n for group in rows for n in group],
        kinds=each([kinds[sample.rollout.case] for sample in samples]),
        groups=rows,
        cases=[group[0].rollout.case for group in groups],
        at=torch.tensor(at, device=device),
        answers=each(range(len(samples))),
        group=each([number for number, group in enumerate(groups) for _ in group]),
        advantages=each([sample.advantage for sample in samples], torch.float64),
        sampler=torch.tensor(logprobs, dtype=torch.float64, device=device),
    )


def passes(groups: Sequence[Sequence[Sample]], most_rows: int) -> list[list[Sequence[Sample]]]:
    """Whole groups in order, as many to a pass as its rows allow; one group is never split."""
    found: list[list[Sequence[Sample]]] = []
    room = 0
    for group in groups:
        size = len(group[0].rollout.prompt) + sum(len(one.rollout.ids) - 1 for one in group)
        if size > room:
            found.append([])
            room = most_rows
        found[-1].append(group)
        room -= size
    return found
