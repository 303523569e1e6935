"""Bounds of eight-bit keys and values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.quantize.kv import E4M3_MAX, fp8, head_scales, int8

SIZES = st.sampled_from([1e-4, 0.1, 10.0, 300.0])


@given(st.integers(0, 10_000), SIZES, st.sampled_from([0.25, 1.0, 3.0]))
def test_fp8_keeps_three_bits(seed: int, size: float, scale: float) -> None:
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(seed)) * size
    x = x.clamp(-E4M3_MAX * scale, E4M3_MAX * scale)
    error = (fp8(x, scale).dequantise() - x).abs()
    assert (error <= torch.maximum(x.abs() * 2**-4, torch.tensor(2**-10 * scale)) * 1.00001).all()


def test_fp8_saturates_and_by_hand() -> None:
    x = torch.tensor([1e6, -500.0, 448.0, 1.0625, 1.1, 0.001])
    # Between 1 and 2 the step is 1/8, a tie goes to even; 2^-9 is the smallest above 0.
    wanted = [448.0, -448.0, 448.0, 1.0, 1.125, 2**-9]
    assert fp8(x).dequantise().tolist() == wanted
    assert fp8(x).values.dtype == torch.float8_e4m3fn
    assert fp8(torch.tensor([1e6]), 4096.0).dequantise().tolist() == [4096 * 240.0]


@given(st.integers(0, 10_000), SIZES)
def test_int8_errs_by_half_a_step(seed: int, size: float) -> None:
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(seed)) * size
    for scales in (None, head_scales(x, 127)):
        found = int8(x, scales)
        assert ((found.dequantise() - x).abs() <= found.scales / 2 * 1.0001).all()
        assert found.values.abs().max() == 127


def test_scales_are_a_heads_own() -> None:
    x = torch.tensor([[[1.0, -2.54], [100.0, 254.0]], [[0.0, 0.5], [-3.0, 1.0]]])
    scales = head_scales(x, 127)
    assert scales.flatten().tolist() == pytest.approx([0.02, 2.0])
    assert int8(x, scales).values[0].tolist() == [[50, -127], [50, 127]]
    assert fp8(x, head_scales(x, E4M3_MAX)).values.float()[0, :, 1].tolist() == [-448, 448]


def test_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 1, 4)
    for found in (fp8(x), int8(x), int8(x, head_scales(x, 127)), fp8(x, head_scales(x, 448))):
        assert not found.dequantise().any()
