"""Trains the embedded judge's adapter and head, and measures it: `attending judge`.

K-QA is split by question into 101 to train, 40 to choose the calibration and the threshold, and 60
to report. A killed run goes on from its last state and gives the same weights, bit for bit.
"""

import logging
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from attending import artifact
from attending.mesh import multiplies_bfloat16
from attending.sources import Progress
from attending.verifier.judge import embedded, pairs
from attending.verifier.judge.encoder import Bert, Weights
from attending.verifier.judge.pairs import Pair
from attending.verifier.judge.recipe import JudgeConfig

LEARNT = {"both": r".*\.", "text": r"(?!head\.f).*\.", "measures": r"head\.[fb]"}  # by name
SAVE_SECONDS, WARM_UP, DRAWS = 120, 0.05, 1000
KINDS = ("plain", "elsewhere", "negated", "removed", "contradicted", "sibling")
Values = NDArray[np.float64]
logger = logging.getLogger(__name__)


def run(
    config: JudgeConfig,
    bert: Bert,
    files: tuple[Path, Path],
    out: Path,
    progress: Progress,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train, calibrate, report; publish `judge.safetensors`, `report.json` and `run.json`.

    Args:
        files: K-QA's .jsonl, and MedQuAD's.
    """
    parents = [{"uri": path.name, "sha256": artifact.digest(path)} for path in files]
    record = artifact.Record("judge", config.model_dump(mode="json"), config.seed, parents)
    rows, rng = pairs.read_kqa(files[0]), random.Random(config.seed)
    documents = pairs.read_rows(files[1], "focus", "synonyms", "answer")
    state = out.with_name(f"{out.name}.state.safetensors")
    with artifact.publish(out) as draft:
        cases = [*pairs.kqa_cases(rows, "train", config.kqa_weight, documents, rng)]
        cases += pairs.medquad_cases(documents, rows, config.documents, rng)
        progress(0, None, f"embedding the answers of {len(cases):,} statements")
        made = pairs.construct(bert, cases, rng)
        weights = fit(config, bert, made, progress, state, resume=resume)
        tune = pairs.construct(bert, pairs.kqa_cases(rows, "tune"), random.Random(0))
        calibrate(bert, weights, tune)
        small = {k: v.half() if k.endswith((".down", ".up")) else v for k, v in weights.items()}
        save_file(small, draft / "judge.safetensors")
        result = report(bert, embedded.load_weights(draft, bert), files[0])  # as it was rounded
        artifact.write_json(draft / "report.json", result)
        metrics = {"judge/macro_f1": result["embedded"]["macro-F1"][0]}
        metrics |= Counter(f"judge/{pair.kind}_pairs" for pair in made)
        artifact.write_run(draft, record, metrics)
    state.unlink(missing_ok=True)
    return result


def fit(
    config: JudgeConfig,
    bert: Bert,
    made: Sequence[Pair],
    progress: Progress,
    state: Path,
    *,
    resume: bool = False,
) -> dict[str, Tensor]:
    """Adam on the weighted cross-entropy; `state` is written every two minutes."""
    found = embedded.gather(bert, [pair[:2] for pair in made])
    weights = start(config, bert)
    trained = [v.requires_grad_() for k, v in weights.items() if re.match(LEARNT[config.reads], k)]
    optimizer = torch.optim.Adam(trained, config.rate, betas=(0.9, 0.98))
    batches = _batches([len(one.criterion) + len(one.text) for one in found], config)
    first = _load(state, trained, optimizer) if resume and state.is_file() else 0
    began = saved = time.monotonic()
    half = torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16())
    for step, at in enumerate(batches[first:], first):
        share = (step + 1) / len(batches)
        optimizer.param_groups[0]["lr"] = config.rate * min(share / WARM_UP, 1.001 - share)
        met, weight = torch.tensor([(float(made[i].met), made[i].weight) for i in at]).T
        with half:
            logits = embedded.logits(bert, weights, [found[i] for i in at])
        loss = functional.binary_cross_entropy_with_logits(logits.float(), met, weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        logger.debug("step %d of %d: loss %.4f", step + 1, len(batches), float(loss.detach()))
        if step == first + 9:
            hours = (time.monotonic() - began) / 10 * len(batches[step:]) / 3600
            progress(0, None, f"{config.epochs} x {len(made):,} pairs: {hours:.2f} hours to go")
        progress(step + 1, len(batches), "training")
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(state, step + 1, trained, optimizer)
            saved = time.monotonic()
    return {name: value.detach() for name, value in weights.items()}


def start(config: JudgeConfig, bert: Bert) -> dict[str, Tensor]:
    """An adapter that changes nothing yet, and a head that reads little."""
    rng, weights = torch.Generator().manual_seed(config.seed), dict[str, Tensor]()
    for name, shape in embedded.shapes(bert, config.rank).items():
        is_drawn = name.endswith(".down") or (name == "head.hidden" and config.reads != "measures")
        scale = (0.1 if name == "head.hidden" else 1.0) / math.sqrt(shape[-1]) if is_drawn else 0.0
        weights[name] = torch.zeros(shape).normal_(0, 1, generator=rng) * scale
    return weights | {"platt": torch.tensor([1.0, 0.0]), "threshold": torch.tensor(0.5)}


def calibrate(bert: Bert, weights: dict[str, Tensor], tune: Sequence[Pair]) -> None:
    """Fit Platt's slope and shift on the tune part, and choose the threshold there."""
    chance, met, _ = measure(bert, weights, tune)
    weights["platt"] = torch.tensor(platt(np.log(chance / (1 - chance)), met))
    weights["threshold"] = torch.tensor(best_threshold(measure(bert, weights, tune)[0], met))


def measure(bert: Bert, weights: Weights, made: Sequence[Pair]) -> tuple[Values, Values, Values]:
    """Of each pair the probability, the label, and the cosine and shared words [pairs, 2]."""
    found = embedded.gather(bert, [pair[:2] for pair in made])
    chance = embedded.probabilities(bert, weights, found).double().clamp(1e-6, 1 - 1e-6).numpy()
    met = np.array([pair.met for pair in made], np.float64)
    return chance, met, np.array([(one.features[0], one.shared) for one in found])


def platt(logits: Values, met: Values) -> tuple[float, float]:
    """The slope and shift whose sigmoid gives the labels the greatest likelihood."""

    def loss(at: Values) -> float:
        z = at[0] * logits + at[1]
        return float((np.logaddexp(0, z) - met * z).mean())

    slope, shift = minimize(loss, [1.0, 0.0], method="Nelder-Mead").x
    return float(slope), float(shift)


def best_threshold(values: Values, met: Values) -> float:
    """The one of 200 quantiles with the greatest macro-F1."""
    ones = np.ones(len(met))
    tried = np.unique(np.quantile(values, np.linspace(0, 1, 200)))
    return float(max(tried, key=lambda t: macro_f1(values >= t, met, ones)))


def macro_f1(said: NDArray[np.bool_], met: Values, weight: Values) -> float:
    """The mean of the F1 of met and the F1 of not met."""
    hits = [weight[(said == one) & (met == one)].sum() for one in (True, False)]
    sizes = [weight[said == one].sum() + weight[met == one].sum() for one in (True, False)]
    return float(
        np.mean([2 * hit / max(1e-9, size) for hit, size in zip(hits, sizes, strict=True)])
    )


def calibration_error(chance: Values, met: Values, weight: Values, bins: int = 10) -> float:
    """ECE: the gap between mean probability and share of met in each of ten equal bins."""
    place = np.minimum((chance * bins).astype(int), bins - 1)
    gap = np.bincount(place, weight * (chance - met), bins)
    return float(np.abs(gap).sum() / weight.sum())


def report(bert: Bert, weights: Weights, kqa: Path) -> dict[str, Any]:
    """Agreement with the constructed labels of the 60 report questions, beside two baselines.

    Each figure stands with its 95 % interval, bootstrapped over the questions.
    """
    rows = pairs.read_kqa(kqa)
    tune, made = (
        pairs.construct(bert, pairs.kqa_cases(rows, part), random.Random(0))
        for part in ("tune", "report")
    )
    _, tune_met, tuned = measure(bert, weights, tune)
    chance, met, features = measure(bert, weights, made)
    said = {"embedded": chance >= float(weights["threshold"])}
    for at, name in enumerate(("cosine", "word overlap")):
        said[name] = features[:, at] >= best_threshold(tuned[:, at], tune_met)
    is_kind = {kind: np.array([pair.kind == kind for pair in made]) for kind in KINDS}
    clusters = np.unique([pair.cluster for pair in made], return_inverse=True)[1]

    def figures(name: str, weight: Values) -> list[float]:
        found = [macro_f1(said[name], met, weight)]
        for its in is_kind.values():
            right = weight[its & (said[name] == met)].sum()
            found.append(right / max(1e-9, weight[its].sum()))
        brier = float((weight * (chance - met) ** 2).sum() / weight.sum())
        ours = [calibration_error(chance, met, weight), brier]  # the others give no probability
        return [*found, *(ours if name == "embedded" else ())]

    names = ("macro-F1", *(f"accuracy: {kind}" for kind in KINDS), "ECE", "Brier")
    counts = {kind: int(its.sum()) for kind, its in is_kind.items()}
    result = {"labels": "constructed", "questions": int(clusters.max()) + 1, "pairs": counts}
    for name in said:
        judged = partial(figures, name)
        table = np.stack([judged(np.ones(len(met))), *interval(judged, clusters)]).round(4)
        result[name] = dict(zip(names, table.T.tolist(), strict=False))
    return result


def interval(
    figures: Callable[[Values], list[float]], clusters: NDArray[np.int64], draws: int = DRAWS
) -> Values:
    """The 2.5 and 97.5 percentiles [2, figures] over draws of whole clusters, with replacement."""
    rng, count = np.random.default_rng(0), int(clusters.max()) + 1
    drawn = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(draws))
    rows = [figures(one[clusters].astype(np.float64)) for one in drawn]
    return np.percentile(rows, [2.5, 97.5], axis=0)


def _batches(lengths: Sequence[int], config: JudgeConfig) -> list[list[int]]:
    """Every epoch in another order; neighbours in a stretch are of like length, to pad little."""
    rng, found = random.Random(config.seed), []
    for _ in range(config.epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        for at in range(0, len(order), 16 * config.batch):
            stretch = sorted(order[at : at + 16 * config.batch], key=lengths.__getitem__)
            some = [stretch[i : i + config.batch] for i in range(0, len(stretch), config.batch)]
            found += rng.sample(some, len(some))
    return found


def _save(state: Path, step: int, trained: Sequence[Tensor], optimizer: torch.optim.Adam) -> None:
    values = {f"{i}.weight": value.detach() for i, value in enumerate(trained)}
    for i, slots in optimizer.state_dict()["state"].items():
        values |= {f"{i}.{name}": value for name, value in slots.items()}
    draft = state.with_name(f"{state.name}.tmp")
    values = {name: value.contiguous() for name, value in values.items()}
    save_file(values, draft, {"step": str(step)})
    draft.replace(state)


def _load(state: Path, trained: Sequence[Tensor], optimizer: torch.optim.Adam) -> int:
    whole = optimizer.state_dict()
    with safe_open(state, "pt") as file:
        for i, value in enumerate(trained):
            value.data.copy_(file.get_tensor(f"{i}.weight"))
            slots = ("step", "exp_avg", "exp_avg_sq")
            whole["state"][i] = {name: file.get_tensor(f"{i}.{name}") for name in slots}
        optimizer.load_state_dict(whole)
        return int(file.metadata()["step"])
