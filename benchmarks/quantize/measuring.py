"""What every peer runs, in its own environment: the same model, samples and clock.

    python benchmarks/quantize/run_PEER.py MODEL_FOLDER SAMPLES.safetensors GROUP OUT

Rounds the linear layers of the blocks to 4 bits, symmetric where the peer can, and writes OUT, a
folder that `attending` reads: quantised, or floats that were rounded. Then prints one line of JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

Rounds = Callable[[Any, list[torch.Tensor], int], Callable[[Path], None]]
"""Model, samples of one row each, group -> what writes the folder."""


def main(rounds: Rounds, version: str) -> None:
    """Only rounding is in the clock; memory is watched from outside."""
    folder, samples, group, out = (
        Path(sys.argv[1]),
        sys.argv[2],
        int(sys.argv[3]),
        Path(sys.argv[4]),
    )
    torch.manual_seed(0)
    ids = torch.cat([v for k, v in sorted(load_file(samples).items()) if k.startswith("calib")])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    began = time.monotonic()
    save = rounds(model, list(ids.split(1)), group)
    seconds = time.monotonic() - began
    save(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file() and not (out / name).is_file():
            (out / name).write_bytes((folder / name).read_bytes())
    print(json.dumps({"seconds": seconds, "version": version}), flush=True)
