"""What fine-tuning on dialogues is told: the record behind `recipes/sft/NAME.toml`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from attending.config import Config
from attending.corpus.recipe import Format
from attending.evaluate.forgetting import ForgettingConfig
from attending.model.lora import LoraConfig
from attending.sft.select import SelectConfig
from attending.train.recipe import TrainConfig
from attending.train.schedule import Shape


class TurnConfig(Config):
    """A message, of a record's fields."""

    role: Literal["system", "user", "assistant"]
    """Who says it; what the assistant says is learnt."""
    content: str = Field(min_length=1)
    """Its text: `{a}` is field a, `{turns[*].text}` a list's, by line."""


class DialogueConfig(Config):
    """Where dialogues of one kind are."""

    path: str
    """Files, as a glob below the recipe's `root`."""
    format: Format = "jsonl"
    """How they are read."""
    messages: tuple[TurnConfig, ...] = ()
    """How a record becomes a dialogue. Empty: it has `messages`, as in the OpenAI API, with
    `reasoning_content`, `tool_calls` and `weight`, and `tools` beside them."""
    id: str = ""
    """The dialogue's id, of a record's fields. Default: its file and number."""
    holdout_key: str = ""
    """What is held out as a whole, from a record's fields. Default: the id."""
    holdout: dict[str, tuple[str, ...]] = Field(default={})
    """Hold out records where a field named here has one of these values, such as a data set's own
    test split, and no others. Default: one in fifty keys."""
    only: dict[str, tuple[str, ...]] = Field(default={})
    """Take records where each field named here has one of these values."""
    limit: NonNegativeInt = 0
    """Only the first records of each file; 0 takes all."""


class SftConfig(TrainConfig):
    """From a model and dialogues to a model that answers like them."""

    model: str
    """What is gone on from: a source, such as `default` or a folder."""
    root: str = "."
    """Folder that the paths of `data` begin at."""
    data: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], DialogueConfig] = Field(min_length=1)
    """Dialogues by name."""
    select: SelectConfig | None = None
    """Which of them; None: all that are whole."""
    template: dict[str, Any] = Field(default={})
    """What the chat template is told, such as `enable_thinking = false`."""
    epochs: PositiveFloat
    """Times that every dialogue is seen; Baichuan-M1 took five, Baichuan-M2 two."""
    context: PositiveInt
    """Tokens of a row; dialogues are packed into rows and never cut. Longer ones are left out."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; they are merged at the end, and kept beside."""
    schedule: Shape = "cosine"
    """The learning rate after the warm-up stays, or falls to the final one."""
    forgetting: ForgettingConfig = ForgettingConfig()
    """What is compared before and after."""
    seed: NonNegativeInt = 0
    """Of order and adapters."""

    @model_validator(mode="after")
    def _rows(self) -> Self:
        if self.heldout.prompts:
            raise ValueError("heldout.prompts are for base models; dialogues are watched by bits")
        unknown = {*(self.select.budgets if self.select else ())} - {*self.data}
        if unknown:
            raise ValueError(
                f"select.budgets names {min(unknown)!r}; data has {', '.join(self.data)}"
            )
        return self
