"""What a numeric path costs: perplexity and agreement beside float32, for `engine.py`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import attending
from attending.engine.native import pack
from attending.engine.native.runner import NativeOptions, NativeRunner
from attending.engine.runner import Span
from attending.model.architecture import PAGE_TOKENS

LOSS_TOKENS, WINDOW = 20_480, 512
NOTES = f"""
{LOSS_TOKENS:,} tokens of OpenStax prose in windows of {WINDOW}; the interval is over tokens. The
default's weights lie on a grid of 16 values a group, which asymmetric 8 bits hit exactly, so its
own row in 8 bits would say nothing: the same weights moved off that grid by up to half a step
stand for other models.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


class Dithered:
    """The default's weights moved off their grid by up to half a step: as any float model's."""

    def __init__(self, checkpoint: Any) -> None:
        self.arch, rng = checkpoint.arch, np.random.default_rng(0)
        self._weights: dict[str, Any] = {}
        for name in self.arch.tensor_shapes():
            values, stored = checkpoint.read(name), checkpoint.blocks(name)
            if stored is not None:
                step = np.repeat(stored.scale.astype(np.float32), 32, 1)
                values = values + (rng.random(values.shape, dtype=np.float32) - 0.5) * step
            self._weights[name] = values
        self.blocks: Callable[[str], None] = lambda name: None

    def read(self, name: str) -> Any:
        return self._weights[name]


def losses(data: Path, folder: Path) -> list[str]:
    """Perplexity and agreement of every numeric path beside float32, on one text."""
    import torch

    model = attending.load("default", dtype="float32")
    texts = [json.loads(row)["text"] for row in (data / "train/general_openstax.jsonl").open()]
    ids = np.array(model.tokenizer.encode("\n\n".join(texts[:400]))[:LOSS_TOKENS])
    ids = ids.reshape(-1, WINDOW)

    def read(logits: Callable[[Any], Any]) -> tuple[Any, Any]:
        nats, best = [], []
        for row in ids:
            scores = logits(row)
            wide = scores[:-1].astype(np.float64)
            peak = wide.max(-1, keepdims=True)
            whole = np.log(np.exp(wide - peak).sum(-1)) + peak[:, 0]
            nats.append(whole - wide[np.arange(WINDOW - 1), row[1:]])
            best.append(scores.argmax(-1))
        return np.array(nats), np.array(best)

    def by_torch(row: Any) -> Any:
        return model.logits([row.tolist()])[0].numpy()

    def row_of(
        title: str, weights: Any, form: str, options: dict[str, Any], base: Any
    ) -> list[str]:
        packed = pack.open_packed(weights, folder / f"{type(weights).__name__}-{form}", form)
        runner = NativeRunner(packed, [WINDOW // PAGE_TOKENS], NativeOptions(**options))
        pages = (np.arange(WINDOW // PAGE_TOKENS),)
        nats, best = read(lambda row: runner.step([Span(row, 0, pages, WINDOW)]))
        change = (nats - base[0]).ravel()
        spread = 1.96 * change.std() / len(change) ** 0.5
        low, middle, high = (100 * np.expm1(change.mean() + d) for d in (-spread, 0, spread))
        return [
            title,
            f"{np.exp(nats.mean()):.3f}",
            f"{middle:+.2f} % ({low:+.2f} to {high:+.2f})",
            f"{(best == base[1]).mean():.1%}",
        ]

    base = read(by_torch)
    stored, float32 = model._checkpoint, {"activations": "float32"}
    rows = [["float32, torch", f"{np.exp(base[0].mean()):.3f}", "", ""]]
    for title, form, options in (
        ("stored 4 bits exactly, float32 activations", "stored", float32),
        ("stored 4 bits exactly, 8-bit activations: the default", "stored", {}),
        ("the same, keys and values in 8 bits", "stored", {"kv": "int8"}),
        ("8 bits symmetric, float32 activations", "w8s", float32),
        ("8 bits, 8-bit activations", "w8", {}),
        ("4 bits in groups of 64, 8-bit activations", "w4-64", {}),
        ("4 bits in groups of 128, 8-bit activations", "w4-128", {}),
    ):
        rows.append(row_of(title, stored, form, options, base))
    dithered = Dithered(stored)
    state = {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in dithered._weights.items()}
    model.decoder.load_state_dict(state, strict=True, assign=True)
    moved = read(by_torch)
    rows.append(["float32, weights moved off their grid", f"{np.exp(moved[0].mean()):.3f}", "", ""])
    for title, form in (("8 bits", "w8"), ("8 bits symmetric", "w8s")):
        rows.append(
            row_of(f"of these: {title}, float32 activations", dithered, form, float32, moved)
        )
    return table(["path", "perplexity", "beside its float32", "same likeliest token"], rows)
