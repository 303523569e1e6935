import math
from typing import Any

import pytest
import torch

from attending.model import lora
from attending.model.architecture import parse_config
from attending.model.decoder import Decoder
from attending.model.lora import LoraConfig
from attending.sources import shipped_config
from attending.train.plan import flops, matrix_ceiling, memory
from attending.train.recipe import ComputeConfig
from tests.train.making import LLAMA, M1

HALF = ComputeConfig(precision="bfloat16", recompute=True)


def test_operations_by_hand() -> None:
    # One layer: q, o 8x8; k, v 4x8; gate, up, down 12x8; head 16x8. A segment of four tokens has
    # ten pairs of a token and one that it sees; scores and values, 2 heads of size 4.
    config = {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4,
    }
    matrices = 2 * 64 + 2 * 32 + 3 * 96 + 128
    assert flops(parse_config(config), [4]) == 6 * (4 * matrices + 2 * 8 * 10)
    assert flops(parse_config(config), [2, 2]) == 6 * (4 * matrices + 2 * 8 * 6)


@pytest.mark.parametrize(("window", "pairs"), [(1, 4), (2, 7), (3, 9), (4, 10), (9, 10)])
def test_a_window_bounds_what_is_seen(window: int, pairs: int) -> None:
    config = {**M1, "sliding_window": window, "sliding_window_layers": [0, 1, 2, 3]}
    arch = parse_config(config)
    size = sum(spec.num_heads * spec.head_dim for spec in arch.layers)
    one = flops(parse_config({**config, "sliding_window": 1}), [4])
    assert flops(arch, [4]) - one == 6 * 2 * size * (pairs - 4)


def test_memory_is_cut_among_ranks_and_m1_is_as_large_as_published() -> None:
    found = shipped_config("m1")
    assert found is not None
    arch = parse_config(found)
    alone, cut = (memory(arch, 8192, n, HALF) for n in (1, 8))
    assert alone.weights == 4 * 14_470_764_320
    assert cut.weights == alone.weights // 8 and cut.optimizer == alone.optimizer // 8
    assert cut.activations == alone.activations
    kept = memory(arch, 8192, 8, ComputeConfig(precision="bfloat16"))
    assert kept.activations > 10 * cut.activations
    # Whole for a moment: two blocks in half precision, one's gradients in full; the head's unit.
    block, outside = 330_311_712, 2 * 133_120 * 5120 + 5120
    assert cut.gathered == (2 * block + outside) * 2 + (block + outside) * 4
    assert cut.head == 12 * 1024 * 133_120 + 7 * 4 * 133_120 * 5120


def test_an_adapter_leaves_the_rest_without_gradient() -> None:
    # Of rank 3 on o (32 to 32) and down (48 to 32), in two blocks: 3 x (64 + 80) x 2.
    arch, config = parse_config(LLAMA), LoraConfig(rank=3, alpha=6, targets=("o_proj", "down_proj"))
    adapter = lora.count(arch, config)
    assert adapter == 864
    for some in (config, LoraConfig(rank=2, alpha=2)):
        for values in (LLAMA, M1):
            decoder = Decoder(parse_config(values))
            lora.add(decoder, some)
            added = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
            assert lora.count(decoder.arch, some) == added
    whole, own = (memory(arch, 64, 1, ComputeConfig(), one) for one in (None, adapter))
    assert own.weights == whole.weights + 4 * 864 and own.activations == whole.activations
    assert (own.gradients, own.optimizer) == (4 * 864, 8 * 864)
    assert whole.head - own.head == 2 * 4 * 384 * 32
    # A frozen weight is multiplied forward and for what is below it: 4 of 6. Tied head: 384 x 32.
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 384 * 32
    assert flops(arch, [4, 4]) - flops(arch, [4, 4], adapter) == 8 * (2 * matrices - 6 * 864)


@pytest.mark.parametrize("values", [M1, LLAMA])
def test_kept_activations_are_near_what_autograd_keeps(values: dict[str, Any]) -> None:
    from attending.model.attend import Packed

    # Without attention's own workspace: what is saved for backward, each storage once.
    config = {**values, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    arch = parse_config({**config, "sliding_window": 64})
    decoder = Decoder(arch)
    decoder.init_weights()
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(arch.vocab_size, (512,))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = decoder(ids, Packed([64] * 8))
    planned = memory(arch, 512, 1, ComputeConfig()).activations
    assert hidden.requires_grad
    assert 0.75 < planned / sum(kept.values()) < 1.35


def test_the_ceiling_is_a_plausible_number() -> None:
    found = matrix_ceiling(torch.device("cpu"), torch.float32, seconds=0.05)
    assert math.isfinite(found) and 1e9 < found < 1e14
