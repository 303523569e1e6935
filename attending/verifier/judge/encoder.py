"""MiniLM, a BERT encoder (arXiv 1810.04805, 2002.10957), as a function of its weights.

Equal to transformers' BertModel without dropout. An adapter (LoRA, arXiv 2106.09685) adds a
low-rank product to linear layers: the base stays as it is, and only the adapter is shipped.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from attending.errors import CheckpointError

Weights = Mapping[str, Tensor]  # of an adapter: LINEAR.down [rank, in] and LINEAR.up [out, rank]
INPUTS = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
MIXED, WIDE, NARROW = "attention.output.dense", "intermediate.dense", "output.dense"
TEXTS, LONGEST = 64, 80  # embedded at a time; tokens of a text or of a pair


class Bert(NamedTuple):
    """A folder's weights, by the names they have there, its config.json and its tokenizer."""

    weights: Weights
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    known: dict[str, Tensor]  # embeddings of texts that came before

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The layers that an adapter may change, and the shapes [out, in] they must have."""
        width, wide = self.config["hidden_size"], self.config["intermediate_size"]
        shapes = dict.fromkeys((*INPUTS, MIXED), (width, width))
        shapes |= {WIDE: (wide, width), NARROW: (width, wide)}
        layers = range(self.config["num_hidden_layers"])
        return {
            f"encoder.layer.{i}.{name}": shape for i in layers for name, shape in shapes.items()
        }


def load_bert(folder: Path) -> Bert:
    """Read a folder of config.json, model.safetensors and tokenizer.json.

    Raises:
        CheckpointError: A file is absent or damaged, or a weight is not of the shape it must have.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(LONGEST, strategy="longest_first")
        bert = Bert(load_file(folder / "model.safetensors"), config, tokenizer, {})
        if (config["model_type"], config["hidden_act"]) != ("bert", "gelu"):
            raise ValueError("its config.json is not one of a BERT with gelu")
        for name, shape in bert.linears.items():
            if bert.weights[f"{name}.weight"].shape != shape:
                raise ValueError(f"{name} is not {shape}")
    except Exception as error:  # what tokenizers raises has no other name
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder.name} is no whole BERT ({why}); pull it again.") from error
    return bert


def encode(bert: Bert, tokens: Tensor, adapter: Weights) -> Tensor:
    """Hidden states [batch, tokens, width] of what `tokenise` gives."""
    weights, (ids, segments, mask) = bert.weights, tokens
    heads, epsilon = bert.config["num_attention_heads"], bert.config["layer_norm_eps"]

    def norm(name: str, x: Tensor) -> Tensor:
        scale, shift = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
        return functional.layer_norm(x, scale.shape, scale, shift, epsilon)

    def linear(name: str, x: Tensor) -> Tensor:
        y = functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        if f"{name}.down" in adapter:
            y = y + (x @ adapter[f"{name}.down"].T) @ adapter[f"{name}.up"].T
        return y

    parts = {"word": ids, "position": torch.arange(ids.shape[1]), "token_type": segments}
    found = (weights[f"embeddings.{name}_embeddings.weight"][at] for name, at in parts.items())
    x = norm("embeddings", sum(found, torch.zeros(())))
    for at in (f"encoder.layer.{i}." for i in range(bert.config["num_hidden_layers"])):
        split = [linear(at + name, x).reshape(*ids.shape, heads, -1) for name in INPUTS]
        q, k, v = (part.transpose(1, 2) for part in split)
        mixed = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].bool())
        x = norm(f"{at}attention.output", x + linear(at + MIXED, mixed.transpose(1, 2).flatten(2)))
        x = norm(f"{at}output", x + linear(at + NARROW, functional.gelu(linear(at + WIDE, x))))
    return x


def tokenise(bert: Bert, texts: Sequence[str | tuple[str, str]]) -> Tensor:
    """Ids, segments and mask [3, texts, tokens], padded; of a pair the longer text is cut first."""
    rows = bert.tokenizer.encode_batch(list(texts))
    tokens = torch.zeros(3, len(rows), max(len(row.ids) for row in rows), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[:, i, : len(row.ids)] = torch.tensor([row.ids, row.type_ids, row.attention_mask])
    return tokens


@torch.no_grad()
def embed(bert: Bert, texts: Iterable[str]) -> dict[str, Tensor]:
    """Unit vectors [width]: hidden states' means, as all-MiniLM-L6-v2 was trained for."""
    new = sorted({*texts} - bert.known.keys(), key=lambda text: (len(text), text))  # little padding
    for start in range(0, len(new), TEXTS):
        some = new[start : start + TEXTS]
        tokens = tokenise(bert, some)
        total = (encode(bert, tokens, {}) * tokens[2][..., None]).sum(1)
        bert.known.update(zip(some, functional.normalize(total, dim=-1), strict=True))
    return bert.known
