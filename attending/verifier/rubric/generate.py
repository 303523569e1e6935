"""A rubric by a model, in the three steps that Baichuan-M2 describes: candidates of each dimension,
which of them are core for the case, and their points. The prompts are ours; M2's are not public.

A reply has exactly the form that was asked for, or is asked for again. So an order that hides in a
conversation can at most change criteria; `check` has seen them, and `admit` puts them to a test.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field

from attending.config import suggest
from attending.endpoint import Endpoint
from attending.errors import ConfigError, ReplyError
from attending.overlap import HAN
from attending.verifier.ask import ask, together
from attending.verifier.data import table, template
from attending.verifier.rubric.check import fault_or_virtue, repeats, signs
from attending.verifier.rubric.schema import LARGEST, Criterion, Message, Rubric

DIMENSIONS = table("rubric/dimensions")
Line = Annotated[str, Field(min_length=1, max_length=400)]
Item = TypeVar("Item")


class Verdict(BaseModel, extra="forbid", strict=True):
    """Whether a candidate is core."""

    number: int
    reason: Line
    core: bool


class Weight(BaseModel, extra="forbid", strict=True):
    """A criterion's points."""

    number: int
    points: Annotated[int, Field(ge=-LARGEST, le=LARGEST)]


class Items(BaseModel, Generic[Item], extra="forbid", strict=True):
    """Every reply."""

    items: list[Item]


@dataclass(frozen=True, slots=True)
class Generated:
    """A rubric, and the candidates that are not in it, each with the reason."""

    rubric: Rubric
    dropped: tuple[tuple[str, str], ...]


async def generate(
    endpoint: Endpoint,
    name: str,
    conversation: Sequence[Message],
    *,
    reference: str = "",
    dimensions: Sequence[str] = tuple(DIMENSIONS),
    most_each: int = 4,
    most: int = 14,
    is_synthetic: bool = False,
    **sampling: Any,
) -> Generated:
    """At most `most_each` candidates of every dimension, at most `most` of all kept and weighed.

    Only where the conversation `is_synthetic`, no patient's, may the endpoint keep what was said.

    Raises:
        ReplyError: No try brought a well-formed reply, or nothing that earns points is left.
    """
    if unknown := [one for one in dimensions if one not in DIMENSIONS]:
        raise ConfigError(f"no dimension {unknown[0]!r}.{suggest(unknown[0], DIMENSIONS)}")
    said = "".join(turn["content"] for turn in conversation)
    is_chinese = 4 * len(re.findall(f"[{HAN}]", said)) > sum(map(str.isalpha, said))
    told = {"conversation": _quoted(conversation), "reference": reference and _quoted(reference)}
    language = "zh" if is_chinese else "en"
    author = _Author(endpoint, language, told, is_synthetic, sampling)
    left, dropped = await author.candidates(dimensions, most_each), list[tuple[str, str]]()

    def drop(reasons: dict[int, str]) -> Rubric:
        dropped.extend((left[place].text, reason) for place, reason in reasons.items())
        left[:] = [one for place, one in enumerate(left) if place not in reasons]
        return Rubric(name, tuple(conversation), tuple(left))

    def is_each(found: Items[Any]) -> bool:
        return sorted(one.number for one in found.items) == list(range(1, len(left) + 1))

    def is_chosen(found: Items[Verdict]) -> bool:
        return is_each(found) and 0 < sum(one.core for one in found.items) <= most

    def is_weighed(found: Items[Weight]) -> bool:
        return is_each(found) and all(one.points for one in found.items)

    if left:
        drop({one.criteria[1]: one.text for one in repeats(drop({}))})
        all_of = range(len(left), len(left) + 1)
        chosen = await author.ask("select", Items[Verdict], is_chosen, all_of, left, most=most)
        drop({one.number - 1: one.reason for one in chosen.items if not one.core})
        all_of = range(len(left), len(left) + 1)
        weighed = await author.ask("weigh", Items[Weight], is_weighed, all_of, left)
        points = {one.number - 1: one.points for one in weighed.items}
        left[:] = [replace(one, points=points[place]) for place, one in enumerate(left)]
    rubric = drop({one.criteria[0]: one.text for one in signs(drop({}))})
    if not any(one.points > 0 for one in rubric.criteria):
        raise ReplyError(f"{endpoint.model} wrote nothing for {name!r} that earns points.")
    return Generated(rubric, tuple(dropped))


@dataclass(frozen=True, slots=True)
class _Author:
    """The model that writes, and what every prompt tells it."""

    endpoint: Endpoint
    language: str
    told: dict[str, str]
    is_synthetic: bool
    sampling: dict[str, Any]

    async def candidates(self, dimensions: Sequence[str], most: int) -> list[Criterion]:
        """Of all dimensions at once; their points only say whether their wording is a fault's."""

        async def of(name: str) -> list[Criterion]:
            about = DIMENSIONS[name]
            more = {"description": about[self.language], "most": most}
            found = await self.ask(
                "candidates", Items[Line], lambda _: True, range(most + 1), **more
            )
            tags = (f"dimension:{name}", f"axis:{about['axis']}", "level:example", "source:model")
            texts = [" ".join(text.split()) for text in found.items if text.strip()]
            points = [-1 if fault_or_virtue(text) == "fault" else 1 for text in texts]
            return [Criterion(*both, tags) for both in zip(texts, points, strict=True)]

        found = await together([of(name) for name in dict.fromkeys(dimensions)])
        return [one for each in found for one in each]

    async def ask(
        self,
        step: str,
        form: type[Items[Item]],
        is_whole: Callable[[Items[Item]], bool],
        counts: range,
        candidates: Sequence[Criterion] = (),
        **more: Any,
    ) -> Items[Item]:
        """A reply of this form and length that is whole; ReplyError if no try brings one."""
        listed = _quoted([{"number": n, "text": one.text} for n, one in enumerate(candidates, 1)])
        prompted = template(f"rubric/prompts/{step}.{self.language}")
        prompt = prompted.render(**self.told, **more, candidates=listed)
        schema = form.model_json_schema()
        schema["properties"]["items"] |= {"minItems": counts[0], "maxItems": counts[-1]}
        found = await ask(
            self.endpoint,
            [{"role": "user", "content": prompt}],
            form,
            f"rubric {step}",
            keep=(lambda told: told.model_dump()) if self.is_synthetic else None,
            is_whole=lambda told: len(told.items) in counts and is_whole(told),
            schema=schema,
            **self.sampling,
        )
        return found.form or form.model_validate(found.kept)


def _quoted(value: object) -> str:
    """As JSON that cannot close the tag it stands in."""
    return json.dumps(value, ensure_ascii=False, indent=0).replace("<", "\\u003c")
