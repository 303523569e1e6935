"""The steps of the stages: small classes around functions that are tested alone.

Duplicates are found by datatrove's own steps; only their signatures are made here, by `overlap`,
and what they list is removed here, so that one ledger accounts for every step.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from loguru import logger
from numpy.typing import NDArray

from attending.corpus import read
from attending.corpus.clean import fault, language_of, normalise
from attending.corpus.ledger import Ledger, Lines, read_lines, ticking, write_whole
from attending.corpus.recipe import CorpusConfig, DuplicateConfig
from attending.corpus.score import Scorer
from attending.corpus.split import is_held_out, repeats
from attending.overlap import Hashes, NgramIndex, minhash, ngrams
from attending.overlap import normalise as tokens_of

logger.disable("datatrove")  # it would print paths over our bar, and texts in its tracebacks

Documents = Iterator[Document]
TEXTS = ExactDedupConfig(lambda document: document.text, hash_config=HashConfig(64, "sha1"))
IDS = ExactDedupConfig(lambda document: document.id, hash_config=HashConfig(64, "sha1"))


@cache
def scorer(folder: Path) -> Scorer:
    """Loaded once a process, however many tasks it runs."""
    return Scorer(folder)


@cache
def test_questions(root: str, patterns: tuple[str, ...], n: int) -> NgramIndex:
    """The n-grams of every text of the evaluation sets; made once a process."""
    index = NgramIndex(n)
    for path in (path for pattern in patterns for path in read.glob(root, pattern)):
        for name, text in read.strings(path):
            index.add(name, text)
    return index


class Part(PipelineStep):
    """A step of ours: its name in the funnel, the draft of the corpus, the recipe."""

    type = "attending"

    def __init__(self, draft: Path, config: CorpusConfig) -> None:
        """Nothing is loaded before a task runs."""
        super().__init__()
        self.draft, self.work, self.config = draft, draft / "work", config


class Step(Part, ABC):
    """Changes a document, or gives the reason to remove it; a ledger accounts for both."""

    number: int  # of the document in the task

    def prepare(self, rank: int) -> None:
        """Load what the task needs."""

    @abstractmethod
    def apply(self, document: Document, ledger: Ledger) -> str:
        """The reason to remove the document; empty if it stays."""

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        with Ledger(self.draft, self.name, rank) as ledger:
            with ledger.clock():
                self.prepare(rank)
            for self.number, document in enumerate(data):
                with ledger.clock():
                    reason = self.apply(document, ledger)
                    if reason:
                        ledger.remove(document, reason)
                    else:
                        ledger.keep(document)
                if not reason:
                    yield document


class ReadRecords(Part):
    """The first step: a task's pieces of the sources, as documents."""

    name = "read"

    def __init__(self, draft: Path, config: CorpusConfig, plan: list[list[read.Piece]]) -> None:
        """The plan says what each task reads."""
        super().__init__(draft, config)
        self.plan = plan

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Documents:
        with Ledger(self.draft, self.name, rank) as ledger:
            records = ticking(self.work / "ticks" / "clean" / f"{rank:05d}.json", self._read(rank))
            while True:
                with ledger.clock():
                    piece, record = next(records, (None, None))
                    if piece is None or record is None:
                        return
                    document = self._document(piece, record, ledger)
                if document:
                    yield document

    def _read(self, rank: int) -> Iterator[tuple[tuple[read.Piece, read.Record], float]]:
        """Records, with the share of the task's bytes that are read."""
        total, done = sum(piece.stop - piece.start for piece in self.plan[rank]), 0
        for piece in self.plan[rank]:
            source, most = self.config.sources[piece.source], self.config.quality.max_bytes
            for record in read.records(self.config.root, piece, source, most):
                done += record.num_bytes
                yield (piece, record), min(1.0, done / max(total, 1))

    def _document(self, piece: read.Piece, record: read.Record, ledger: Ledger) -> Document | None:
        source, line = self.config.sources[piece.source], record.line + 1
        file = piece.path.encode(errors="backslashreplace").decode()  # a name may be any bytes
        told = {"source": piece.source, "domain": source.domain, "file": file, "line": line}
        fields = record.fields
        other = [k for k, wanted in source.only.items() if str(fields.get(k)) not in wanted]
        reason = record.fault or (f"other_{other[0]}" if other else "")
        if not reason:
            try:
                text, name, key = (
                    read.render(part, fields)
                    for part in (source.text, source.id, source.holdout_key)
                )
                name = name or f"{file}:{line}"
                told |= {"key": key or name, "raw": source.private}
                document = Document(text, name, [], told)
                ledger.keep(document)
                return document
            except UnicodeError:
                reason = "broken_utf8"
            except (LookupError, RecursionError):
                reason = "no_field"
        ledger.lose(told, reason, record.num_bytes)
        return None


class Clean(Step):
    """One normal form; too short, empty and wordless texts go."""

    name = "clean"

    def apply(self, document: Document, ledger: Ledger) -> str:
        document.text, unseen = normalise(document.text)
        ledger.note("unseen_characters", unseen)
        return fault(document.text, self.config.quality)


class Language(Step):
    """Only the languages that are wanted stay."""

    name = "language"

    def apply(self, document: Document, ledger: Ledger) -> str:
        wanted = self.config.quality.languages
        found = document.metadata["language"] = language_of(wanted)(document.text)
        return f"language_{found}" if wanted and found not in wanted else ""


class Score(Step):
    """Quality and medicine; a document whose source does not say gets its domain here."""

    name = "score"

    def __init__(self, draft: Path, config: CorpusConfig, folder: Path) -> None:
        """The folder holds the trained scores."""
        super().__init__(draft, config)
        self.folder = folder

    def apply(self, document: Document, ledger: Ledger) -> str:
        scores = scorer(self.folder).score(document.text)
        told = document.metadata
        told |= {name: round(value, 4) for name, value in scores.items()}
        told["domain"] = told["domain"] or ("medical" if scores["medical"] >= 0.5 else "general")
        return "low_quality" if scores["quality"] < self.config.quality.min_quality else ""


class Redact(Step):
    """Identifiers of persons out of private sources; if that fails, the run fails."""

    name = "phi"

    def apply(self, document: Document, ledger: Ledger) -> str:
        if document.metadata["raw"]:
            from attending.phi import redact

            document.text = redact(document.text, second_pass=True)
            ledger.note("redacted_documents")
        document.metadata["raw"] = False
        return ""


class Sign(Part):
    """Exact signatures of texts and of ids, for datatrove's `ExactFindDedups`."""

    name = "sign"

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        kinds = (("texts", TEXTS), ("ids", IDS))
        signers = [ExactDedupSignature(f"{self.work}/{k}/signatures", c) for k, c in kinds]
        found: list[list[Any]] = [[], []]
        for number, document in enumerate(data):
            for signer, hashes in zip(signers, found, strict=True):
                hashes += signer.get_hashes(document, number)
        for signer, hashes in zip(signers, found, strict=True):
            signer.save_hashes(rank, hashes)


class UniqueIds(Step):
    """An id that was seen before gets its place in its source behind it."""

    name = "ids"

    def prepare(self, rank: int) -> None:
        self.repeated = set(numbers(self.work, f"ids/found/*/{rank:05d}.c4_dup").tolist())

    def apply(self, document: Document, ledger: Ledger) -> str:
        if self.number in self.repeated:
            document.id += f"@{document.metadata['file']}:{document.metadata['line']}"
            ledger.note("repeated_ids")
        return ""


class DropExact(Step):
    """Of equal texts, the first stays."""

    name = "exact"

    def prepare(self, rank: int) -> None:
        self.copies = set(numbers(self.work, f"texts/found/*/{rank:05d}.c4_dup").tolist())

    def apply(self, document: Document, ledger: Ledger) -> str:
        return "exact_duplicate" if self.number in self.copies else ""


class NearSign(MinhashDedupSignature):
    """MinHash signatures for datatrove's buckets, of Han characters and words as `overlap` cuts."""

    name, type = "near", "attending"

    def __init__(self, folder: str, config: DuplicateConfig) -> None:
        """As datatrove's, without the word tokenizer that its own constructor wants."""
        PipelineStep.__init__(self)
        self.output_folder, self.config = get_datafolder(folder), minhash_config(config)
        self.skip_existing_sigs = False

    def get_shingles(self, text: str) -> Hashes:
        """Hashed n-grams."""
        return ngrams(tokens_of(text), self.config.n_grams)

    def get_signature(self, shingles: Hashes) -> list[list[int]]:
        """A list a band."""
        bands, rows = self.config.num_buckets, self.config.hashes_per_bucket
        found: list[list[int]] = minhash(shingles, bands * rows).reshape(bands, rows).tolist()
        return found


def minhash_config(config: DuplicateConfig) -> MinhashConfig:
    """The recipe's numbers in datatrove's record."""
    hashes = HashConfig(precision=32, hash_fc="sha1")
    return MinhashConfig(config.ngram, config.bands, config.rows, hash_config=hashes)


class CountFound(Part):
    """After clustering: how often each document was found, exact copies of all its near ones."""

    name = "found"

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        tasks = range(self.config.executor.tasks)
        found = [self._exact(task) for task in tasks]
        clusters = [self._pairs(f"near/clusters/{task:06d}.clusters") for task in tasks]
        total: Counter[int] = Counter()
        for own, pairs in zip(found, clusters, strict=True):
            for document, cluster in pairs:
                total[cluster] += own.get(document, 1)
        for task, (own, pairs) in enumerate(zip(found, clusters, strict=True)):
            own |= {document: total[cluster] for document, cluster in pairs}
            data_ = np.array(sorted(own.items()), "<u4").tobytes()
            write_whole(self.work / "found" / f"{task:05d}.u4", data_)

    def _exact(self, task: int) -> dict[int, int]:
        """Copies of each text with several, by its number among those that stayed."""
        gone = np.sort(numbers(self.work, f"texts/found/*/{task:05d}.c4_dup"))
        pairs = self._pairs(f"texts/found/*/{task:05d}.c4_counts")
        return {first - int(np.searchsorted(gone, first)): more + 1 for first, more in pairs}

    def _pairs(self, pattern: str) -> list[list[int]]:
        pairs: list[list[int]] = numbers(self.work, pattern).reshape(-1, 2).tolist()
        return pairs


class DropNear(Step):
    """Of similar texts, one stays."""

    name = "near"

    def prepare(self, rank: int) -> None:
        self.copies = set(numbers(self.work, f"near/clusters/{rank:06d}.remove").tolist())
        pairs = numbers(self.work, f"found/{rank:05d}.u4").reshape(-1, 2)
        self.found = {int(document): int(found) for document, found in pairs}

    def apply(self, document: Document, ledger: Ledger) -> str:
        document.metadata["found"] = self.found.get(self.number, 1)
        return "near_duplicate" if self.number in self.copies else ""


def numbers(folder: Path, pattern: str) -> NDArray[np.uint32]:
    """What datatrove's steps list in some files."""
    files = sorted(folder.glob(pattern))
    return np.concatenate([np.empty(0, "<u4"), *(np.fromfile(file, "<u4") for file in files)])


class Decontaminate(Step):
    """Documents that share a run of tokens with a test question go."""

    name = "decontaminate"

    def prepare(self, rank: int) -> None:
        told = self.config.decontamination
        self.index = test_questions(self.config.root, told.paths, told.ngram)

    def apply(self, document: Document, ledger: Ledger) -> str:
        found = self.index.overlap(document.text)
        if not found.ids:
            return ""
        document.metadata["questions"] = list(found.ids[:5])
        document.metadata["longest_run_tokens"] = found.longest_run
        return "test_question"


class Mix(Step):
    """Held out or trained on, and how often."""

    name = "mix"

    def apply(self, document: Document, ledger: Ledger) -> str:
        told, config = document.metadata, self.config
        told["is_held_out"] = is_held_out(told["key"])
        weight = config.sources[told["source"]].weight * config.weights.get(told["domain"], 1.0)
        most = config.duplicates.max_repeats
        times = repeats(told["found"], most, weight, document.id)
        told["times"] = 1 if told["is_held_out"] else times
        return "" if told["times"] else "weight"


class Write(Part):
    """Hand the documents to the next stage."""

    name = "write"

    def __init__(self, draft: Path, config: CorpusConfig, stage: str) -> None:
        """`stage` is the one that writes."""
        super().__init__(draft, config)
        self.stage = stage

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        lines = Lines(self.work / "documents" / self.stage / f"{rank:05d}.jsonl.gz", level=1)
        is_whole = False
        try:
            for document in data:
                row = {"id": document.id, "text": document.text, "metadata": document.metadata}
                lines.write(row)
                yield document
            is_whole = True
        finally:
            lines.close(is_whole=is_whole)


class Read(Part):
    """Take the documents of the stage before, task by task."""

    name = "documents"

    def __init__(self, draft: Path, config: CorpusConfig, stage: str, into: str) -> None:
        """`stage` is the one that wrote, `into` the one that reads."""
        super().__init__(draft, config)
        self.stage, self.into = stage, into

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Documents:
        lines = read_lines(self.work / "documents" / self.stage / f"{rank:05d}.jsonl.gz")
        for row in ticking(self.work / "ticks" / self.into / f"{rank:05d}.json", lines):
            yield Document(row["text"], row["id"], [], row["metadata"])
