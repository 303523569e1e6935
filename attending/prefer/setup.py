"""Before and after the loop: models, data and optimizer in; the weights of a model folder out."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from attending.errors import CheckpointError, ConfigError
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.prefer.data import Units
from attending.prefer.method import SCORE, Objective
from attending.prefer.recipe import PreferConfig
from attending.sources import resolve
from attending.train.optimizer import adamw
from attending.train.parallel import build
from attending.train.start import Start, open_start, require_same_vocabulary
from attending.train.state import TrainState

SCORES = "score.json"


def open_models(config: PreferConfig) -> dict[str, Start]:
    """By role: `model`, and where the method has them `reference` and `reward model`.

    Raises:
        ConfigError: They do not mean the same by an id, or a sample is longer than the context.
    """
    start = open_start(config.model)
    found = {"model": start}
    if config.reads("reference"):
        found["reference"] = open_start(config.reference) if config.reference else start
    if config.ppo.reward_model:
        found["reward model"] = open_start(config.ppo.reward_model)
    for role, other in found.items():
        require_same_vocabulary(start, other, role)
        if config.batch.max_tokens > other.arch.context:
            raise ConfigError(
                f"batch.max_tokens={config.batch.max_tokens} is more than the {other.arch.context} "
                f"tokens of {other.source}: lower it."
            )
    return found


def prepare(
    config: PreferConfig, models: Mapping[str, Start], place: World, device: torch.device
) -> tuple[TrainState, Units, Objective]:
    """Build the models and read the data; ConfigError if the recipe does not fit them."""
    start = models["model"]
    if place.size > 1 and (config.is_alone or config.batch.units % place.size):
        remedy = "run one" if config.is_alone else f"set batch.units to a multiple of {place.size}"
        raise ConfigError(f"{config.method} is not for {place.size} processes: {remedy}.")
    units = Units(config, start.tokenizer)
    torch.manual_seed(config.seed + place.rank)
    built = {
        role: build(one.arch, one.fill, place, device, config.compute)
        for role, one in models.items()
    }
    decoder, judge, reference = map(built.get, ("model", "reward model", "reference"))
    assert decoder
    if judge:
        _add_score(judge, _read_score(str(config.ppo.reward_model)))
    if config.method in ("reward", "ppo"):
        _add_score(decoder, torch.zeros(start.arch.hidden_size))
    if config.method == "reward" and not start.arch.tied:
        decoder.lm_head.requires_grad_(False)  # there are no logits, so it has no gradient
    for other in filter(None, (judge, reference)):
        other.requires_grad_(False)
    stops = frozenset(start.generation["eos_token_id"])
    objective = Objective(config, start.tokenizer, stops, reference, judge, place.size)
    optimizer = adamw(decoder.named_parameters(), config.optimizer)
    return TrainState(decoder, optimizer, units, place), units, objective


def without_score(
    config: PreferConfig, draft: Path, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The official weights; a reward model's scalar head goes into a file beside them."""
    score = weights.pop(SCORE, None)
    if score is not None and config.method == "reward":
        (draft / SCORES).write_text(json.dumps({"weight": score[0].tolist()}) + "\n", "utf-8")
    return weights


def _add_score(decoder: Decoder, values: Tensor) -> None:
    """A scalar of every hidden state: the head of a reward model or critic."""
    decoder.score = nn.Linear(len(values), 1, bias=False)
    decoder.score.weight = nn.Parameter(values[None].to(decoder.model.norm.weight))


def _read_score(source: str) -> Tensor:
    file = resolve(source).path / SCORES
    if not file.is_file():
        raise CheckpointError(f"{source} has no {SCORES}: name what `method = reward` wrote.")
    return torch.tensor(json.loads(file.read_text(encoding="utf-8"))["weight"])
