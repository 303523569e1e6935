import re
import sys
from pathlib import Path
from shutil import which

import pytest
import torch
from torch._dynamo.utils import counters

from attending.mesh import world
from attending.model.architecture import parse_config
from attending.model.attend import Packed
from attending.model.decoder import Decoder, init_weight
from attending.shards import Shards
from attending.train.heldout import Heldout, score_documents
from attending.train.parallel import Fill, Opaque, build, process_group
from attending.train.reader import Batch
from attending.train.recipe import ComputeConfig
from attending.train.step import accumulate, clip, next_token_loss
from tests.train.making import M1, make_corpus, make_tokenizer


def fill(values: dict[str, object]) -> Fill:
    arch = parse_config(values)

    def draw(name: str, weight: torch.Tensor) -> None:
        init_weight(arch, name, weight, torch.Generator().manual_seed(len(name)))

    return draw


def made(values: dict[str, object], **compute: object) -> Decoder:
    config = ComputeConfig.build(compute)
    return build(parse_config(values), fill(values), world(), torch.device("cpu"), config)


def batch(lengths: list[int]) -> Batch:
    torch.manual_seed(0)
    tokens = sum(lengths)
    ids, targets = torch.randint(384, (2, tokens))
    return Batch(ids, targets, torch.ones(tokens), lengths, torch.zeros(tokens, dtype=torch.long))


@pytest.mark.skipif(not which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_equals_plain() -> None:
    grads = []
    for is_compiled in (False, True):
        decoder = made(M1, precision="float64", compile=is_compiled)
        for lengths in ([5, 20, 7], [32]):
            found = accumulate(decoder, [batch(lengths)], next_token_loss, 1, ["text"])
        grads.append((found.norm, [p.grad for p in decoder.parameters()]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-9)
    for one, other in zip(grads[0][1], grads[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not which("g++"), reason="compiling needs a C++ compiler")
def test_blocks_stay_compiled_whatever_is_measured_between(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    shards = Shards(make_corpus(tmp_path / "corpus", tokenizer) / "heldout" / "medical")
    decoder = made(M1, compile=True)

    def graphs() -> int:
        return int(counters["stats"]["unique_graphs"])

    def measure() -> None:
        for context in (3, 5, 7, 11, 13, 17, 19, 23, 29):  # more shapes than may be compiled
            score_documents(
                decoder,
                Heldout(shards, range(shards.num_documents)),
                context=context,
                micro_tokens=context,
                max_tokens=200,
                place=world(),
                device=torch.device("cpu"),
            )

    start = graphs()
    measure()
    assert graphs() == start
    for lengths in ([5, 20, 7], [32], [16, 16]):
        accumulate(decoder, [batch(lengths)], next_token_loss, 1, ["text"])
        if lengths == [5, 20, 7]:
            made_first = graphs()
            assert made_first > start
    measure()
    accumulate(decoder, [batch([1] * 32)], next_token_loss, 1, ["text"])
    assert graphs() == made_first  # the same graphs serve all segments


def test_opaque_attends_as_what_it_hides() -> None:
    arch = parse_config(M1)
    packed = Packed([3, 5])
    q, k, v = (torch.randn(8, n, 16) for n in (2, 1, 1))
    hidden = Opaque(packed)
    assert torch.equal(hidden(arch.layers[0], q, k, v), packed(arch.layers[0], q, k, v))
    assert torch.equal(hidden.positions, packed.positions)


def test_weights_of_nought_leave_the_gradient_alone() -> None:
    first, second = made(M1, precision="float64"), made(M1, precision="float64")
    whole = batch([8, 8])
    masked = Batch(
        whole.ids, whole.targets, torch.tensor([1.0] * 8 + [0.0] * 8), [8, 8], whole.kinds
    )
    part = Batch(*(x[:8] for x in (whole.ids, whole.targets, whole.weights)), [8], whole.kinds[:8])
    one = accumulate(first, [masked], next_token_loss, 1, ["text"])
    two = accumulate(second, [part], next_token_loss, 1, ["text"])
    assert one.loss == pytest.approx(two.loss, rel=1e-9) and one.by_kind == {"text": one.loss}
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_clipping_scales_only_what_is_too_long() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clip([weight], 10.0, 5.0)
    assert weight.grad.tolist() == [3.0, 4.0]
    clip([weight], 1.0, 5.0)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


def test_a_single_process_has_no_group_but_for_half_precision() -> None:
    with process_group("float32") as (place, _):
        assert not torch.distributed.is_initialized() and place.size == 1
    with process_group("bfloat16") as (place, _):
        assert torch.distributed.is_initialized() and place.size == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_was_freed_is_given_back_when_training_ends() -> None:
    def mebibytes() -> int:
        told = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
        assert told
        return int(told[1]) // 1024

    with process_group("float32"):  # gives back what other tests have freed
        pass
    before = mebibytes()
    with process_group("float32"):
        tensors = [torch.ones(2**20) for _ in range(64)]  # 4 MiB each
        wedge = torch.ones(2**18)  # it keeps the heap's end in use
        del tensors
        assert mebibytes() > before + 200
    assert mebibytes() < before + 64 and wedge[0] == 1
