"""The verbs that train; each is the same under torchrun."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attending.cli.build import DryRunOption, ResumeOption, SetOption
from attending.cli.terminal import JsonFlag, err, escape, out, print_json
from attending.errors import CheckFailed, UsageError
from attending.mesh import world

if TYPE_CHECKING:
    from attending.sources import Progress as Counted
    from attending.train.watch import Progress as Told
    from attending.train.watch import Show

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe, or a .toml file.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write.")]
AcceptOption = Annotated[
    bool, typer.Option("--accept-changes", help="Resume although the recipe has changed.")
]
ForgettingOption = Annotated[
    float | None,
    typer.Option(help="Fail (exit 3) where something kept is worse by more than this share."),
]

ExportOption = Annotated[
    str | None, typer.Option("--export", help="Write a folder for `verl` instead of training.")
]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", help="Place trainers and vLLM on the Ray cluster there; `auto`: here."),
]


def pretrain(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out_dir: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    accept_changes: AcceptOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a base model from token shards; the same under torchrun."""
    how = {"resume": resume, "accept_changes": accept_changes}
    _train("pretrain", recipe, set_ or (), out_dir, dry_run, as_json, how)


def _tuning(verb: str, says: str) -> Callable[..., None]:
    """A verb of a stage that goes on from a model; `says` is its help."""

    def run(
        recipe: RecipeArgument,
        set_: SetOption = None,
        out_dir: OutOption = None,
        resume: ResumeOption = False,
        dry_run: DryRunOption = False,
        accept_changes: AcceptOption = False,
        max_forgetting: ForgettingOption = None,
        as_json: JsonFlag = False,
    ) -> None:
        pairs = [*(set_ or ()), *_limit(max_forgetting)]
        _tune(verb, recipe, pairs, out_dir, resume, dry_run, accept_changes, as_json)

    run.__name__, run.__doc__ = verb, says
    return run


midtrain = _tuning(
    "midtrain", "Teach a model a domain and keep what it knew; the same under torchrun."
)
sft = _tuning("sft", "Tune a model on dialogues, all weights or adapters; the same under torchrun.")
prefer = _tuning("prefer", "Tune a model on preferences: DPO, TDPO, ELO, a reward model, PPO.")


def rl(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out_dir: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    accept_changes: AcceptOption = False,
    max_forgetting: ForgettingOption = None,
    export: ExportOption = None,
    ray: RayOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Reinforce what a verifier rewards: Baichuan-M2's improved GRPO; the same under torchrun."""
    if export:
        _export(export, recipe, set_ or (), out_dir, as_json)
        return
    pairs = [*(set_ or ()), *_limit(max_forgetting)]
    if ray and not dry_run:
        flags = {"--resume": resume, "--accept-changes": accept_changes}
        words = [word for one in pairs for word in ("--set", one)]
        words += [flag for flag, is_on in flags.items() if is_on]
        _place(recipe, pairs, words, out_dir, ray, as_json)
        return
    _tune("rl", recipe, pairs, out_dir, resume, dry_run, accept_changes, as_json)


def _place(
    recipe: str,
    pairs: Sequence[str],
    words: Sequence[str],
    out_dir: Path | None,
    address: str,
    as_json: bool,
) -> None:
    """Its processes are this verb's own, without `--ray`."""
    from attending.rl.launch import launch
    from attending.rl.recipe import RlConfig

    target = out_dir or Path("out") / f"rl-{Path(recipe).stem}"
    config = RlConfig.load(recipe, "rl", pairs)
    with told_made(target, as_json):
        launch(config, [recipe, *words], target, address, note)


def _export(
    what: str, recipe: str, pairs: Sequence[str], out_dir: Path | None, as_json: bool
) -> None:
    """For another trainer; nothing is trained here."""
    from attending.rl.export_verl import export_verl
    from attending.rl.recipe import RlConfig

    if what != "verl":
        raise UsageError(f"--export {what!r}: only verl is known.")
    target = out_dir or Path("out") / f"{what}-{Path(recipe).stem}"
    made = export_verl(RlConfig.load(recipe, "rl", pairs), target, note)
    if as_json:
        print_json({"folder": str(made)})
    else:
        out.print(str(made), markup=False)


def draft(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out_dir: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    accept_changes: AcceptOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a model's EAGLE-3 draft on what the model writes."""
    _tune("draft", recipe, set_ or (), out_dir, resume, dry_run, accept_changes, as_json)


def _tune(
    verb: str,
    recipe: str,
    pairs: Sequence[str],
    out_dir: Path | None,
    resume: bool,
    dry_run: bool,
    accept_changes: bool,
    as_json: bool,
) -> None:
    """A stage that begins with a model, and tells what it asks of one."""
    how = {"resume": resume, "accept_changes": accept_changes, "progress": _counted()}
    _train(verb, recipe, pairs, out_dir, dry_run, as_json, how | {"note": note})


def _train(
    verb: str,
    recipe: str,
    pairs: Sequence[str],
    out_dir: Path | None,
    dry_run: bool,
    as_json: bool,
    how: dict[str, Any],
) -> None:
    """Every stage is `attending/VERB/{recipe,estimate,loop}.py`."""
    room = f"attending.{verb}"
    config_of: Any = vars(import_module(f"{room}.recipe"))[f"{verb.capitalize()}Config"]
    config = config_of.load(recipe, verb, pairs)
    if dry_run:
        takes = import_module(f"{room}.estimate").estimate(config)
        print_json({"recipe": config.model_dump(mode="json"), "takes": takes})
        return
    run: Any = vars(import_module(f"{room}.loop"))[verb]
    target = out_dir or Path("out") / f"{verb}-{Path(recipe).stem}"
    with told_made(target, as_json), _training_bar() as show:
        run(config, target, show=show, **how)


@contextmanager
def told_made(made: Path, as_json: bool) -> Iterator[None]:
    """At the end, where a folder is or its metrics; where a check failed too, as it is there."""
    try:
        yield
    except CheckFailed:
        _tell(made, as_json)
        raise
    _tell(made, as_json)


def _tell(made: Path, as_json: bool) -> None:
    if world().rank or not (made / "run.json").exists():
        return
    if as_json:
        print_json(json.loads((made / "run.json").read_text("utf-8"))["metrics"])
        return
    out.print(str(made), markup=False)


def _limit(max_forgetting: float | None) -> list[str]:
    """As `--set` says it."""
    return [] if max_forgetting is None else [f"forgetting.max_forgetting={float(max_forgetting)}"]


def note(line: str) -> None:
    """What people should know, once for all ranks."""
    if not world().rank:
        err.print(f"[dim]{escape(line)}[/]")


def _counted() -> "Counted":
    """A line for every tenth of a task's answers."""
    told: set[tuple[str, int]] = set()

    def show(done: int, total: int | None, name: str) -> None:
        tenth = 10 * done // (total or 1)
        if (name, tenth) not in told:
            told.add((name, tenth))
            note(f"{name}: {done} of {total}")

    return show


@contextmanager
def _training_bar() -> Iterator["Show"]:
    """Steps, loss, tokens a second, share of the matrix ceiling, time left; rank 0 draws them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from attending.train.watch import Notes

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TextColumn("{task.fields[share]:.0%} of the matrix ceiling, {task.fields[left]} left"),
    )
    bar = Progress(*columns, console=err, disable=world().rank > 0)
    try:
        task = bar.add_task("", total=None, loss=0.0, speed=0.0, share=0.0, left="?")

        def show(told: "Told | Notes") -> None:
            if isinstance(told, Notes):
                for line in told.lines:
                    bar.console.print(f"[dim]step {told.step}: {escape(line)}[/]")
                return
            left = str(timedelta(seconds=round(told.seconds_left)))
            bar.start()  # not before there is something to show: an error may come first
            bar.update(
                task,
                completed=told.step,
                total=told.num_steps,
                loss=told.loss,
                speed=told.tokens_per_second,
                share=told.ceiling_share,
                left=left,
            )

        yield show
    finally:
        bar.stop()
