"""The kernel's products and the packing, on every instruction path of this machine."""

import ctypes
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending import mesh
from attending.engine.native import build, compiler, pack
from attending.engine.native.runner import NativeOptions, NativeRunner, argument, obstacle
from attending.engine.runner import Span
from attending.errors import CheckpointError, UsageError
from attending.model.gguf_file import Blocks
from tests.engine.native_models import PATHS, Trained, examples, kernel, random_model, round_rows

shapes = st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 30))
forms = st.tuples(st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.booleans())


def random_matrix(outputs: int, inputs: int, form: tuple[int, int, bool]) -> Blocks:
    rng = np.random.default_rng(outputs * 1000 + inputs)
    weight = rng.standard_normal((outputs, inputs), dtype=np.float32)
    return pack.quantise(weight + 0.3, form[0], form[1], symmetric=form[2])


def kernel_matrix(integers: Blocks) -> pack.Matrix:
    outputs, inputs = integers.values.shape
    group, data = pack.group_of(integers), pack.tiles(integers)
    has_minimum = integers.minimum is not None
    return pack.Matrix(outputs, inputs, integers.bits, group, has_minimum, data, None)


def product(path: str, integers: Blocks, x: Any, *, int8: bool) -> Any:
    outputs = integers.values.shape[0]
    out = np.empty((len(x), -(-outputs // 16) * 16), np.float32)
    matrix = kernel_matrix(integers)  # kept: the argument has addresses only
    given = argument(matrix)
    x = np.ascontiguousarray(x, np.float32)
    kernel(path).attending_product(
        ctypes.byref(given),
        ctypes.c_void_p(x.ctypes.data),
        len(x),
        int8,
        ctypes.c_void_p(out.ctypes.data),
    )
    assert (out[:, outputs:] == 0).all()
    return out[:, :outputs]


@pytest.mark.parametrize("path", PATHS)
@given(shape=shapes, form=forms)
@settings(max_examples=examples(60), deadline=None)
def test_a_product_is_that_of_the_dequantised_weights(
    path: str, shape: tuple[int, int, int], form: tuple[int, int, bool]
) -> None:
    outputs, inputs, rows = shape
    integers = random_matrix(outputs, inputs, form)
    weight = pack.dequantise(integers).astype(np.float64)
    x = np.random.default_rng(rows).standard_normal((rows, inputs), dtype=np.float32)
    for int8, seen in ((False, x.astype(np.float64)), (True, round_rows(x).astype(np.float64))):
        found = product(path, integers, x, int8=int8)
        bound = 3e-6 * (np.abs(seen) @ np.abs(weight).T + 1)
        assert (np.abs(found - seen @ weight.T) <= bound).all(), (int8, form)


@pytest.mark.parametrize("path", PATHS)
@given(shape=shapes, form=forms, int8=st.booleans())
@settings(max_examples=examples(40), deadline=None)
def test_a_row_has_the_same_bits_in_any_company(
    path: str, shape: tuple[int, int, int], form: tuple[int, int, bool], int8: bool
) -> None:
    integers = random_matrix(shape[0], shape[1], form)
    x = np.random.default_rng(1).standard_normal((shape[2], shape[1]), dtype=np.float32)
    together = product(path, integers, x, int8=int8)
    alone = np.concatenate([product(path, integers, row[None], int8=int8) for row in x])
    assert (together == alone).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", [(4, 32, True), (4, 64, False), (8, 32, True), (8, 128, False)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_integers_do_not_overflow(
    path: str, form: tuple[int, int, bool], sign: float
) -> None:
    """The smallest, the largest and the middle one, alone and by turns: sums of them are exact."""
    bits, group, symmetric = form
    middle, most = 1 << bits - 1, (1 << bits) - 1
    values = np.empty((16, 256), np.uint8)
    values[:4], values[4:8], values[8:12] = 0, most, middle
    values[12:, ::2], values[12:, 1::2] = 0, most
    scale = np.ones((16, 256 // group), np.float16)
    integers = Blocks(bits, values, scale, None if symmetric else scale * 0)
    x = np.full((5, 256), sign, np.float32)
    x[3, ::2] *= -1
    wanted = x @ (values.astype(np.float32) - (middle if symmetric else 0)).T
    assert np.abs(product(path, integers, x, int8=True) - wanted).max() < 0.4


@given(shape=shapes, form=forms)
@settings(max_examples=examples(40), deadline=None)
def test_rounding_is_within_half_a_step(
    shape: tuple[int, int, int], form: tuple[int, int, bool]
) -> None:
    bits, group, symmetric = form
    rng = np.random.default_rng(shape[0])
    weight = rng.standard_normal((shape[0], shape[1]), dtype=np.float32)
    weight[:, ::7] = 0
    integers = pack.quantise(weight, bits, group, symmetric=symmetric)
    step = np.repeat(np.abs(integers.scale.astype(np.float32)), group, 1)[:, : shape[1]]
    error = np.abs(pack.dequantise(integers) - weight)
    # In 4 bits symmetric a value opposite to the largest may be a step too far out.
    share = 1.01 if symmetric and bits == 4 else 0.51
    assert (error <= share * step + 1e-7).all()
    peak = np.abs(weight).max()
    again = pack.quantise(pack.dequantise(integers), bits, group, symmetric=symmetric)
    assert np.abs(pack.dequantise(again) - pack.dequantise(integers)).max() <= 0.02 * peak


@given(shape=shapes, form=forms)
@settings(max_examples=examples(20), deadline=None)
def test_an_output_is_read_back_exactly(
    shape: tuple[int, int, int], form: tuple[int, int, bool]
) -> None:
    integers = random_matrix(shape[0], shape[1], form)
    matrix, row = kernel_matrix(integers), np.empty(shape[1], np.float32)
    given = argument(matrix)
    for output in {0, shape[0] - 1}:
        kernel().attending_read_row(ctypes.byref(given), output, ctypes.c_void_p(row.ctypes.data))
        np.testing.assert_allclose(row, pack.dequantise(integers)[output], rtol=1e-6, atol=1e-7)


def test_parts_of_different_kinds_become_one_matrix_without_a_change() -> None:
    parts = [random_matrix(16, 64, form) for form in ((4, 32, True), (4, 32, False), (8, 32, True))]
    alike = pack._alike(parts)
    assert {(part.bits, part.minimum is None) for part in alike} == {(8, False)}
    for before, after in zip(parts, alike, strict=True):
        np.testing.assert_allclose(pack.dequantise(after), pack.dequantise(before), atol=1e-6)


def test_packed_weights_are_written_once_and_again_when_they_are_not_whole(tmp_path: Path) -> None:
    weights = Trained(random_model("qwen3"))
    folder = tmp_path / "packed"
    file, index = folder / pack.FILE, folder / pack.INDEX
    first = pack.open_packed(weights, folder)
    written = file.stat().st_mtime_ns
    second = pack.open_packed(weights, folder)
    assert file.stat().st_mtime_ns == written
    for name, matrix in first.matrices.items():
        assert (second.matrices[name].data == matrix.data).all()

    def changed(**values: Any) -> None:
        index.write_text(json.dumps(json.loads(index.read_text()) | values))

    for damage in (
        lambda: changed(version=0),
        lambda: changed(matrices=[]),
        lambda: changed(vectors={"model.norm.weight": [0, 10**9]}),
        lambda: index.write_text("{"),
        lambda: file.write_bytes(b"short"),
        lambda: file.write_bytes(bytes(file.stat().st_size)),
    ):
        damage()
        written = file.stat().st_mtime_ns
        again = pack.open_packed(weights, folder)
        assert file.stat().st_mtime_ns != written, "it was taken as it was"
        assert (again.matrices["0.qkv"].data == first.matrices["0.qkv"].data).all()
    assert {path.name for path in folder.iterdir()} == {pack.FILE, pack.INDEX, pack.LOCK}


def test_several_that_pack_at_once_all_find_it_done(tmp_path: Path) -> None:
    weights = Trained(random_model("llama"))
    with ThreadPoolExecutor(4) as pool:
        for turn in range(20):
            folder = tmp_path / str(turn)
            found = list(pool.map(lambda _, f=folder: pack.open_packed(weights, f), range(4)))
            assert len({p.matrices["0.down"].data.tobytes() for p in found}) == 1


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        model = random_model("llama")
        model.get_parameter(name).data.view(-1)[3] = float("nan")
        with pytest.raises(CheckpointError, match=f"{name} holds values that are no numbers"):
            pack.open_packed(Trained(model), tmp_path / "packed")
    assert not (tmp_path / "packed" / pack.INDEX).exists()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-38, 1e-45, 3e38])
def test_an_activation_that_is_no_number_makes_the_row_none_and_a_tiny_one_zero(
    path: str, value: float
) -> None:
    blocks = random_matrix(16, 64, (4, 32, False))
    for at in (0, 17, 63):
        x = np.zeros((3, 64), np.float32)
        x[1, at] = value
        found = product(path, blocks, x, int8=True)
        assert (found[[0, 2]] == 0).all(), "other rows are not touched"
        if np.isfinite(value) and abs(value) < 1e30:
            assert (np.abs(found[1]) <= 1e-30).all()
        elif not np.isfinite(value):
            assert np.isnan(found[1]).all()


def test_a_damaged_library_in_the_cache_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Path(build.library("portable")._name).read_bytes()
    cached = tmp_path / "kernel" / compiler.file_name("portable", ("-DX",))
    cached.parent.mkdir()
    cached.write_bytes(b"no library")
    monkeypatch.setenv("ATTENDING_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "compile_path", lambda *_: cached.write_bytes(good) and cached)
    assert build.library.__wrapped__("portable", ("-DX",)).attending_best_path() >= 0
    monkeypatch.setattr(build, "compile_path", lambda *_: Path("/nowhere"))
    with pytest.raises(UsageError, match="there is no native engine"):
        build.library.__wrapped__("portable", ("-DY",))


def test_the_processor_is_asked_as_the_system_knows_it() -> None:
    flags = set(mesh.hardware()["simd"])  # type: ignore[call-overload]
    best = build.library("portable").attending_best_path()
    assert (best >= 1) == ("avx2" in flags) and (best == 2) == ("avx512_vnni" in flags)


def test_one_engine_serves_two_threads_and_no_forked_process(tmp_path: Path) -> None:
    packed = pack.open_packed(Trained(random_model("llama")), tmp_path)
    runner = NativeRunner(packed, [4], NativeOptions(threads=1))
    spans = [Span(np.array([i, 7, 9]), 0, (np.array([i]),), 3) for i in (0, 1)]
    alone = [runner.step([span]) for span in spans]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            both = pool.map(lambda span: runner.step([span]), spans)
            assert all((a == b).all() for a, b in zip(alone, both, strict=True))
    monkey = runner._owner
    runner._owner = -1  # as a child of fork sees it
    with pytest.raises(UsageError, match="forked process"):
        runner.step(spans[:1])
    runner._owner = monkey


def test_the_formats_are_named_in_one_way() -> None:
    named = get_args(NativeOptions.model_fields["weights"].annotation)
    assert {*named} == {"stored", *pack.FORMATS}


def test_without_a_compiler_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(compiler.NotCompiled, match="pip install ziglang"):
        compiler.compile_path("portable", tmp_path)
    with pytest.raises(UsageError, match="there is no native engine: no C\\+\\+ compiler"):
        build.library.__wrapped__("portable", ("-DOTHER",))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(compiler.NotCompiled, match="see CXX"):
        compiler.compile_path("portable", tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_a_failing_compiler_says_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(compiler.NotCompiled, match="needs C\\+\\+20"):
        compiler.compile_path("portable", tmp_path, ["-Dfloat=unknown_type"])


def test_a_head_that_is_too_large_is_an_obstacle() -> None:
    assert obstacle(random_model("llama").arch) is None
    assert "size 520" in str(obstacle(random_model("llama", head_dim=520).arch))


def test_memory_that_is_not_there_is_said(tmp_path: Path) -> None:
    packed = pack.open_packed(Trained(random_model("llama")), tmp_path)
    with pytest.raises(UsageError, match="no memory for"):
        NativeRunner(packed, [2**30], NativeOptions(threads=1))
