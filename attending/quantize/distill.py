"""Scales and norms learnt end to end, once all blocks are rounded: the integers stay as they are.

Each group's scale and each norm's weight gets a factor, which Adam moves from 1 to lessen
KL(float || rounded) of the next token over the calibration text, through the whole model. A block's
own error is blind to what later blocks make of it; this one is what the gate measures.

After EfficientQAT's second phase (Chen 2024, arXiv 2407.11062), which trains step sizes on the
text itself. Differs: the float model teaches, whose last hidden states are there already; factors
instead of values, so that one rate fits scales of all sizes; the norms, which stay float anyway,
come along; some of the text is not learnt from, and what comes out is never worse on it than what
went in.

Shapes: S samples of L tokens, D hidden size, V vocabulary; N, K, G as in `grid`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812  (the field's name for it)
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from attending.config import Config
from attending.errors import UsageError
from attending.model.decoder import RMSNorm
from attending.model.quantized import Quantized
from attending.model.scoring import over_logits
from attending.quantize.signed import Called, batches
from attending.quantize.stream import Stream

NORM = "norm.weight"  # how the names of norms end, those of queries and keys among them
WATCHED = 8  # one sample in so many is not learnt from: by these start or end is chosen
WARM_UP = 10  # one step in so many; Adam's first ones are as large as its rate
STATES = 10  # that are saved on the way, each in the place of the one before
MOMENTS = "first/", "second/"


class Distillation(Config):
    """How long and how fast to learn."""

    epochs: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Passes over the calibration text; 0: not at all."""
    rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Adam's, of factors that begin at 1; after a short warm-up it falls as a cosine to 0."""
    batch: int = Field(2, ge=1)
    """Samples a step."""
    recompute: bool = False
    """Keep only the blocks' inputs and compute the rest again in the backward pass: a third more
    work, and neither all activations nor all weights in float32 at once."""

    def steps(self, samples: int) -> int:
        """Of so many samples, some of which are watched; rounded up."""
        learnt = samples - watched(samples)
        return math.ceil(self.epochs * learnt / min(self.batch, learnt))


class Rounded(NamedTuple):
    """The whole model but embedding and head, by full names."""

    layers: Sequence[str]
    """Linear layers of the blocks."""
    read: Callable[[str], Quantized]
    """One of them; not kept, but for its integers."""
    floats: Mapping[str, Tensor]
    """All else in the blocks, and the last norm."""
    stored: Callable[[Tensor], Tensor]
    """Scales [N, G] -> as they will be written."""


class Found(NamedTuple):
    """What was learnt, by full names."""

    scales: dict[str, Tensor]
    """[N, G] float32, of the linear layers, as they will be written."""
    norms: dict[str, Tensor]
    """Weights, of the dtype they had."""
    before: float
    """KL(float || rounded), nats a token, of samples that were not learnt from, at the start."""
    after: float
    """Of what is returned; at most `before`."""


def watched(samples: int) -> int:
    """How many are not learnt from; of one alone, none."""
    return min(samples - 1, -(-samples // WATCHED))


def sides(samples: int) -> tuple[Tensor, Tensor]:
    """Which are learnt from and which are watched, evenly among all: domains lie side by side."""
    count = watched(samples)
    is_watched = torch.zeros(samples, dtype=torch.bool)
    is_watched[(2 * torch.arange(count) + 1) * samples // (2 * max(1, count))] = True
    return (~is_watched).nonzero()[:, 0], is_watched.nonzero()[:, 0]


def distill(
    stream: Stream,
    rounded: Rounded,
    inputs: Tensor,
    teacher: Tensor,
    heads: Sequence[Tensor],
    config: Distillation,
    state: Path,
    *,
    seed: int = 0,
    told: Callable[[int, float], object] = lambda *_: None,
) -> Found:
    """Learn, from the last state on if there is one.

    Args:
        stream: That the blocks are of; only its shapes and its way of attending are used.
        rounded: The model.
        inputs: [S, L, D], the calibration text as it is embedded.
        teacher: [S, L, D], what the float model's head reads of it.
        heads: [V, D] of the float model, and of the rounded one.
        config: How long and how fast.
        state: File that keeps the factors and Adam's moments; removed by nobody here.
        seed: Of the order of samples.
        told: Called with the steps done and the step's divergence, nats a token.

    Raises:
        UsageError: The divergence is no number.
    """
    model = _Model(stream, rounded, config.recompute)
    (learnt, kept), total = sides(len(inputs)), config.steps(len(inputs))
    kept = kept if len(kept) else learnt

    def divergence(samples: Tensor) -> Tensor:
        chosen = (inputs[samples].to(stream.device), teacher[samples].to(stream.device))
        return _divergence(model, *chosen, heads)

    @torch.no_grad()
    def of_watched() -> float:
        found = [float(divergence(part)) * len(part) for part in torch.split(kept, config.batch)]
        return sum(found) / len(kept)

    before = of_watched()
    optimizer = Adam(model.factors.values(), config.rate, betas=(0.9, 0.95), eps=1e-12)
    begun = _restore(state, model.factors, optimizer) if state.is_file() else 0
    order, warm = batches(len(learnt), config.batch, seed), max(1, total // WARM_UP)
    for step in range(total):
        samples = next(order)
        if step < begun:
            continue
        loss = divergence(learnt[samples])
        if not math.isfinite(value := loss.item()):
            raise UsageError(
                f"distill: the divergence of step {step + 1} is {value}. Lower distill.rate and "
                "--resume: the blocks are kept."
            )
        for group in optimizer.param_groups:
            rise = min(1.0, (step + 1) / warm)
            group["lr"] = config.rate * rise * (1 + math.cos(math.pi * step / total)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % max(1, total // STATES) == 0:
            _keep(state, model.factors, optimizer, step + 1)
        told(step + 1, value)
    model.settle()
    after = of_watched()
    if not after <= before:  # or no number
        model.reset()
        after = before
    return Found(*model.found(), before, after)


def _divergence(
    model: "_Model", inputs: Tensor, teacher: Tensor, heads: Sequence[Tensor]
) -> Tensor:
    """Mean KL(float || rounded) over the tokens of some samples, each [.., L, D]."""
    theirs, own = heads
    hidden = model(inputs).flatten(0, 1)

    def apart(logits: Tensor, states: Tensor) -> Tensor:
        p, q = F.linear(states, theirs).log_softmax(-1), logits.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    each = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    return over_logits(hidden, own, apart, each, teacher.flatten(0, 1))[0]


class _Model:
    """The rounded model, a function of its factors."""

    def __init__(self, stream: Stream, rounded: Rounded, recompute: bool) -> None:
        self._floats, self._recompute, device = rounded.floats, recompute, stream.device
        self._stored = rounded.stored
        self._layers = {name: _Layer(rounded.read(name), device) for name in rounded.layers}
        sizes = {name: one.scales.shape for name, one in self._layers.items()}
        sizes |= {n: x.shape for n, x in rounded.floats.items() if n.endswith(NORM)}
        self.factors = {n: torch.ones(s, device=device).requires_grad_() for n, s in sizes.items()}
        self._blocks: list[tuple[list[str], Callable[..., Tensor]]] = []
        for index in range(len(stream.arch.layers)):
            self._blocks.append(self._block(stream, index))
        self._norm = RMSNorm(stream.arch.hidden_size, stream.arch.norm_eps)
        self._last = f"model.{NORM}"

    def __call__(self, x: Tensor) -> Tensor:
        """[S, L, D], embedded -> what the head reads."""
        for names, run in self._blocks:
            factors = [self.factors[name] for name in names]
            if self._recompute:
                x = checkpoint(run, x, *factors, use_reentrant=False)
            else:
                x = run(x, *factors)
        weight = self._floats[self._last].to(x.device, torch.float32)
        lent = {"weight": weight * self.factors[self._last]}
        out: Tensor = functional_call(self._norm, lent, (x,))
        return out

    @torch.no_grad()
    def reset(self) -> None:
        """As it was rounded."""
        for factor in self.factors.values():
            factor.fill_(1)

    @torch.no_grad()
    def settle(self) -> None:
        """Make factors what is left of them once scales and norms are written: no number, where
        these outgrow their dtype."""
        for (name, factor), after in zip(self.factors.items(), self._written(), strict=True):
            before = self._begun(name)
            factor.copy_(torch.where(before == 0, 1.0, after.to(factor) / before))

    @torch.no_grad()
    def found(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scales and norms."""
        written = dict(zip(self.factors, self._written(), strict=True))
        scales = {name: x.cpu() for name, x in written.items() if name in self._layers}
        return scales, {name: x.cpu() for name, x in written.items() if name not in self._layers}

    def _begun(self, name: str) -> Tensor:
        if name in self._layers:
            return self._layers[name].scales
        return self._floats[name].to(self.factors[name])

    def _written(self) -> Iterator[Tensor]:
        """Of each factor in turn, what it makes of its scales or norm."""
        for name, factor in self.factors.items():
            x = self._begun(name) * factor
            yield self._stored(x) if name in self._layers else x.to(self._floats[name].dtype)

    def _block(self, stream: Stream, index: int) -> tuple[list[str], Callable[..., Tensor]]:
        """The names of a block's factors, and what it makes of its inputs and these."""
        at = f"model.layers.{index}."
        own = {name: one for name, one in self._layers.items() if name.startswith(at)}
        floats = {
            name.removeprefix(at): x.to(stream.device)
            for name, x in self._floats.items()
            if name.startswith(at)
        }
        block = stream.empty(index)
        called = Called(block, stream.forward(block))
        names = [name for name in self.factors if name.startswith(at)]

        def run(x: Tensor, *factors: Tensor) -> Tensor:
            lent = {key: x.float() for key, x in floats.items()}
            for name, factor in zip(names, factors, strict=True):
                key = name.removeprefix(at)
                if name in own:
                    lent[f"{key}.weight"] = own[name].weight(factor)
                else:
                    lent[key] = lent[key] * factor
            lent = {f"block.{name}": value for name, value in lent.items()}
            out: Tensor = functional_call(called, lent, (x,))
            return out

        return names, run


class _Layer:
    """Integers without their zeros, and scales, groups in order."""

    def __init__(self, stored: Quantized, device: torch.device | str) -> None:
        steps = stored.values
        order = None if stored.groups is None else stored.groups.argsort(kind="stable")
        steps = steps if order is None else steps[:, order]
        cut: NDArray[Any] = steps.reshape(*stored.scales.shape, -1)
        if stored.zeros is not None:
            wide = cut.astype(np.int16 if stored.bits == 8 else np.int8)
            cut = wide - stored.zeros.astype(wide.dtype)[..., None]
        self._steps = torch.from_numpy(np.ascontiguousarray(cut)).to(device)
        self._back = None if order is None else torch.from_numpy(order.argsort()).to(device)
        self.scales = torch.from_numpy(stored.scales.astype(np.float32)).to(device)

    def weight(self, factors: Tensor) -> Tensor:
        """[N, K] of factors [N, G]."""
        weight = (self._steps * (self.scales * factors)[..., None]).flatten(1)
        return weight if self._back is None else weight[:, self._back]


def _keep(file: Path, factors: Mapping[str, Tensor], optimizer: Adam, step: int) -> None:
    """Whole or not at all."""
    tensors = {"step": torch.tensor(step)}
    for name, factor in factors.items():
        own = optimizer.state[factor]
        tensors |= {f"{MOMENTS[0]}{name}": own["exp_avg"], f"{MOMENTS[1]}{name}": own["exp_avg_sq"]}
        tensors[name] = factor.detach()
    draft = file.with_suffix(".tmp")
    save_file(tensors, draft)
    draft.replace(file)


def _restore(file: Path, factors: Mapping[str, Tensor], optimizer: Adam) -> int:
    """The steps done."""
    found = load_file(file)
    step = int(found["step"])
    for name, factor in factors.items():
        first, second = (found[f"{moment}{name}"].to(factor.device) for moment in MOMENTS)
        optimizer.state[factor] = {"step": torch.tensor(float(step))}
        optimizer.state[factor] |= {"exp_avg": first, "exp_avg_sq": second}
        factor.data.copy_(found[name])
    return step
