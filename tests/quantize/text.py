"""Calibration text of made-up words, recipes over it, and a model that has a chat template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attending.config import override
from attending.quantize.recipe import QuantizeConfig

M1: dict[str, Any] = {
    "model_type": "baichuan_m1",
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 8,
    "num_swa_key_value_heads": 4,
    "sliding_window": 8,
    "sliding_window_layers": [1],
}
WORDS = (
    "fever",
    "cough",
    "pain",
    "heart",
    "lung",
    "rest",
    "water",
    "salt",
    "sleep",
    "walk",
    "foot",
)


def rows(count: int) -> Iterator[dict[str, str]]:
    """Each another one."""
    for number in range(count):
        words = [WORDS[(number * k + k // 3 + number // 12) % len(WORDS)] for k in range(1, 9)]
        yield {"id": f"r{number}", "q": f"{number} {words[0]}?", "a": " ".join(words)}


def write_text(folder: Path, count: int = 600) -> Path:
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(row) + "\n" for row in rows(count))
    (folder / "notes.jsonl").write_text("".join(lines), "utf-8")
    return folder


def recipe(model: Path, root: Path, *pairs: str, **changes: Any) -> QuantizeConfig:
    """Four bits in groups of 32, plain; `pairs` as `--set` has them."""
    part = {"path": "notes.jsonl", "id": "{id}"}
    values: dict[str, Any] = {
        "model": str(model),
        "method": "plain",
        "group": 32,
        "batch": 3,
        "calibration": {
            "root": str(root),
            "samples": 8,
            "evaluation": 2,
            "length": 24,
            "sampling": {"max_tokens": 6},
            "parts": {
                "notes": part | {"text": "{a}"},
                "talks": part | {"prompt": "{q}", "text": "{a}"},
            },
        },
    }
    return QuantizeConfig.build(override(values | changes, pairs))
