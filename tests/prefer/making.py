"""A chat model of two small layers, rows of preferences, recipes that train in a second."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from attending.chat import Tokenizer
from attending.model.architecture import parse_config
from attending.model.decoder import Decoder
from attending.model.weights import save_model
from attending.prefer.recipe import PreferConfig
from tests.train.making import LLAMA, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
OPTIMIZER = {"peak": 5e-3, "final": 5e-4, "warmup_tokens": 0, "skip_window": 0}


def make_model(folder: Path, **changes: Any) -> Path:
    """Random weights and one token a byte."""
    make_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text("utf-8")) | {"chat_template": TEMPLATE}
    file.write_text(json.dumps(told), "utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    ends = {"bos_token_id": 258, "eos_token_id": tokenizer.control_id("</s>")}
    arch = parse_config({**LLAMA, "max_position_embeddings": 128, **ends, **changes})
    decoder = Decoder(arch)
    decoder.init_weights(torch.Generator().manual_seed(0))
    save_model(folder, arch, dict(decoder.named_parameters()), tokenizer, {})
    return folder


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def make_pairs(file: Path) -> Path:
    """Whatever is asked, "yes" is better than "no"."""
    return write(file, ({"prompt": ask(q), "chosen": "yes", "rejected": "no"} for q in "abcdefgh"))


def recipe(model: Path, data: Path, method: str, /, **changes: Any) -> PreferConfig:
    values: dict[str, Any] = {
        "method": method,
        "model": str(model),
        "data": str(data),
        "steps": 8,
        "batch": {"units": 4, "max_tokens": 40, "micro_tokens": 160},
        "optimizer": OPTIMIZER,
        "state": {"every_tokens": 1},
        "heldout": {"every_tokens": 100_000},
    }
    return PreferConfig.build({**values, **changes})
