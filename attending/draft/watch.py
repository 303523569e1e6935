"""How far a draft would have come on held-out answers of its target: counted, not timed.

A chain of k is drafted greedily and checked against what the target wrote. Where the answers are
greedy that is what the engine will do, but for the draft's own 8 bits (and, where torch looked at
the target, the engine's); where they were sampled, a proposal x is accepted with the target's p(x),
which is how often the text agrees. So both are unbiased.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from attending.draft.loss import counted, read, unroll
from attending.draft.recipe import DraftConfig
from attending.draft.target import Target
from attending.evaluate.intervals import bootstrap, ratio
from attending.model.eagle import Eagle
from attending.shards import Shards
from attending.train.heldout import Heldout
from attending.train.reader import Batch, Piece, by_domain, gather, whole
from attending.train.state import TrainState
from attending.train.watch import Show, Watch, Watched

RESAMPLES = 1000


class Foreseen(NamedTuple):
    """Of one answer, from its first token on."""

    agrees: NDArray[np.bool_]
    """[rounds that could begin, steps]: the proposal is what the target wrote; False past its
    end."""

    def accepted(self, depth: int) -> NDArray[np.int64]:
        """Of each round that could begin, how many of `depth` proposals are accepted."""
        kept: NDArray[np.int64] = self.agrees[:, :depth].cumprod(1).sum(1)
        return kept

    def rounds(self, depth: int) -> tuple[int, int]:
        """Tokens written and rounds taken, from the first token to the end."""
        accepted, at, rounds = self.accepted(depth), 0, 0
        while at < len(accepted):
            at, rounds = at + int(accepted[at]) + 1, rounds + 1
        return len(accepted), rounds


@torch.no_grad()
def foresee(target: Target, eagle: Eagle, batch: Batch, steps: int) -> list[Foreseen]:
    """Of each answer of a batch, one a segment."""
    seen = read(target, eagle, batch)
    agrees = torch.zeros(len(batch.ids), steps, dtype=torch.bool)
    for step, slots, states in unroll(eagle, batch, seen, steps):
        rows, at = counted(batch, slots, step, batch.weights > 0)
        proposed = eagle.target_ids(eagle.logits(states[at]).argmax(-1))
        agrees[slots[at], step] = (proposed == batch.targets[rows]).cpu()
    found, end = [], 0
    for length in batch.lengths:
        start, end = end, end + length
        written = torch.nonzero(batch.weights[start:end] > 0)[:, 0].tolist()
        # The first token comes from the prompt's pass; in the last row nothing is left to foresee.
        found.append(Foreseen(agrees[start + written[0] : end - 1].numpy()))
    return found


def figures(name: str, found: Sequence[Foreseen], seed: int) -> dict[str, float]:
    """Acceptance by position, and tokens a round (with the target's own) by depth of the chain."""
    steps, told = found[0].agrees.shape[1], {f"heldout/{name}_answers": float(len(found))}
    agrees = np.concatenate([one.agrees for one in found]).cumprod(1).astype(np.int64)
    # A chain can only go on where the answer does.
    left = np.concatenate([np.arange(len(one.agrees), 0, -1) for one in found])
    for step in range(steps):
        tried = left > step if step == 0 else (left > step) & (agrees[:, step - 1] > 0)
        if tried.any():
            told[f"heldout/{name}_acceptance@{step + 1}"] = float(agrees[tried, step].mean())
        terms = [one.rounds(step + 1) for one in found]
        place = f"heldout/{name}_tokens_per_round@{step + 1}"
        own = bootstrap(terms, range(len(terms)), ratio, seed=seed, resamples=RESAMPLES)
        told |= {place: own.value, f"{place}_low": own.low, f"{place}_high": own.high}
    return told


class DraftWatch(Watch):
    """Writes what the others write, and foresight instead of bits."""

    def __init__(
        self,
        draft: Path,
        state: TrainState,
        watched: Watched,
        config: DraftConfig,
        num_steps: int,
        show: Show | None,
        models: tuple[Target, Eagle],
        flops_per_token: float,
    ) -> None:
        """`models`: the target and its draft."""
        super().__init__(draft, state, watched, config.heldout, num_steps, show)
        self._recipe, self._held = config, watched.heldout
        self._models, self._flops = models, flops_per_token
        self._device, self._most = watched.device, watched.micro_tokens

    def operations(self, lengths: Sequence[int]) -> float:
        """Of the target's pass and the draft's steps."""
        return self._flops * sum(lengths)

    def measure(self, context: int) -> None:
        """Of the first held-out answers."""
        self._foresee(self._config.max_tokens)

    def baseline(self, context: int) -> None:
        """Before the first step: what the warm start alone foresees."""
        if self._state.step == 0:
            self._foresee(self._config.max_tokens)
            self._state.owes_measure = False

    def finish(self, context: int) -> dict[str, float]:
        """Of all held-out answers."""
        found = self._foresee(self._config.final_tokens)
        self._log.close()
        return found

    def _foresee(self, most: int) -> dict[str, float]:
        told: dict[str, float] = {}
        lines = []
        for name, own in self._held.items():
            found = self._answers(own, most)
            told |= figures(name, found, self._recipe.seed)
            rounds = [told[f"heldout/{name}_tokens_per_round@{n + 1}"] for n in range(self._steps)]
            lines.append(f"{name}: tokens a round {', '.join(f'{one:.2f}' for one in rounds)}")
        self.write(told)
        self.tell(lines)
        return told

    @property
    def _steps(self) -> int:
        return self._recipe.unroll

    def _answers(self, held: Heldout, most: int) -> list[Foreseen]:
        """Whole answers until there are so many tokens, a few at a time."""
        found: list[Foreseen] = []
        pieces: list[Piece] = []
        tokens = room = 0
        groups = by_domain(held.shards.index)
        for number in held.documents:
            piece = whole(held.shards, number)
            size = piece.stop - piece.start
            if pieces and (room + size > self._most or tokens >= most):
                batch = gather(held.shards, pieces, groups).to(self._device)
                found += foresee(*self._models, batch, self._steps)
                pieces, room = [], 0
            if tokens >= most:
                return found
            pieces.append(piece)
            tokens, room = tokens + size, room + size
        batch = gather(held.shards, pieces, groups).to(self._device)
        return found + foresee(*self._models, batch, self._steps)


def by_source(folder: Path, names: Sequence[str]) -> Mapping[str, Heldout]:
    """The held-out answers of each kind of prompt that has any."""
    paths = {name: folder / "heldout" / name for name in names}
    found = {name: Shards(path) for name, path in paths.items() if (path / "index.json").is_file()}
    return {name: Heldout(one, range(one.num_documents)) for name, one in found.items()}
