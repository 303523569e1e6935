"""Whether a model's training text holds the examples that it is tested on.

By the rule of `attending corpus`: a run of 13 tokens in common, Han characters or words. A stock
phrase of exams is one too, but a short run and a small share of its example, so both are told. A
canary, which no training text should hold, is looked for in text: tokens may cut it anywhere.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import tokenizers

from attending.corpus.read import strings
from attending.corpus.recipe import DecontaminationConfig
from attending.errors import SourceError, UsageError
from attending.model.files import read_tokenizer
from attending.overlap import NgramIndex, normalise
from attending.shards import Shards
from attending.sources import Progress, resolve


class Hit(NamedTuple):
    """What an example shares with the training text that has the longest run of it."""

    longest_run: int  # tokens, of the example
    share: float  # of the example's n-grams
    document: str  # FILE:LINE, or FOLDER:NUMBER (SOURCE) of packed shards


class Contamination(NamedTuple):
    """What was found, and in how much text."""

    hits: dict[str, Hit]  # by the examples' ids
    canary: tuple[str, ...]  # the training texts with the canary
    documents: int  # read; of .jsonl, every text of every row
    tokens: int  # Han characters and words


def against(paths: Sequence[Path], tokenizer: str | None = None) -> Iterator[tuple[str, str]]:
    """Training texts with their names: of corpora (train/ of a whole one), .jsonl[.gz], folders.

    `tokenizer` is the corpora's, if not the source that their run.json names. Raises UsageError at
    once for what is not there or none of these, or another tokenizer.
    """
    return chain.from_iterable([_texts(path, tokenizer) for path in paths])


def contaminated(
    examples: Mapping[str, str],  # texts by id
    texts: Iterable[tuple[str, str]],  # as `against` gives them; each is read once
    canary: Sequence[str] = (),  # as rows have it; what follows its last colon is looked for
    n: int = DecontaminationConfig().ngram,
    progress: Progress | None = None,
) -> Contamination:
    """Which examples share n tokens in a row with a text, or equal all of one that is shorter."""
    index = NgramIndex(n)
    marks = [one.rpartition(":")[2].strip().casefold() for one in canary]
    for name, text in examples.items():
        index.add(name, text)
    whole = {tuple(normalise(text)) for text in examples.values()} - {()}
    hits, marked, documents, tokens = dict[str, Hit](), list[str](), 0, 0
    for documents, (where, text) in enumerate(texts, 1):
        tokens += len(words := normalise(text))
        if (len(words) >= n or tuple(words) in whole) and (found := index.overlap(text).ids):
            (own := NgramIndex(n)).add(where, text)
            for name in found:
                shared = own.overlap(examples[name])
                hit = Hit(shared.longest_run, shared.share, where)
                hits[name] = max(hits.get(name, hit), hit, key=lambda one: one[:2])
        folded = text.casefold() if marks else ""
        marked += [where] if any(mark and mark in folded for mark in marks) else []
        (progress or (lambda *_: None))(documents, None, "training texts")
    return Contamination(hits, (*marked,), documents, tokens)


def _texts(path: Path, tokenizer: str | None) -> Iterator[tuple[str, str]]:
    """Opened at once, read later."""
    corpus = path / "train" if (path / "train" / "index.json").is_file() else path
    if (corpus / "index.json").is_file():
        shards = Shards(corpus)
        return _decoded(path.name, shards, _decoder(corpus, shards, tokenizer))
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [one for one in found if one.is_file() and one.name.endswith((".jsonl", ".jsonl.gz"))]
    if not files:
        raise UsageError(f"no training text in {str(path)!r}: give a corpus or .jsonl files.")
    return chain.from_iterable(map(strings, files))


def _decoder(corpus: Path, shards: Shards, source: str | None) -> tokenizers.Tokenizer:
    run, written = corpus.parent / "run.json", shards.index["tokenizer_sha256"]
    told = json.loads(run.read_text("utf-8")) if run.is_file() else {}
    source = source or told.get("recipe", {}).get("pack", {}).get("tokenizer", "")
    try:  # a run.json has no folders of the machine, so a folder's tokenizer is found by chance
        found = read_tokenizer(resolve(source).path)
    except SourceError as error:
        raise UsageError(f"the tokenizer of {str(corpus)!r} must be named. {error}") from None
    if found.sha256 != written:
        raise UsageError(f"{str(corpus)!r} has another tokenizer, {written[:12]}, than {source!r}.")
    return tokenizers.Tokenizer.from_str(json.dumps(found.definition))


def _decoded(folder: str, shards: Shards, plain: tokenizers.Tokenizer) -> Iterator[tuple[str, str]]:
    """In batches: one id after the other, as answers come, takes ten times as long."""
    for start in range(0, shards.num_documents, 256):
        numbers = range(start, min(start + 256, shards.num_documents))
        texts = plain.decode_batch([shards.document(number).tolist() for number in numbers])
        for number, text in zip(numbers, texts, strict=True):
            source = shards.index["sources"][shards.record(number)["source"]]
            yield f"{folder}:{number} ({source})", text
