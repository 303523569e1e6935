"""auto-round by its light recipe (50 steps at rate 0.005) or its own (200 at 1 / 200).

pip install auto-round; the steps are the last word of the command.
"""

import sys
from pathlib import Path
from typing import Any

import auto_round
import torch
import transformers
from measuring import main


def rounds(model: Any, samples: list[torch.Tensor], group: int) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    steps = int(sys.argv[5])
    tokenizer.pad_token = None  # it is what ends answers here, which would be left out
    told = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples]
    rounding = auto_round.AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=group,
        sym=True,
        iters=steps,
        lr=5e-3 if steps == 50 else None,
        nsamples=len(samples),
        batch_size=8,
        seqlen=samples[0].shape[1],
        dataset=told,
        amp=False,
        device_map="cpu",
    )
    rounding.quantize()

    def save(out: Path) -> None:
        rounding.save_quantized(str(out), format="auto_gptq")

    return save


if __name__ == "__main__":
    main(rounds, f"auto-round {auto_round.__version__}")
