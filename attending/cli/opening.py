"""A model that a verb asks: who it is, its key, its price; the options that say so."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from attending.errors import UsageError

IdOption = Annotated[str, typer.Option(help="One of several models at that address.")]
KeyOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable with its API key.")
]
PriceOption = Annotated[
    str | None,
    typer.Option(metavar="IN,OUT", help="Of a million of its tokens; a cost needs every price."),
]


class Opening(NamedTuple):
    """A model, or what stands in for one, and how it is asked."""

    source: str | None
    model_id: str
    api_key_variable: str | None
    price: str | None
    cache: Path | None = None

    def opening(self, name: str, **more: Any) -> dict[str, Any] | None:
        """What `endpoint.open` takes, `more` options included; None where no model is asked."""
        from attending.endpoint import EndpointOptions, is_address

        if not self.source or (name == "judge" and self.source in ("none", "embedded")):
            if any(self[1:]):
                raise UsageError(
                    f"no model is the {name}, but its id, key, price or cache is given: name one "
                    f"with --{name}."
                )
            return None
        try:
            price = [*map(float, self.price.split(","))] if self.price else None
            if price and len(price) != 2:
                raise ValueError
        except ValueError:
            raise UsageError(f"--{name}-price {self.price!r}: expected IN,OUT, as 0.5,2.") from None
        known = {"api_key_variable": self.api_key_variable, "price_per_million": price}
        values: dict[str, Any] = {**known, "cache": self.cache, **more}
        options = EndpointOptions.build(values, where=f"--{name}-...")
        if self.cache:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
        place, model_id = self.source, ""
        if is_address(place):  # a folder may have it in its name
            place, _, model_id = place.partition("#")
        return {"model": place, "model_id": self.model_id or model_id, "options": options}
