"""A corpus of a few kilobytes, its tokenizer, and recipes of models that train in a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from attending.chat import Tokenizer as ChatTokenizer
from attending.model.architecture import parse_config
from attending.model.decoder import Decoder
from attending.model.weights import save_model
from attending.pretrain.recipe import PretrainConfig
from attending.shards import Shards, ShardWriter, write_index
from attending.train.watch import Notes, Progress

DOMAINS = ("general", "medical")
SENTENCES = {
    "general": "the river runs past a mill where two and two are four",
    "medical": "aspirin may cause bleeding and asthma is treated with inhaled steroids",
}
M1 = {
    "model_type": "baichuan_m1",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 4,
    "num_swa_key_value_heads": 2,
    "sliding_window": 8,
    "sliding_window_layers": [1, 3],
    "max_position_embeddings": 64,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def make_tokenizer(folder: Path) -> Path:
    """One token a byte, `<s>` before a text, `</s>` after a document."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({name: i + 2 for i, name in enumerate(names)}, []))
    plain.add_special_tokens(["<s>", "</s>"])
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    begin = plain.token_to_id("<s>")
    plain.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", begin)])
    folder.mkdir(parents=True)
    plain.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def make_corpus(folder: Path, tokenizer: Path, *, documents: int = 200) -> Path:
    """Sentences of few words, so that a small model can learn them."""
    encoder = ChatTokenizer.from_folder(tokenizer)
    end = encoder.control_id("</s>")
    random = np.random.default_rng(0)
    facts = {
        "end_of_text": end,
        "begin_of_text": encoder.control_id("<s>"),
        "tokenizer_sha256": encoder.sha256,
        "sources": ["made", "sums"],
        "domains": list(DOMAINS),
    }
    for part, count in (("train", documents), ("heldout/general", 4), ("heldout/medical", 4)):
        only = part.partition("/")[2]
        with ShardWriter(folder / part, tokens_per_shard=4000) as writer:
            for number in range(count):
                domain = only or DOMAINS[number % 2]
                text = " ".join(
                    random.choice(SENTENCES[domain].split(), size=random.integers(1, 20))
                )
                ids = np.array([*encoder.encode(text), end], np.uint32)
                is_sum = domain == "general" and number % 4 == 0
                writer.add(ids, len(text.encode()), int(is_sum), DOMAINS.index(domain))
        write_index(folder / part, writer.shards, **facts)
    return folder


CHATML = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_model(folder: Path, tokenizer: Path, model: dict[str, Any] | None = None) -> Path:
    """A model folder with weights that were drawn."""
    arch = parse_config({**(model or LLAMA), "bos_token_id": 0, "eos_token_id": 1})
    decoder = Decoder(arch)
    decoder.init_weights(torch.Generator().manual_seed(1))
    folder.mkdir(parents=True)
    weights = {name: weight.detach() for name, weight in decoder.named_parameters()}
    save_model(folder, arch, weights, ChatTokenizer.from_folder(tokenizer), {})
    return folder


def recipe(corpus: Path, tokenizer: Path, /, **changes: Any) -> PretrainConfig:
    """Three stages of a few steps."""
    mixed = {"general": 0.5, "medical": 0.5}
    stage = {"tokens": 640, "context": 32, "rope_theta": 1e4, "mixture": mixed}
    values: dict[str, Any] = {
        "corpus": str(corpus),
        "tokenizer": str(tokenizer),
        "model": M1,
        "stages": [
            {**stage, "name": "general", "mixture": {"general": 0.8, "medical": 0.2}},
            {**stage, "name": "medical"},
            {**stage, "name": "annealing", "context": 64, "rope_theta": 1e5, "schedule": "cosine"},
        ],
        "batch": {"tokens": 128, "micro_tokens": 64},
        "optimizer": {"peak": 1e-2, "final": 1e-3, "warmup_tokens": 256},
        "state": {"every_tokens": 512},
        "heldout": {"every_tokens": 640, "max_tokens": 200},
    }
    return PretrainConfig.build({**values, **changes})


class HaltedError(Exception):
    """As if the process had been killed there."""


def halt_at(step: int) -> Callable[[Progress | Notes], None]:
    """To be shown progress; halts within a step, after its update and before its state."""

    def show(told: Progress | Notes) -> None:
        if isinstance(told, Progress) and told.step == step:
            raise HaltedError

    return show


def column(shards: Shards, field: str) -> NDArray[Any]:
    """A field of every document's record."""
    return np.array([shards.record(number)[field] for number in range(shards.num_documents)])
