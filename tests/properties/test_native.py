"""The native engine against itself bit for bit, and against torch's within a stated bound."""

import gc
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.engine.native import pack
from attending.engine.native.runner import NativeOptions, NativeRunner
from attending.engine.runner import Span
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.engine.torch_runner import TorchRunner
from attending.model.architecture import PAGE_TOKENS
from attending.model.checkpoint import open_checkpoint
from attending.model.decoder import Decoder
from attending.model.weights import load_decoder
from tests.engine.native_models import (
    PATHS,
    Trained,
    dequantised,
    examples,
    kernel,
    random_model,
    round_activations,
)
from tests.engine.serving import serve, text
from tests.model.test_gguf import weights as gguf_weights
from tests.model.test_gguf import write as write_gguf
from tests.model.tiny import FAMILIES, configs
from tests.model.tiny import build as build_model

# Keys and values are float16: logits differ from a float32 step's over the same weights by no more
# than this share, root mean square over root mean square. With 8-bit activations torch's are
# rounded by the same rule; a value at a border may go either way, which random models amplify.
FLOAT_BOUND, INT8_BOUND = 0.03, 0.2
PAGES = 12

pytestmark = pytest.mark.usefixtures("one_thread")
forms = st.sampled_from(["w8", "w8s", "w4-32", "w4s-64", "w4-128"])


def native(
    decoder: Decoder, form: str = "w8", path: str | None = None, **options: Any
) -> NativeRunner:
    with tempfile.TemporaryDirectory() as folder:
        packed = pack.open_packed(Trained(decoder), Path(folder), form)
    counts = [PAGES] * len(decoder.arch.windows)
    chosen = NativeOptions(**{"threads": 2, **options})
    return NativeRunner(packed, counts, chosen, kernel=kernel(path))


def spans_of(
    runner: NativeRunner | TorchRunner, ids: Sequence[int], cuts: Sequence[int], first_page: int = 0
) -> list[Span]:
    """One text in pieces that end at the cuts, every row's logits asked for."""
    pages = np.arange(first_page, first_page + 3)
    tables = tuple(np.roll(pages, group) for group in range(len(runner.arch.windows)))
    ends = sorted({*cuts, len(ids)})
    starts = [0, *ends[:-1]]
    return [
        Span(np.array(ids[a:b]), a, tuple(t[: -(-b // PAGE_TOKENS)] for t in tables), b - a)
        for a, b in zip(starts, ends, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=examples(12), deadline=None)
def test_native_equals_torch_on_the_weights_that_it_packed(
    family: str, data: st.DataObject
) -> None:
    decoder = build_model(data.draw(configs(family)))
    form, path = data.draw(forms), data.draw(st.sampled_from(PATHS))
    ids = text(data.draw(st.integers(1, 140)), vocab=decoder.arch.vocab_size)
    exact = native(decoder, form, path, activations="float32")
    rounded = native(decoder, form, path)
    dequantised(decoder, form)
    (span,) = spans_of(exact, ids, [])
    for runner, bound in ((exact, FLOAT_BOUND), (rounded, INT8_BOUND)):
        if runner is rounded:
            round_activations(decoder)
        expected = TorchRunner(decoder, exact.num_pages).step([span])
        difference = np.linalg.norm(runner.step([span]) - expected)
        assert difference <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", [GGMLQuantizationType[k] for k in ("Q4_0", "Q4_1", "Q8_0")])
def test_a_gguf_is_computed_with_as_it_is_stored(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    given = {
        name: (quantize(values, kind), kind) if values.ndim == 2 else values
        for name, values in gguf_weights().items()
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", given))
    packed = pack.open_packed(checkpoint, tmp_path / "packed", "stored")
    assert {m.bits for m in packed.matrices.values()} == {8 if kind.name == "Q8_0" else 4}
    runner = NativeRunner(packed, [2], NativeOptions(activations="float32"), kernel=kernel())
    reference = TorchRunner(load_decoder(checkpoint), [2])
    (span,) = [Span(np.array(text(70, vocab=32)), 0, (np.arange(2),), 70)]
    expected = reference.step([span])
    difference = np.linalg.norm(runner.step([span]) - expected)
    assert difference <= FLOAT_BOUND * np.linalg.norm(expected)


def test_raw_rows_of_m1_are_right_across_pages_and_groups() -> None:
    decoder = random_model("baichuan_m1", sliding_window=70)
    runner = native(decoder)
    ids = text(130)
    whole = runner.step(spans_of(runner, ids, []))
    for cuts in ([63], [64], [65], [1, 64, 127, 128], [62, 63, 64, 129]):
        rows = [runner.step([span]) for span in spans_of(runner, ids, cuts)]
        assert (np.concatenate(rows) == whole).all(), cuts


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=examples(15), deadline=None)
def test_chunks_batches_and_single_tokens_give_the_same_bits(
    family: str, data: st.DataObject
) -> None:
    decoder = build_model(data.draw(configs(family)))
    options = {
        "activations": data.draw(st.sampled_from(["int8", "float32"])),
        "kv": data.draw(st.sampled_from(["float16", "int8"])),
    }
    form, path = data.draw(forms), data.draw(st.sampled_from(PATHS))
    runner = native(decoder, form, path, **options)
    ids = text(data.draw(st.integers(2, 140)), vocab=decoder.arch.vocab_size)
    other = text(data.draw(st.integers(1, 140)), seed=1, vocab=decoder.arch.vocab_size)
    whole = runner.step(spans_of(runner, ids, []))
    cuts = data.draw(st.lists(st.integers(1, len(ids) - 1), max_size=6))
    for pieces in (cuts, range(1, len(ids))):  # as a prompt in chunks, and token by token
        crowd = iter(spans_of(runner, other, range(1, len(other)), first_page=3))
        rows = []
        for span in spans_of(runner, ids, pieces):
            beside = next(crowd, None)  # another answer in the same step, before or after
            batch = [span] if beside is None else [beside, span]
            rows.append(runner.step(batch)[-span.num_logits :])
        assert (np.concatenate(rows) == whole).all()
    one = native(decoder, form, path, threads=1, **options)
    assert (one.step(spans_of(one, ids, [])) == whole).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_crowd_are_those_alone(family: str) -> None:
    """Through the scheduler: shared beginnings, chunks, preemption for want of pages."""
    decoder = random_model(family)
    requests = [
        Request(
            text(100, seed=9)[: 64 + 7 * i] + text(20 + i, seed=i),
            Sampling(temperature=t, seed=i, max_tokens=40),
        )
        for i, t in enumerate((0.0, 0.8, 0.0, 1.2, 0.8))
    ]
    alone = []
    for request in requests:
        (told,) = serve(Scheduler(native(decoder)), request)
        alone.append(told.tokens)
    crowd = serve(Scheduler(native(decoder), step_tokens=48), *requests)
    assert [told.tokens for told in crowd] == alone


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_the_cache_in_fewer_bits_stays_close(kv: str) -> None:
    decoder = random_model("llama")
    exact, ids = native(decoder, activations="float32"), text(130)
    spans = spans_of(exact, ids, [])
    runner = native(decoder, activations="float32", kv=kv)
    wanted = exact.step(spans)
    difference = runner.step(spans) - wanted
    assert (np.abs(difference).max() > 0) == (kv == "int8")
    assert np.square(difference).mean() < 0.05**2 * np.square(wanted).mean()


def resident() -> int:
    """Bytes in memory now: a peak would hide what stays below it."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("this system does not say what a process holds now")
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def test_memory_does_not_grow_over_2000_steps() -> None:
    runner = native(random_model("baichuan_m1"))
    ids = text(128)

    def run(times: int) -> None:
        for i in range(times):
            (*_, span) = spans_of(runner, ids, [1 + i % 126])
            runner.step([span])

    run(200)
    before = resident()
    run(2000)
    assert resident() - before < 2**18


def test_closing_gives_the_memory_back() -> None:
    decoder = random_model("llama")
    for _ in range(3):
        native(decoder)
    before = resident()
    for _ in range(100):
        native(decoder)
    assert resident() - before < 2**21
