"""A whole small chat model in a folder: weights, tokenizer, template."""

import json
from pathlib import Path
from typing import Any

from attending.model.weights import save_weights
from tests.hallway.test_chat import CHATML, RAW
from tests.model.tiny import build

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": RAW.get_vocab_size(),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write_model(folder: Path, template: str | None = CHATML, **config: Any) -> Path:
    """The same weights at every call."""
    folder.mkdir()
    decoder = build(CONFIG | config)
    save_weights(decoder.state_dict(), folder)
    (folder / "config.json").write_text(json.dumps(decoder.arch.to_config()))
    RAW.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
