"""The judge of a run: opened by name, and what its word is worth."""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attending import endpoint as endpoints
from attending import sources
from attending.endpoint import is_address
from attending.errors import ConfigError, UsageError
from attending.evaluate.healthbench.grader import Grader, Template, read_template
from attending.evaluate.identity import weights_sha256
from attending.verifier.data import ROOM
from attending.verifier.judge.ask import EndpointJudge, JudgeOptions
from attending.verifier.judge.verdict import Judge

EMBEDDED, SIGNED = "embedded", "signed"
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class JudgeSetup:
    """Which judge, and how it is opened."""

    source: str
    """`embedded`, `embedded:FOLDER`, an endpoint's address, or a model on this machine."""
    how: Mapping[str, Any] = field(default_factory=dict)
    """What `endpoint.open` takes besides."""
    template: str | None = None
    """A source of the grader's text; `signed` asks as the verifier does; None is our text."""
    agreement: Path | None = None
    """A report.json of a meta-evaluation of this judge."""
    allow_self: bool = False
    """It may be a model that it judges."""

    @property
    def is_embedded(self) -> bool:
        """It needs no endpoint."""
        return self.source.partition(":")[0] == EMBEDDED


@asynccontextmanager
async def open_judge(
    setup: JudgeSetup, options: JudgeOptions, judged: Sequence[str]
) -> AsyncIterator[tuple[Judge, Facts]]:
    """The judge, and what the report says about it.

    Args:
        setup: Which.
        options: How a model is asked.
        judged: The ids of the models under test.

    Raises:
        UsageError: It would judge itself, or its agreement was measured of another judge.
    """
    if setup.is_embedded:
        from attending.verifier.judge.embedded import SHIPPED, EmbeddedJudge

        if setup.template or setup.agreement:
            raise UsageError(
                "the embedded judge has no template and knows its own agreement: leave --template "
                "and --agreement out."
            )
        folder = Path(setup.source.partition(":")[2] or SHIPPED)
        own = EmbeddedJudge(folder=folder)
        found = json.loads((folder / "report.json").read_text("utf-8"))
        value, *interval = found["embedded"]["macro-F1"]
        agreement = {"value": value, "interval": interval, "n": sum(found["pairs"].values())}
        agreement |= {"metric": "macro-F1", "against": "constructed labels"}
        sha256 = hashlib.sha256((folder / "judge.safetensors").read_bytes()).hexdigest()
        facts = _facts(own, f"embedded@{sha256[:12]}", None) | {"agreement": agreement}
        yield own, facts
        return
    async with endpoints.open(setup.source, **setup.how) as opened:
        if opened.model in judged and not setup.allow_self:
            raise UsageError(
                f"the judge is {opened.model}, a model that is judged: it would grade itself. "
                "Name another with --judge, or take it nevertheless with --allow-self."
            )
        template = _signed() if setup.template == SIGNED else read_template(setup.template)
        made = (
            EndpointJudge(opened, options)
            if setup.template == SIGNED
            else Grader(opened, template, options)
        )
        await made.identify("" if is_address(setup.source) else weights_sha256(setup.source))
        facts = _facts(made, made.version, template)
        if setup.agreement:
            facts["agreement"] = read_agreement(setup.agreement, facts)
            facts["caution"] = ""
        yield made, facts


def check_judge(setup: JudgeSetup) -> None:
    """What can be said without opening it: SourceError or UsageError where it could not be."""
    sources.resolve("judge" if setup.is_embedded else setup.source)
    if not setup.is_embedded and setup.template != SIGNED:
        read_template(setup.template)


def read_agreement(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a meta-evaluation measured of this judge under this template.

    Raises:
        ConfigError: It is no report of one.
        UsageError: It is of another judge, or under another template.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
        row = next(one for one in report["rows"] if "physicians" in one["metric"])
        judge = report["judge"]
        other = [judge[key] != facts[key] for key in ("version", "template_sha256")]
        told = f"{judge['version']} under {judge['template_sha256']}"
        found = {"value": row["score"], "interval": row["interval"], "n": row["more"]["pairs"]}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ConfigError(
            f"{path.name} is no report.json of healthbench-meta ({type(error).__name__})."
        ) from None
    if any(other):
        raise UsageError(
            f"{path.name} measured the judge {told}, not {facts['version']} under "
            f"{facts['template_sha256']}: run healthbench-meta with this judge and template."
        )
    return found | {"metric": "macro-F1", "against": "physicians"}


def _signed() -> Template:
    """The verifier's two templates, as one."""
    files = [ROOM / f"judge/prompts/{sign}.jinja" for sign in ("positive", "negative")]
    text = "\n".join(file.read_text("utf-8") for file in files)
    return Template(text, SIGNED, hashlib.sha256(text.encode()).hexdigest())


def _facts(judge: Judge, version: str, template: Template | None) -> Facts:
    return {
        "name": judge.name,
        "version": version,
        "template": template.name if template else None,
        "template_sha256": template.sha256 if template else None,
        "caution": judge.caution,
        "agreement": None,
    }
