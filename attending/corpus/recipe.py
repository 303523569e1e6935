"""What a corpus run is told: the record behind `recipes/corpus/NAME.toml`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from attending.config import Config

Format = Literal["jsonl", "parquet", "text", "html", "pdf"]
Domain = Literal["medical", "general"]
Marker = Annotated[str, Field(min_length=1)]
TEMPLATE = r"\{(\w+(?:\[\*\])?(?:\.\w+(?:\[\*\])?)*)\}"  # a field of a record


class SourceConfig(Config):
    """Where documents of one kind are, and what is done with them."""

    path: str
    """Files, as a glob below the recipe's `root`, or several with `|`; `.gz` is unpacked."""
    format: Format = "jsonl"
    """How they are read."""
    may_be_absent: bool = False
    """No error if no file matches; for a recipe that suits any folder."""
    text: str = Field("{text}", pattern=TEMPLATE)
    """The document, of a record's fields: `{a}` is field a, `{turns[*].text}` a list's, by line."""
    id: str = ""
    """The document's id, of a record's fields. Default: the file's path and the record's number."""
    holdout_key: str = ""
    """What is held out as a whole, from a record's fields. Default: the id."""
    only: dict[str, tuple[str, ...]] = Field(default={})
    """Take records where each field named here has one of these values; the rest are removed."""
    domain: Domain | None = None
    """What it counts as in the funnel and the mixture. Default: as the medical score says."""
    private: bool = True
    """Holds records of persons: identifiers are replaced. Off only for published text."""
    weight: NonNegativeFloat = 1.0
    """Times that its documents are seen in the training shards, beside their own repeats."""
    notes: tuple[Marker, Marker] | None = None
    """What opens and closes a note in the text, such as `<note>` and `</note>`: the text around
    notes becomes context, which mid-training reads and does not learn."""
    limit: NonNegativeInt = 0
    """Only the first records of each file, for a trial; 0 takes all."""


class QualityConfig(Config):
    """Which documents are too poor to learn from."""

    min_characters: PositiveInt = 40
    """Shorter documents are removed."""
    max_bytes: PositiveInt = 20_000_000
    """Longer records are removed, and are never read whole into memory."""
    max_token_characters: PositiveInt = 2_000
    """A longer run without white space (Han text aside) removes its document: no prose has one."""
    languages: tuple[str, ...] = ("en", "zh")
    """Documents of another language, or of none that can be told, are removed. Empty: all stay."""
    min_quality: NonNegativeFloat = Field(0.2, le=1)
    """Least quality score; 0 keeps all."""
    scorer: str = ""
    """The folder `scorer` of a corpus that was built with `samples`. Default: the one shipped."""


class SamplesConfig(Config):
    """What to train the quality and the medical score on: JSONL globs, every text of every row."""

    good: tuple[str, ...] = ()
    """Text worth learning from."""
    bad: tuple[str, ...] = ()
    """Text that is not. Default: the good samples, spoiled in the ways that web text is."""
    medical: tuple[str, ...] = ()
    """About medicine."""
    general: tuple[str, ...] = ()
    """About anything else."""


class DuplicateConfig(Config):
    """Near-duplicates, and how often what was found often is seen."""

    ngram: PositiveInt = 5
    """Tokens of a shingle."""
    bands: PositiveInt = 14
    """Two documents are compared if one band of their MinHash signatures is equal."""
    rows: PositiveInt = 8
    """Values of a band: similarity (1 / bands) ** (1 / rows), here 0.72, is found half the time."""
    max_repeats: PositiveInt = 10
    """A document found n times is seen min(n, max_repeats) times (Baichuan-M1 caps at ten)."""


class RewriteConfig(Config):
    """Rewriting by a model, kept only where it is faithful (Baichuan-M2's structured rephrasing).

    Only training documents, after the identifier filter, are sent; all others stay as they are.
    """

    url: str
    """An endpoint's address, or a model on this machine, as `attending.endpoint.open` takes it."""
    model: str = ""
    """One of several models at the address."""
    prompt: str = "rephrase"
    """Name of `corpus/prompts/NAME.jinja`, or a .jinja file of one's own; it is given `text`."""
    sources: tuple[str, ...] = ()
    """Rewrite only documents of these. Empty: of all."""
    domains: tuple[Domain, ...] = ()
    """Rewrite only documents of these. Empty: of both."""
    max_characters: PositiveInt = 12_000
    """Longer documents stay as they are: the model would not hold them."""
    max_tokens: PositiveInt = 4_096
    """Of an answer; one that is cut is not used."""
    temperature: NonNegativeFloat = 0.7
    """Of sampling."""
    tries: PositiveInt = 2
    """Times that an unfaithful rewriting is asked for; then the document stays as it is."""
    length_ratio: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.5)
    """Least and greatest length of a rewriting, in lengths of the document."""
    budget_tokens: NonNegativeInt = 0
    """Of prompts and answers, over all tasks in equal shares; 0 is no bound. Checked before every
    `concurrency` documents, so that many may exceed it."""
    budget_cost: NonNegativeFloat = 0.0
    """The same in the currency of `price_per_million`; 0 is no bound."""
    price_per_million: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 0.0)
    """Of input tokens and of output tokens."""
    concurrency: PositiveInt = 8
    """Documents asked for at once, by each worker."""
    api_key_variable: str | None = None
    """Environment variable that holds the API key."""


class DecontaminationConfig(Config):
    """What must not be trained on."""

    paths: tuple[str, ...] = ()
    """Evaluation sets: JSONL globs below `root`; every text field of every row is indexed."""
    ngram: PositiveInt = 13
    """Tokens in a row that a document and a test question must share to be removed."""


class PackConfig(Config):
    """How tokens are stored."""

    tokenizer: str = "default"
    """A source with a tokenizer.json: a folder, a file, or a name of the catalogue."""
    end_of_text: str = ""
    """The control token that ends a document. Default: the tokenizer's own."""
    tokens_per_shard: PositiveInt = 100_000_000
    """Size of a shard file, four bytes a token."""
    seed: int = 0
    """Of the order in which documents are mixed."""
    sample_share: NonNegativeFloat = Field(0.0, le=1)
    """So large a part of the training documents is also written, as text, to `sample.jsonl`: what a
    tokenizer is trained on."""


class ExecutorConfig(Config):
    """Where the work runs; Slurm and Ray take datatrove's own options in `options`."""

    kind: Literal["local", "slurm", "ray"] = "local"
    """Local processes, Slurm job arrays, or Ray tasks."""
    tasks: PositiveInt = 8
    """Pieces of work a stage; the unit of resuming. The output depends on it, not on `workers`."""
    workers: PositiveInt = 2
    """Pieces at the same time."""
    options: dict[str, str | int | float] = Field(default={})
    """Of the Slurm or Ray executor, such as partition and time."""


class CorpusConfig(Config):
    """From raw text to token shards."""

    root: str = "."
    """Folder that `path`s and evaluation sets are relative to."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """By name."""
    quality: QualityConfig = QualityConfig()
    """Filters."""
    samples: SamplesConfig | None = None
    """Train the scores on these first. Default: those of `quality.scorer`."""
    duplicates: DuplicateConfig = DuplicateConfig()
    """Exact and near-duplicates."""
    rewrite: RewriteConfig | None = None
    """Rewriting of what is left by then. Default: none."""
    decontamination: DecontaminationConfig = DecontaminationConfig()
    """Evaluation sets kept out."""
    weights: dict[Domain, PositiveFloat] = Field(default={})
    """Times that a domain's documents are seen, beside their source's weight."""
    pack: PackConfig = PackConfig()
    """Tokens and shards."""
    executor: ExecutorConfig = ExecutorConfig()
    """Scale."""
