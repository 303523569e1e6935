"""NativeRunner: the kernel's side of Python. One call a step, and no torch."""

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from attending import mesh
from attending.config import Config
from attending.engine.native.build import library, status
from attending.engine.native.pack import Matrix, Packed
from attending.engine.runner import Span
from attending.errors import UsageError
from attending.model.architecture import PAGE_TOKENS, Architecture, LayerSpec
from attending.model.rope import inverse_frequencies

MAX_HEAD = 512  # the kernel's buffers
C = ctypes
Address = C.c_void_p


class MatrixArgument(C.Structure):
    """`Matrix` of the kernel."""

    _fields_ = (
        *((name, Address) for name in ("data", "bias")),
        *((name, C.c_int32) for name in ("outputs", "inputs", "bits", "group", "has_minimum")),
    )


class LayerArgument(C.Structure):
    """`Layer` of the kernel."""

    _fields_ = (
        *(
            (name, C.c_int32)
            for name in ("heads", "kv_heads", "head_dim", "window", "page_group", "rope")
        ),
        *(
            (name, Address)
            for name in ("input_norm", "post_norm", "q_norm", "k_norm", "conv_k", "conv_v")
        ),
        *((name, MatrixArgument) for name in ("qkv", "out", "gate_up", "down")),
    )


class ModelArgument(C.Structure):
    """`Model` of the kernel."""

    _fields_ = (
        *(
            (name, C.c_int32)
            for name in ("layers", "hidden", "inner", "vocab", "threads", "rope_sizes")
        ),
        *((name, C.c_int32) for name in ("int8_activations", "int8_kv")),
        ("norm_eps", C.c_float),
        ("rope_factor", C.c_float),
        *((name, Address) for name in ("num_pages", "rope_dims", "frequencies", "layer", "norm")),
        ("embedding", MatrixArgument),
        ("head", MatrixArgument),
    )


class BatchArgument(C.Structure):
    """`Batch` of the kernel."""

    _fields_ = (
        *((name, C.c_int32) for name in ("rows", "spans", "wanted")),
        *((name, Address) for name in ("ids", "positions", "starts", "cached", "pages")),
        ("table", C.c_int32),
        ("wanted_rows", Address),
    )


class NativeOptions(Config):
    """What the native engine computes with."""

    weights: Literal[
        "stored", "w8", "w8s", "w4-32", "w4-64", "w4-128", "w4s-32", "w4s-64", "w4s-128"
    ] = "stored"
    """`stored`: a GGUF file's own 4 or 8 bits, exactly; `w8` for all others. The rest round to 8
    bits in groups of 32, or to 4 in groups of 32, 64 or 128, `s` for symmetric; head and
    embedding to 8."""
    activations: Literal["int8", "float32"] = "int8"
    """`int8`: each row of activations in groups of 32, rounded anew for every product."""
    kv: Literal["float16", "int8"] = "float16"
    """Keys and values; `int8` has a scale for each head of a token."""
    threads: PositiveInt | None = None
    """None takes every core."""


def obstacle(arch: Architecture) -> str | None:
    """Why the native engine cannot run a model on this machine, in a sentence; None if it can."""
    largest = max(spec.head_dim for spec in arch.layers)
    if largest > MAX_HEAD:
        return f"no native kernel takes heads of size {largest}; they end at {MAX_HEAD}."
    state = status()
    return None if state.path else state.reason


class NativeRunner:
    """See `Runner`; one decoder in the kernel's hands."""

    def __init__(
        self,
        packed: Packed,
        num_pages: Sequence[int],
        options: NativeOptions | None = None,
        *,
        kernel: ctypes.CDLL | None = None,
    ) -> None:
        """Reserve pages beside packed weights.

        Args:
            packed: From `open_packed`; kept mapped.
            num_pages: Of each of the architecture's page groups.
            options: What is computed with.
            kernel: Another than this processor's best.

        Raises:
            UsageError: The kernel cannot be built, or there is no memory for the pages.
        """
        chosen = options or NativeOptions()
        self.arch, self.num_pages = packed.arch, tuple(num_pages)
        self._kernel = kernel or library()
        self._kept: list[Any] = [packed]  # what the kernel has addresses of
        threads = chosen.threads or cast(int, mesh.hardware()["available_cores"])
        model = self._model(packed, chosen, threads)
        self._engine: int | None = self._kernel.attending_open(C.byref(model))
        if not self._engine:
            raise UsageError(
                f"there is no memory for {sum(num_pages):,} pages of keys and values, or no room "
                f"for {threads} threads; keep fewer tokens (--context), or use fewer threads."
            )
        self._owner, self._turn = os.getpid(), threading.Lock()
        self.path = {
            "weights": packed.path["weights"],
            "activations": "int8 in groups of 32" if chosen.activations == "int8" else "float32",
            "kv": chosen.kv,
            "draft": "none",
        }

    def __del__(self) -> None:
        """Give the memory back."""
        if getattr(self, "_engine", None) and os.getpid() == self._owner:
            self._kernel.attending_close(self._engine)
            self._engine = None

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """See `Runner.step`."""
        counts = [len(span.ids) for span in spans]
        starts = np.zeros(len(spans) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        ids = np.concatenate([span.ids for span in spans]).astype(np.int32)
        cached = np.array([span.cached for span in spans], np.int32)
        positions = np.arange(len(ids), dtype=np.int32) + np.repeat(cached - starts[:-1], counts)
        wanted = np.concatenate(
            [
                np.arange(end - span.num_logits, end, dtype=np.int32)
                for end, span in zip(starts[1:], spans, strict=True)
            ]
        )
        table = max(-(-(span.cached + len(span.ids)) // PAGE_TOKENS) for span in spans)
        pages = np.full((len(self.num_pages), len(spans), table), -1, np.int32)
        for index, span in enumerate(spans):
            for group, listed in enumerate(span.pages):
                pages[group, index, : min(len(listed), table)] = listed[:table]
        groups = (C.c_void_p * len(pages))(*[group.ctypes.data for group in pages])
        batch = BatchArgument(
            rows=len(ids),
            spans=len(spans),
            wanted=len(wanted),
            ids=ids.ctypes.data,
            positions=positions.ctypes.data,
            starts=starts.ctypes.data,
            cached=cached.ctypes.data,
            pages=C.addressof(groups),
            table=table,
            wanted_rows=wanted.ctypes.data,
        )
        logits = np.empty((len(wanted), self.arch.vocab_size), np.float32)
        if os.getpid() != self._owner:  # its threads did not come along: a step would never end
            raise UsageError("a forked process cannot use this engine; load the model there.")
        with self._turn:  # the lock of Python is given up meanwhile
            failed = self._kernel.attending_step(self._engine, C.byref(batch), logits.ctypes.data)
        if failed:
            raise UsageError(f"there is no memory for a step of {len(ids):,} tokens.")
        return logits

    def _model(self, packed: Packed, options: NativeOptions, threads: int) -> ModelArgument:
        arch = packed.arch
        sizes = sorted({spec.head_dim for spec in arch.layers})
        frequencies = [inverse_frequencies(arch.rope, size) for size in sizes]
        addresses = (C.c_void_p * len(sizes))(*[f.ctypes.data for f in frequencies])
        dims = np.array(sizes, np.int32)
        pages = np.array(self.num_pages, np.int32)
        layers = (LayerArgument * len(arch.layers))(
            *[self._layer(packed, spec, sizes) for spec in arch.layers]
        )
        self._kept += [frequencies, addresses, dims, pages, layers]
        embedding = argument(packed.matrices["embedding"])
        head = embedding if arch.tied else argument(packed.matrices["head"])
        return ModelArgument(
            layers=len(layers),
            hidden=arch.hidden_size,
            inner=arch.intermediate_size,
            vocab=arch.vocab_size,
            threads=threads,
            rope_sizes=len(sizes),
            int8_activations=options.activations == "int8",
            int8_kv=options.kv == "int8",
            norm_eps=arch.norm_eps,
            rope_factor=arch.rope.attention_factor,
            num_pages=pages.ctypes.data,
            rope_dims=dims.ctypes.data,
            frequencies=C.addressof(addresses),
            layer=C.addressof(layers),
            norm=packed.vectors["model.norm.weight"].ctypes.data,
            embedding=embedding,
            head=head,
        )

    def _layer(self, packed: Packed, spec: LayerSpec, sizes: list[int]) -> LayerArgument:
        at = f"model.layers.{spec.index}"

        def vector(name: str) -> int | None:
            found = packed.vectors.get(f"{at}.{name}")
            return None if found is None else found.ctypes.data

        return LayerArgument(
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=spec.window or 0,
            page_group=self.arch.windows.index(spec.window),
            rope=sizes.index(spec.head_dim),
            input_norm=vector("input_layernorm.weight"),
            post_norm=vector("post_attention_layernorm.weight"),
            q_norm=vector("self_attn.q_norm.weight"),
            k_norm=vector("self_attn.k_norm.weight"),
            conv_k=vector("self_attn.conv_k"),
            conv_v=vector("self_attn.conv_v"),
            **{
                name: argument(packed.matrices[f"{spec.index}.{name}"])
                for name in ("qkv", "out", "gate_up", "down")
            },
        )


def argument(matrix: Matrix) -> MatrixArgument:
    """A packed matrix as the kernel takes it."""
    return MatrixArgument(
        data=matrix.data.ctypes.data,
        bias=None if matrix.bias is None else matrix.bias.ctypes.data,
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        bits=matrix.bits,
        group=matrix.group,
        has_minimum=matrix.has_minimum,
    )
