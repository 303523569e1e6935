"""What random float32 parity does not reach: heads that train, first weights, half precision."""

import math

import torch

from attending.model.architecture import parse_config
from attending.model.attend import Packed
from attending.model.decoder import Decoder, RMSNorm, rotate, rotation
from tests.model.test_checkpoint import config_of
from tests.model.tiny import build

IDS = torch.arange(12)


def test_a_normalised_head_follows_its_weight() -> None:
    decoder = build(config_of("baichuan_m1"))
    with torch.no_grad():
        hidden = decoder(IDS, Packed([12]))
        before = decoder.logits(hidden)
        decoder.lm_head.weight.mul_(3.0)
        torch.testing.assert_close(decoder.logits(hidden), before)
        unit = torch.nn.functional.normalize(decoder.lm_head.weight, dim=1)
        torch.testing.assert_close(before, hidden @ unit.T)
    decoder.logits(hidden).square().sum().backward()
    gradient = decoder.lm_head.weight.grad
    assert gradient is not None
    # The length of a row changes nothing, so its gradient has no part along the row.
    along = (gradient * decoder.lm_head.weight).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-3)


def test_m1s_first_weights_are_as_its_report_has_them() -> None:
    decoder = Decoder(parse_config(config_of("baichuan_m1") | {"initializer_range": 0.02}))
    decoder.init_weights(torch.Generator().manual_seed(0))
    for name, weight in decoder.named_parameters():
        if name.endswith(("conv_k", "conv_v")):
            assert (weight > 0).all() and weight[..., 0].ne(weight[..., 1]).any()
            torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight[..., 0]))
    bound = 1 / math.sqrt(16)
    assert 0.9 * bound < decoder.lm_head.weight.abs().max() <= bound
    assert 0.01 < decoder.model.embed_tokens.weight.std() < 0.03


def test_deepseeks_yarn_scales_by_a_ratio() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    scaling = {**yarn, "mscale": 1.0, "mscale_all_dim": 0.5}
    rope = parse_config(config_of("llama") | {"rope_scaling": scaling}).rope
    ratio = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert math.isclose(rope.attention_factor, ratio)
    plain = parse_config(config_of("llama") | {"rope_scaling": yarn}).rope
    assert math.isclose(plain.attention_factor, 0.1 * math.log(4) + 1)


def test_half_precision_is_rounded_where_llama_rounds_and_logits_are_wide() -> None:
    norm = RMSNorm(64, 1e-6).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=generator))
        x = torch.randn(5, 64, generator=generator).bfloat16()
        wide = x.float()
        unit = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
        assert torch.equal(norm(x), norm.weight * unit)
        angles = rotation(torch.tensor([900, 901, 902, 903, 904]), torch.ones(32) / 3, 1.0)
        turned = rotate(x[:, None], angles)
        assert torch.equal(turned, rotate(wide[:, None], angles).bfloat16())
        for family in ("llama", "baichuan_m1"):
            decoder = build(config_of(family), dtype=torch.bfloat16)
            assert decoder.logits(decoder(IDS, Packed([12]))).dtype == torch.float32
