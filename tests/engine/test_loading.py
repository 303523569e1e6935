"""Which runner a model gets, what is said about it, and that serving needs no torch."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import attending
from attending import mesh
from attending.engine import loading, local
from attending.engine.loading import packed_folder
from attending.engine.server import EngineOptions, prepare
from attending.engine.torch_runner import TorchRunner
from attending.errors import ConfigError, UsageError
from attending.model.files import model_files
from tests.engine import native_stub
from tests.engine.folders import write_model
from tests.hallway.test_chat import says

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"temperature": 0.0, "max_tokens": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTENDING_CACHE", str(tmp_path / "cache"))
    install(monkeypatch)
    return write_model(tmp_path / "m")


def install(monkeypatch: pytest.MonkeyPatch, reason: str | None = None) -> None:
    for name, module in native_stub.modules(reason).items():
        monkeypatch.setitem(sys.modules, name, module)


def runner_of(model: "attending.Model") -> Any:
    return model.scheduler._runner


def test_a_cpu_gets_the_native_runner_with_the_options_given(folder: Path) -> None:
    model = attending.load(folder, weights="w4-64", kv="int8", threads=1)
    assert model.chat(says("fever?"), **SHORT).output_tokens == 2
    runner = runner_of(model)
    assert isinstance(runner, native_stub.NativeRunner) and "decoder" not in vars(model)
    assert runner.options.model_dump() == {
        "weights": "w4-64",
        "activations": "int8",
        "kv": "int8",
        "threads": 1,
    }
    assert model.path == {"weights": "w4-64", "activations": "int8", "draft": "none"}
    assert model.logits([[1, 2]]).dtype == model.decoder.model.norm.weight.dtype


@pytest.mark.parametrize(
    ("weights", "bits", "group", "scales"), [("w8", 8, 32, 2), ("w4s-128", 4, 128, 1)]
)
def test_packed_bytes_are_counted_by_form(
    folder: Path, weights: str, bits: int, group: int, scales: int
) -> None:
    model = attending.load(folder, weights=weights)
    shapes = model.arch.tensor_shapes()
    inside = sum(a * b for n, (a, *rest) in shapes.items() if "layers" in n for b in rest)
    outside = sum(a * b for n, (a, *rest) in shapes.items() if "layers" not in n for b in rest)
    vectors = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    wanted = inside * (bits + 16 * scales / group) / 8 + outside * (8 + 1) / 8 + vectors * 4
    assert loading.weight_bytes(model._checkpoint, model._options, native=True) == int(wanted)


def test_a_dtype_gets_torchs_runner(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = attending.load(folder, dtype="bfloat16")
    assert isinstance(runner_of(model), TorchRunner) and not caplog.records
    assert model.path["weights"] == "float32 computed as bfloat16"
    assert model.path["kv"] == "bfloat16"
    assert model.weight_bytes == 2 * model.arch.num_parameters()


def test_what_is_in_the_way_of_the_native_runner_is_said_once_with_the_factor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "there is no compiler.")
    model = attending.load(folder)
    for _ in range(2):
        model.chat(says("fever?"), **SHORT)
    assert isinstance(runner_of(model), TorchRunner) and model.path["weights"] == "float32"
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    factor = loading.TORCH_FACTOR
    assert line == f"torch computes in float32, about {factor} times slower: there is no compiler."
    with pytest.raises(UsageError, match=r"weights cannot be had: there is no compiler\."):
        attending.load(folder, weights="w8").chat(says("fever?"))
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"no compiler\. Or use torch, .* pip install"):
        attending.load(folder).chat(says("fever?"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float32", "weights": "w8"}, UsageError, "weights belong to the native runner"),
        ({"device": "cuda", "kv": "int8"}, UsageError, "give the ones or the others"),
        ({"weights": "w3"}, ConfigError, "weights: Input should be 'stored'"),
        ({"weight": "w8"}, ConfigError, "Did you mean 'weights'"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_read(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attending.load(folder / "not read", **options)


def test_without_torch_a_model_answers_and_its_logits_say_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loading, local):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    model = attending.load(folder)
    assert model.chat(says("fever?"), **SHORT).output_tokens == 2
    with pytest.raises(UsageError, match=r"needs torch.*: pip install -e '.\[train\]'"):
        model.logits([[1, 2]])
    with pytest.raises(UsageError, match=r"dtype and device need torch"):
        attending.load(folder, dtype="float32")


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_memory_short_of_the_model_says_how_much_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    model = attending.load(folder, dtype=dtype)
    needed = model.weight_bytes
    monkeypatch.setattr(mesh, "free_memory", lambda: needed - 1)
    with pytest.raises(UsageError, match=r"need about 0\.0 GiB .* GiB are missing\. Free some"):
        model.chat(says("fever?"))
    monkeypatch.setattr(mesh, "free_memory", lambda: needed)
    assert model.chat(says("fever?"), **SHORT).output_tokens == 2


def test_native_weights_take_their_bits_and_their_scales(folder: Path) -> None:
    """32 x vocabulary in 8 bits with scales, or 9 a weight; norms in 32."""
    arch = attending.load(folder).arch
    inner = sum(
        shape[0] * shape[1]
        for name, shape in arch.tensor_shapes().items()
        if len(shape) == 2 and ".layers." in name
    )
    norms, embedding = 5 * 32 * 4, arch.vocab_size * 32 * 9 // 8
    assert attending.load(folder).weight_bytes == inner * 9 // 8 + norms + embedding
    assert (
        attending.load(folder, weights="w4-32").weight_bytes == inner * 5 // 8 + norms + embedding
    )


def test_packed_weights_move_when_a_file_changes_and_the_old_ones_go(folder: Path) -> None:
    attending.load(folder).chat(says("fever?"), **SHORT)
    first = packed_folder(model_files(folder))
    assert (first / "stored").is_dir()
    attending.load(folder, weights="w8").chat(says("fever?"), **SHORT)
    assert sorted(f.name for f in first.iterdir()) == ["stored", "w8"]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    attending.load(folder).chat(says("fever?"), **SHORT)
    second = packed_folder(model_files(folder))
    assert first != second and (second / "stored").is_dir() and not first.exists()


def test_a_server_sizes_its_cache_by_what_the_native_runner_keeps(folder: Path) -> None:
    def page_bytes(**options: Any) -> int:
        (size,) = prepare(str(folder), EngineOptions.build(options)).page_bytes
        return size

    assert page_bytes(dtype="float32") == 2 * page_bytes() == 4 * page_bytes(kv="int8")


SERVING = """
import sys
try:
    import attending.engine.native.runner
except ImportError:
    from tests.engine import native_stub
    native_stub.install()
from attending import cli
from attending.engine.server import EngineOptions, Service, prepare
options = EngineOptions()
model = prepare(sys.argv[1], options)
if not model.is_native:
    sys.exit(77)
Service(model, options).app()
sys.argv[1:] = ["chat", "-m", sys.argv[1], "fever?", "--max-tokens", "1"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""


def test_serving_and_chatting_on_a_cpu_import_no_torch(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    run = subprocess.run(
        [sys.executable, "-c", SERVING, str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ATTENDING_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    if run.returncode == 77:
        pytest.skip(f"the native runner cannot be used here: {run.stderr}")
    assert run.returncode == 0, run.stderr
