"""`attending quantize`: fewer bits, nearly without loss."""

from pathlib import Path

from attending.cli.build import DryRunOption, ResumeOption, SetOption
from attending.cli.terminal import JsonFlag, print_json, progress_bar
from attending.cli.train import OutOption, RecipeArgument, note, told_made
from attending.errors import UsageError


def quantize(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out_dir: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Round a model to four or eight bits; exit 3 where its gate says that it cost too much."""
    from attending.quantize.recipe import QuantizeConfig

    config = QuantizeConfig.load(recipe, "quantize", set_ or ())
    if dry_run:
        from attending.quantize.estimate import estimate

        print_json({"recipe": config.model_dump(mode="json"), "takes": estimate(config)})
        return
    from attending.quantize import loop

    target = out_dir or Path("out") / f"quantize-{Path(recipe).stem}"
    try:
        with told_made(target, as_json), progress_bar(of_bytes=False) as progress:
            loop.quantize(config, target, resume=resume, progress=progress, note=note)
    except KeyboardInterrupt:
        raise UsageError("stopped; the same command with --resume goes on.") from None
