"""llm-compressor's GPTQ: pip install llmcompressor."""

from pathlib import Path
from typing import Any

import datasets
import llmcompressor
import torch
from llmcompressor.modifiers.quantization import GPTQModifier
from measuring import main


def rounds(model: Any, samples: list[torch.Tensor], group: int) -> Any:
    rows = [one[0].tolist() for one in samples]
    told = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    llmcompressor.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict(told),
        recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
    )

    def save(out: Path) -> None:
        model.save_pretrained(out, save_compressed=True)

    return save


if __name__ == "__main__":
    main(rounds, f"llmcompressor {llmcompressor.__version__}")
