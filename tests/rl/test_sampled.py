"""What the engine says of the tokens that it samples is what the trainer says of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from attending.engine.native import pack
from attending.engine.pages import pages_for
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.engine.torch_runner import TorchRunner
from attending.model.architecture import PAGE_TOKENS
from attending.model.decoder import Decoder
from attending.rl.batch import collate
from attending.rl.loss import Objective, answer_values, differentiated
from attending.rl.sampler import TrainedWeights
from attending.rl.shared import Shared
from attending.rl.types import Batch, Rollout, Sample
from attending.train.step import accumulate
from tests.model.tiny import build
from tests.rl.test_shared import M1

LLAMA = {**M1, "model_type": "llama", "tie_word_embeddings": True}
QWEN3 = {**M1, "model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1}


def sample(model: Decoder, prompt: tuple[int, ...], count: int) -> list[Rollout]:
    """Answers of at most 12 ids, side by side, in the model's own precision."""
    runner = TorchRunner(model, pages_for(model.arch, count * (len(prompt) + PAGE_TOKENS), count))
    scheduler = Scheduler(runner, max_running=count)
    told: dict[int, list[tuple[int, float]]] = {}
    for seed in range(count):
        sampling = Sampling(temperature=1.0, max_tokens=12, seed=seed)
        told[scheduler.submit(Request(prompt, sampling, frozenset({2}), num_top=0))] = []
    while scheduler.num_running or scheduler.num_waiting:
        for output in scheduler.step():
            if output.scored is not None:
                told[output.handle].append(output.scored[:2])
    parts = [tuple(zip(*tokens, strict=True)) for tokens in told.values()]
    return [Rollout("case", prompt, *both, "length", 0, 0) for both in parts]


@pytest.mark.parametrize("config", [M1, LLAMA, QWEN3], ids=["m1", "llama", "qwen3"])
def test_engine_and_trainer_agree(config: dict[str, object]) -> None:
    model = build(config, dtype=torch.float64)
    rollouts = sample(model, tuple(range(5, 25)), 4)
    assert len({one.ids for one in rollouts}) == 4
    batch = collate([[Sample(one, 1.0, 0.0) for one in rollouts]], {"case": 0})
    hidden = model(batch.ids, Shared(batch.groups))
    told = Objective(4, 12)
    found, values = differentiated(hidden, model.head_weight(), batch, told)
    # The engine hands logits to its sampler in float32.
    assert float((values.logprobs - batch.sampler).abs().max()) < 2e-6
    assert float(found.mismatch_k3.abs().max()) < 1e-11 and not found.is_truncated.any()


def test_a_batch_is_one_of_the_training_step() -> None:
    model = build(M1, dtype=torch.float64)
    rollouts = sample(model, (5, 6, 7), 3)
    gains = (0.5, -0.7, 0.2)
    samples = [Sample(one, 0.0, gain) for one, gain in zip(rollouts, gains, strict=True)]
    batch, told = collate([samples], {"case": 1}), Objective(3, 12)

    def loss(decoder: Decoder, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        def of(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
            found, values = differentiated(hidden, head, batch, told)
            return found.loss, -values.logprobs

        return decoder.measure(batch.ids, Shared(batch.groups), of)

    found = accumulate(model, [batch], loss, 1, ("rules", "rubrics"))  # type: ignore[arg-type]
    assert found.tokens == len(batch.targets) and list(found.by_kind) == ["rubrics"]
    ours = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    logs = answer_values(model(batch.ids, Shared(batch.groups)), model.head_weight(), batch)
    batch = replace(batch, old=logs.logprobs)
    accumulate(model, [batch], loss, 1, ("rules", "rubrics"))  # type: ignore[arg-type]
    for one, weight in zip(ours, model.parameters(), strict=True):
        assert one is not None and weight.grad is not None and one.any()
        torch.testing.assert_close(one, weight.grad, rtol=1e-9, atol=1e-12)


class Floats(TrainedWeights):
    """As a folder of float weights is read."""

    def blocks(self, name: str) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("kind", [TrainedWeights, Floats])
@pytest.mark.parametrize(("stored", "symmetric"), [(4, False), (4, True), (8, True)])
def test_an_update_reaches_the_engine_although_the_model_was_rounded_before(
    stored: int, symmetric: bool, kind: type[TrainedWeights]
) -> None:
    """What becomes of an update of a hundredth of a step, along itself: 1, and not 0."""
    name, rng = "model.layers.0.mlp.down_proj.weight", np.random.default_rng(0)
    start = 0.2 * rng.standard_normal((256, 512)).astype(np.float32)
    start = pack.dequantise(pack.quantise(start, stored, 32, symmetric=symmetric))
    update = (4e-5 * rng.choice([-1, 1], start.shape)).astype(np.float32)
    arch = build(LLAMA).arch

    def engine(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        source = kind(arch, {name: torch.from_numpy(weight)}, "w8")
        return pack.dequantise(pack._stored_or_rounded(source, name, "stored"))

    seen = ((engine(start + update) - engine(start)) * update).sum() / np.square(update).sum()
    assert 0.8 < seen < 1.2
    apart = np.abs(engine(start) - start).max() / np.abs(start).max()
    assert apart < 1 / 200
