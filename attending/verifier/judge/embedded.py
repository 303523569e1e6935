"""The judge that needs no endpoint: MiniLM with a trained adapter and head, on the CPU.

An answer's sentences nearest to the criterion (MiniLM's cosine plus shared words) are its evidence;
criterion and evidence are read together, and a calibrated probability decides. It was trained on
constructed labels (`training.py`): how well it agrees with those is all that is known about it.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from attending import sources
from attending.errors import CheckpointError, UsageError
from attending.overlap import HAN
from attending.verifier.contradict import NEGATED
from attending.verifier.judge.encoder import Bert, Weights, embed, encode, load_bert, tokenise
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.reference import statement_of
from attending.verifier.rubric.schema import Rubric

SHIPPED = Path(str(resources.files("attending.verifier.judge") / "weights"))
SENTENCE = re.compile(
    r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+|(?<=[。！？；])|\n+|\s-\s|^\s*[-*•]\s*", re.M
)
WORD = re.compile(r"[a-z]{4,}|\d+(?:\.\d+)?|[\u4e00-\u9fff]")
STEM = 6  # letters that decide whether two words are the same
KEPT, BATCH = 2, 32  # sentences of evidence, pairs at a time
FEATURES = ("cosine", "next cosine", "one is negated", "lost numbers")
FOREIGN = Verdict(None, "The embedded judge reads English only.")
NOTHING = Verdict(False, "The answer has no sentence.")
CAUTION = (
    "Embedded judge: agreement with constructed labels, macro-F1 {:.2f} ({:.2f} to {:.2f}), not "
    "with physicians; it misses what an answer says in quite other words, knows English only, and "
    "a criterion that is an instruction ('Advises ...', 'Does not mention ...') is outside what it "
    "was trained on."
)


class Evidence(NamedTuple):
    """What an answer says about a criterion."""

    criterion: str
    quote: str  # the nearest sentence
    text: str  # the few nearest, in the answer's order
    shared: float  # of the criterion's words, in the nearest
    features: tuple[float, ...]


class EmbeddedJudge:
    """Of English statements of fact; a negative criterion is met where its statement is there.

    Args:
        bert: The base; by default the catalogue's `judge`, from the cache.
        folder: Holds `judge.safetensors` and `report.json`, as `attending judge train` writes them.

    Raises:
        SourceError: The base was not pulled yet.
        CheckpointError: The folder's weights are damaged or of another base.
    """

    name = "embedded"
    endpoints = ()

    def __init__(self, bert: Bert | None = None, folder: Path = SHIPPED) -> None:
        self.bert = bert or load_bert(sources.resolve("judge").path)
        self.weights = load_weights(folder, self.bert)
        report = json.loads((folder / "report.json").read_text("utf-8"))
        self.caution = CAUTION.format(*report["embedded"]["macro-F1"])

    async def __call__(self, rubric: Rubric, answer: str) -> list[Verdict]:
        """A verdict for each criterion, with the sentence it rests on and the probability."""
        pairs = [(statement_of(criterion.text), answer) for criterion in rubric.criteria]
        if any(re.search(f"[{HAN}]", text) for pair in pairs for text in pair):
            return [FOREIGN] * len(pairs)
        return await asyncio.to_thread(self.judge, pairs)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """A verdict for each criterion and answer; UsageError for a criterion without text."""
        if not all(criterion.strip() for criterion, _ in pairs):
            raise UsageError("a criterion without text cannot be judged: say what must be there.")
        bert = self.bert._replace(known={})  # nothing of a patient's is kept
        parts = [(criterion, sentences(answer)) for criterion, answer in pairs]
        found = gather(bert, [pair for pair in parts if pair[1]])
        chances = probabilities(bert, self.weights, found).tolist()
        made = zip(found, chances, strict=True)
        return [self._verdict(*next(made)) if own else NOTHING for _, own in parts]

    def _verdict(self, found: Evidence, chance: float) -> Verdict:
        told = f"{found.quote!r}: met with probability {chance:.2f}."
        return Verdict(chance >= float(self.weights["threshold"]), told)


def sentences(text: str) -> list[str]:
    """A text's sentences and list items; what has no letter is none."""
    parts = (part.strip() for part in SENTENCE.split(text))
    return [part for part in parts if re.search(r"[^\W\d_]", part)]


def gather(bert: Bert, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[Evidence]:
    """For each criterion the evidence in its answer's sentences, of which there is at least one."""
    known = embed(bert, (text for criterion, parts in pairs for text in (criterion, *parts)))
    return [nearest(criterion, parts, known) for criterion, parts in pairs]


def nearness(criterion: str, parts: Sequence[str], known: Weights) -> list[tuple[float, float]]:
    """Of each sentence: cosine to the criterion, and share of the criterion's words."""
    wanted = words(criterion)
    cosine = torch.stack([known[part] for part in parts]) @ known[criterion]
    shared = (len(wanted & words(part)) / max(1, len(wanted)) for part in parts)
    return list(zip(cosine.tolist(), shared, strict=True))


def nearest(criterion: str, parts: Sequence[str], known: Weights) -> Evidence:
    """The few with the greatest sum of both, and what is measured on them."""
    near, wanted = nearness(criterion, parts, known), words(criterion)
    order = sorted(range(len(parts)), key=lambda i: -sum(near[i]))
    best, text = parts[order[0]], " ".join(parts[i] for i in sorted(order[:KEPT]))
    numbers = {word for word in wanted if word[0].isdigit()}
    is_negated = [len(NEGATED.findall(one)) % 2 for one in (criterion, best)]
    features = (
        near[order[0]][0],
        near[order[1]][0] if order[1:] else 0.0,
        float(is_negated[0] != is_negated[1]),
        len(numbers - words(text)) / max(1, len(numbers)),
    )
    return Evidence(criterion, best, text, near[order[0]][1], features)


def words(text: str) -> set[str]:
    """Stems of the longer words, numbers and Han characters."""
    return {word[:STEM] for word in WORD.findall(text.lower())}


def logits(bert: Bert, weights: Weights, found: Sequence[Evidence]) -> Tensor:
    """One for each evidence, [pairs]; gradients reach the adapter and the head."""
    tokens = tokenise(bert, [(one.criterion, one.text) for one in found])
    seen = torch.tensor([one.features for one in found]) @ weights["head.features"]
    hidden = encode(bert, tokens, weights)[:, 0]
    return hidden @ weights["head.hidden"] + seen + weights["head.bias"]


@torch.no_grad()
def probabilities(bert: Bert, weights: Weights, found: Sequence[Evidence]) -> Tensor:
    """Calibrated (Platt): sigmoid(slope * logit + shift), [pairs]."""
    order = sorted(range(len(found)), key=lambda i: len(found[i].criterion) + len(found[i].text))
    values = torch.empty(len(found))
    for at in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
        values[at] = logits(bert, weights, [found[i] for i in at])
    return torch.sigmoid(weights["platt"][0] * values + weights["platt"][1])


def load_weights(folder: Path, bert: Bert) -> dict[str, Tensor]:
    """Read `judge.safetensors` in float32; CheckpointError unless it fits the base exactly."""
    try:
        weights = {k: v.float() for k, v in load_file(folder / "judge.safetensors").items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"no judge in {folder.name} ({error}): train it again.") from None
    found = {name: tuple(value.shape) for name, value in weights.items()}
    rank = max((shape[0] for name, shape in found.items() if name.endswith(".down")), default=0)
    if wrong := found.items() ^ shapes(bert, rank).items():
        raise CheckpointError(
            f"judge.safetensors does not fit its base: {min(name for name, _ in wrong)} is "
            "missing, left over or of a wrong shape. Train it on this base."
        )
    return weights


def shapes(bert: Bert, rank: int) -> dict[str, tuple[int, ...]]:
    """Of all that is trained or fitted."""
    found: dict[str, tuple[int, ...]] = {"platt": (2,), "threshold": (), "head.bias": ()}
    found |= {"head.hidden": (bert.config["hidden_size"],), "head.features": (len(FEATURES),)}
    for name, (rows, columns) in bert.linears.items():
        found |= {f"{name}.down": (rank, columns), f"{name}.up": (rows, rank)}
    return found
