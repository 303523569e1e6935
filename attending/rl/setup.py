"""Before the loop: model, cases, sampler, judges, optimizer."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from attending import artifact
from attending.errors import ConfigError
from attending.evaluate.judging import SIGNED, JudgeSetup, open_judge
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.rl.cases import is_affine_only, read_cases
from attending.rl.fragments import Room
from attending.rl.prompts import Prompts
from attending.rl.recipe import RlConfig
from attending.rl.reward import worth_of_nothing
from attending.rl.sampler import LocalSampler, Sampler
from attending.rl.types import Case
from attending.rl.vllm import RemoteSampler
from attending.train import run
from attending.train.optimizer import adamw
from attending.train.parallel import build
from attending.train.start import Start
from attending.train.state import TrainState
from attending.train.watch import Watched
from attending.verifier.judge.ask import JudgeOptions
from attending.verifier.judge.verdict import Judge
from attending.verifier.patient.case import Case as PatientCase
from attending.verifier.patient.find import find_case


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works with."""

    state: TrainState
    prompts: Prompts
    """The state's reader."""
    heldout: Prompts
    cases: Mapping[str, Case]
    """By id, held-out ones too."""
    kinds: list[str]
    sampler: Sampler
    patients: Mapping[str, PatientCase]
    """Simulated ones, by name."""
    room: Room
    """Where they are interviewed."""
    watched: Watched


def told(config: RlConfig, start: Start) -> dict[str, Any]:
    """What decides a run; a changed file of cases is seen on resume."""
    files = [{"uri": one, "sha256": _digest(one)} for one in (config.cases, config.heldout)]
    return {**config.model_dump(mode="json"), "parents": [start.parent, *files]}


def prepare(
    config: RlConfig, start: Start, draft: Path, place: World, device: torch.device
) -> Setup:
    """Read the cases, build model, optimizer and sampler.

    Raises:
        ConfigError: Recipe, cases and model do not fit each other.
    """
    if config.prompts % place.size:
        raise ConfigError(f"prompts={config.prompts} cannot be dealt to {place.size} processes.")
    if config.max_prompt + config.max_tokens > start.arch.context:
        raise ConfigError(
            f"max_prompt + max_tokens is more than the {start.arch.context} tokens of "
            f"{config.model}: lower them."
        )
    run.require_vocabulary(start.tokenizer.num_ids - 1, start.arch.vocab_size)
    own, watched = (read_cases(Path(one)) for one in (config.cases, config.heldout))
    require_scorable(config, [*own, *watched])
    require_worth(config, own)
    cases = {case.id: case for case in (*own, *watched)}
    if len(cases) < len(own) + len(watched):
        raise ConfigError(f"{config.cases} and {config.heldout} share cases: hold them apart.")
    rest = start.tokenizer, config.template, config.max_prompt, config.seed
    heldout = Prompts(watched[: config.watch.heldout_cases], *rest)
    prompts = Prompts(own, *rest)
    torch.manual_seed(config.seed + place.rank)
    decoder = build(start.arch, start.fill, place, device, config.compute)
    optimizer = adamw(decoder.named_parameters(), config.optimizer)
    stops = frozenset(start.generation["eos_token_id"])
    sizes = config.max_tokens, config.max_prompt
    if config.sampler.address:
        sampler: Sampler = RemoteSampler(config.sampler, start, stops, config.max_tokens, place)
    else:
        packed = draft / "packed" / str(place.rank)
        sampler = LocalSampler(config.sampler, packed, stops, *sizes)
    kinds = sorted({case.kind for case in cases.values()})
    state = TrainState(decoder, optimizer, prompts, place)
    looked = Watched(
        start.tokenizer, {}, config.micro_tokens, device, decoder.model.norm.weight.dtype
    )
    names = dict.fromkeys(case.patient for case in cases.values() if case.patient)
    patients = {name: find_case(name, config.seed) for name in names}
    room = Room(start.tokenizer, config.template, config.max_prompt)
    return Setup(state, prompts, heldout, cases, kinds, sampler, patients, room, looked)


def require_scorable(config: RlConfig, cases: Sequence[Case]) -> None:
    """ConfigError for what would fail when its first answer is judged."""
    lacking = [case.id for case in cases if is_affine_only(case)]
    if lacking and config.reward.form == "clipped":
        raise ConfigError(
            f"{len(lacking)} cases have rubrics without positive points, {lacking[0]!r} first, and "
            'the clipped form divides by their sum: take reward.form="affine".'
        )


def require_worth(config: RlConfig, own: Sequence[Case]) -> None:
    """ConfigError where the length reward would pay for shortness alone, by cases learnt from."""
    form, threshold = config.reward.form, config.reward.length_threshold
    if threshold is None or not own:
        return
    most, name = max((worth_of_nothing(case.criteria, form), case.id) for case in own)
    if most > threshold:
        raise ConfigError(
            f"reward.length_threshold={threshold} pays for shortness alone: of case {name!r} an "
            f"answer that meets no criterion is worth {most:.2f}. Take that or more, "
            'or reward.form="clipped", where it is worth 0.'
        )


def every_weight(decoder: Decoder) -> dict[str, Tensor]:
    """Official name -> whole tensor on the CPU, on every rank; gathered one by one."""
    found = {}
    for name, weight in decoder.named_parameters():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        found[name] = whole.detach().cpu()
    return found


@asynccontextmanager
async def judges(config: RlConfig, judged: str) -> AsyncIterator[tuple[Judge | None, Judge | None]]:
    """Who judges what is learnt from, and what is held out."""
    async with judge_of(config.judge, judged, config.judging) as own:
        if config.reporter is None:
            yield own, own
            return
        async with judge_of(config.reporter, judged, config.judging) as other:
            yield own, other


@asynccontextmanager
async def judge_of(
    source: str | None, judged: str, options: JudgeOptions
) -> AsyncIterator[Judge | None]:
    """As a run asks it; None for none."""
    if source is None:
        yield None
        return
    setup = JudgeSetup(source)
    setup = setup if setup.is_embedded else JudgeSetup(source, template=SIGNED)
    async with open_judge(setup, options, [judged]) as (judge, _):
        yield judge


def _digest(file: str) -> str:
    if not Path(file).is_file():
        raise ConfigError(f"{file} is no file: name the cases with --set cases=... and heldout=...")
    return artifact.digest(Path(file))
