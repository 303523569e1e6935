"""HQQ: pip install hqq. It reads no calibration text and is asymmetric, with zeros of any value."""

from pathlib import Path
from typing import Any

import hqq
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from measuring import main


def rounds(model: Any, samples: list[torch.Tensor], group: int) -> Any:
    config = BaseQuantizeConfig(nbits=4, group_size=group)
    for module in list(model.model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear):
                weight = layer.weight.data.clone()
                how = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}
                found = HQQLinear(layer, config, **how).dequantize()
                layer.weight.data = found.reshape(weight.shape).float()
                setattr(module, name, layer)

    def save(out: Path) -> None:
        model.save_pretrained(out)

    return save


if __name__ == "__main__":
    main(rounds, f"hqq {hqq.__version__}")
