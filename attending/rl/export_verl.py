"""`attending rl RECIPE --export verl`: the same recipe as a folder that verl trains from."""

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from attending import artifact
from attending.chat import Tokenizer
from attending.endpoint import is_address
from attending.errors import ConfigError, UsageError
from attending.evaluate.judging import EMBEDDED
from attending.rl.cases import line_of, read_cases
from attending.rl.prompts import Prompt, Prompts
from attending.rl.recipe import RlConfig
from attending.rl.setup import require_scorable, require_worth
from attending.rl.types import Case
from attending.rl.verl_workers import UNSCORED
from attending.sources import resolve
from attending.train.start import open_start
from attending.verifier.patient.find import find_case
from attending.verifier.patient.simulator import Patient

VERSION = "0.9.1"  # the verl that this was read and tested with
BY_STD = {"group_mean": False, "group_std": True}


def export_verl(
    config: RlConfig, out: Path, note: Callable[[str], object] = lambda _: None
) -> Path:
    """Write configuration, cases, reward function, agent loop and a page on how to run them.

    Args:
        config: The recipe.
        out: Folder to write; its absolute path stands in what is written.
        note: Told what was left out.

    Raises:
        ConfigError: verl cannot do what the recipe says; with the reason.
        UsageError: `out` exists, or pyarrow is not installed.
    """
    for reason in _unlike(config):
        raise ConfigError(f"verl cannot do this recipe: {reason}")
    model, out = resolve(config.model).path.resolve(), out.resolve()
    if not model.is_dir():
        raise ConfigError(f"verl reads model folders, and {config.model} is a file: name a folder.")
    own, watched = (read_cases(Path(one)) for one in (config.cases, config.heldout))
    _require_judged(config, own, watched)
    tokenizer = open_start(config.model).tokenizer
    rest = tokenizer, config.template, config.max_prompt, config.seed
    train, heldout = Prompts(own, *rest), Prompts(watched[: config.watch.heldout_cases], *rest)
    for line in train.lines():
        note(line)
    values = {
        "folder": str(out),
        "name": out.name,
        "model": str(model),
        "counts": (len(train.prompts), len(heldout.prompts)),
        "left_out": f"{len(own) - len(train.prompts)} left out",
        **_derived(config, own, len(train.prompts)),
    }
    with artifact.publish(out) as draft:
        _write_rows(draft / "train.parquet", train.prompts, tokenizer, config, "train")
        _write_rows(draft / "heldout.parquet", heldout.prompts, tokenizer, config, "heldout")
        fixed = {"model": str(model), "template": config.template}
        artifact.write_json(draft / "recipe.json", config.model_dump(mode="json") | fixed)
        for name, text in _rendered(values):
            (draft / name).write_text(text, "utf-8")
    return out


def _unlike(config: RlConfig) -> list[str]:
    """What verl has no setting for, with the remedy."""
    found = []
    if config.loss.advantage not in BY_STD:
        found.append(
            f"advantage {config.loss.advantage!r} takes a factor for each step of an answer, and "
            "its estimators see one reward an answer; take group_mean or group_std."
        )
    if config.reward.length_threshold is not None and not config.reward.count_thinking:
        found.append(
            "reward.count_thinking=false: its estimators see how many ids an answer has, not which."
        )
    if config.optimizer.skip_window:
        found.append("no step is skipped for a large gradient: set optimizer.skip_window=0.")
    if config.compute.precision == "float64":
        found.append("compute.precision is float32 or bfloat16 there.")
    for name, source in (("judge", config.judge), ("reporter", config.reporter)):
        if source not in (None, EMBEDDED) and not is_address(str(source)):
            found.append(
                f"{name}={source!r} would be loaded by each of its workers: serve it, and give "
                "the address."
            )
    return found


def _require_judged(config: RlConfig, own: Sequence[Case], watched: Sequence[Case]) -> None:
    cases = [*own, *watched]
    require_scorable(config, cases)
    require_worth(config, own)
    if len({case.id for case in cases}) < len(cases):
        raise ConfigError(f"{config.cases} and {config.heldout} share cases: hold them apart.")
    lacking = [case.id for case in cases if case.criteria and config.judge is None]
    if lacking:
        raise ConfigError(f"case {lacking[0]!r} has a rubric and nobody judges: name a judge.")


def _derived(config: RlConfig, own: Sequence[Case], count: int) -> dict[str, Any]:
    """What the templates take besides the recipe; verl counts draws, not updates or tokens."""
    draws = config.steps // config.updates
    is_plain = config.reward.length_threshold is None and all(case.rule for case in own)
    return {
        "config": config,
        "loss": config.loss,
        "optimizer": config.optimizer,
        "version": VERSION,
        "unscored": UNSCORED,
        "estimator": "grpo" if is_plain else "attending_group",
        "by_std": BY_STD[config.loss.advantage],
        "sequence": config.loss.level == "sequence",
        "several": config.watch.heldout_answers > 1,
        "warmup": -(-config.warmup_steps // config.updates),
        "draws": draws,
        "epochs": -(-draws // max(count // config.prompts, 1)),
        "test_draws": -(-config.watch.every_steps // config.updates),
        "save_draws": -(-config.state.every_tokens // config.draw_tokens),
    }


def _rendered(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each file that has a template."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    files = sorted((resources.files("attending.rl") / "verl").iterdir(), key=lambda one: one.name)
    return [
        (
            one.name.removesuffix(".jinja"),
            environment.from_string(one.read_text("utf-8")).render(values),
        )
        for one in files
    ]


def _write_rows(
    path: Path, prompts: Sequence[Prompt], tokenizer: Tokenizer, config: RlConfig, split: str
) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UsageError(
            f"{path.name} needs pyarrow: pip install -e '.[corpus]' in the clone"
        ) from None
    rows = [_row(one, tokenizer, config.seed, split) for one in prompts]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _row(prompt: Prompt, tokenizer: Tokenizer, seed: int, split: str) -> dict[str, Any]:
    """As verl's `RLHFDataset` reads it; a patient's first words stand for the consultation."""
    case, messages = prompt.case, [dict(turn) for turn in prompt.case.messages]
    if case.patient:
        said = Patient(find_case(case.patient, seed)).open().text
        messages = [{"role": "user", "content": said}]
    return {
        "data_source": case.kind,
        "prompt": messages,
        "agent_name": "attending_consultation" if case.patient else "single_turn_agent",
        "reward_model": {
            "style": "rule" if case.rule else "patient" if case.patient else "rubrics",
            "ground_truth": json.dumps(line_of(case), ensure_ascii=False),
        },
        "extra_info": {
            "index": prompt.number,
            "case": case.id,
            "split": split,
            "opened": bool(prompt.ids) and tokenizer.opens_reasoning(prompt.ids),
        },
    }
