"""NativeRunner: the kernel's side of Python. One call a step, and no torch."""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from attending import mesh
from attending.config import Config
from attending.engine.native.build import library, status
from attending.engine.native.draft import LAYER, PackedDraft
from attending.engine.native.pack import MAX_HEAD, Matrix, Packed
from attending.engine.runner import Observed, Proposal, Shape, Span
from attending.errors import UsageError
from attending.model.architecture import PAGE_TOKENS, Architecture, LayerSpec
from attending.model.rope import inverse_frequencies

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
            for name in ("heads", "kv_heads", "head_dim", "window", "page_group", "rope", "first")
        ),
        ("norm_eps", C.c_float),
        *(
            (name, Address)
            for name in ("input_norm", "post_norm", "q_norm", "k_norm", "conv_k", "conv_v")
        ),
        *((name, MatrixArgument) for name in ("qkv", "out", "gate_up", "down")),
    )


class DraftArgument(C.Structure):
    """`Draft` of the kernel."""

    _fields_ = (
        ("words", C.c_int32),
        *((name, Address) for name in ("target_ids", "hidden_norm", "norm")),
        *((name, MatrixArgument) for name in ("fc", "head", "embedding")),
    )


class ModelArgument(C.Structure):
    """`Model` of the kernel."""

    _fields_ = (
        *((name, C.c_int32) for name in ("layers", "hidden", "vocab", "threads", "rope_sizes")),
        *((name, C.c_int32) for name in ("int8_activations", "int8_kv", "kept_rows")),
        ("norm_eps", C.c_float),
        *((name, Address) for name in ("num_pages", "rope_dims", "rope_factors", "frequencies")),
        *((name, Address) for name in ("layer", "norm")),
        ("embedding", MatrixArgument),
        ("head", MatrixArgument),
        ("draft", Address),
        ("features", C.c_int32),
        ("feature_layers", Address),
    )


class BatchArgument(C.Structure):
    """`Batch` of the kernel."""

    _fields_ = (
        *((name, C.c_int32) for name in ("rows", "spans", "wanted")),
        *((name, Address) for name in ("ids", "starts", "cached", "pages")),
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
    """See `Runner`; one decoder in the kernel's hands. With a draft a `Drafter` of chains; with
    `features` an `Observer`.
    """

    def __init__(
        self,
        packed: Packed,
        num_pages: Sequence[int],
        options: NativeOptions | None = None,
        *,
        kernel: ctypes.CDLL | None = None,
        draft: PackedDraft | None = None,
        shape: Shape | None = None,
        features: Sequence[int] = (),
    ) -> None:
        """Reserve pages beside packed weights.

        Args:
            packed: From `open_packed`; kept mapped.
            num_pages: Of each of the architecture's page groups.
            options: What is computed with.
            kernel: Another than this processor's best.
            draft: Of this model.
            shape: The longest chain that the draft may propose; needed with one.
            features: Layers whose inputs `observe` gives; with a draft those that it reads.

        Raises:
            UsageError: The kernel cannot be built, there is no memory for the pages, a tree is
                asked for, or `features` are given beside a draft or of no layer.
        """
        self.shape = shape or Shape(0)
        if self.shape.width > 1:
            raise UsageError("trees are drafted by torch alone: give a dtype, or ask for a chain.")
        chosen = options or NativeOptions()
        self.arch, self.num_pages = packed.arch, tuple(num_pages)
        self._kernel = kernel or library()
        self._kept: list[Any] = [packed]  # what the kernel has addresses of
        threads = chosen.threads or cast(int, mesh.hardware()["available_cores"])
        self._features = np.array(draft.config.layers if draft else features, np.int32)
        if (draft and features) or not all(0 <= i <= len(packed.arch.layers) for i in features):
            raise UsageError(
                f"features={[*features]}: of {len(packed.arch.layers)} layers, and without a draft."
            )
        model = self._model(packed, chosen, threads, draft)
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

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:  # bound: at exit `os` is gone
        """Give the memory back."""
        if getattr(self, "_engine", None) and getpid() == self._owner:
            self._kernel.attending_close(self._engine)
            self._engine = None

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """See `Runner.step`."""
        return self._step(spans, None)

    def observe(self, spans: Sequence[Span]) -> Observed:
        """See `Observer.observe`."""
        rows = sum(len(span.ids) for span in spans)
        seen = np.empty((rows, len(self._features) * self.arch.hidden_size), np.float32)
        return Observed(self._step(spans, seen.ctypes.data), seen)

    def _step(self, spans: Sequence[Span], features: int | None) -> NDArray[np.float32]:
        batch, _kept = self._batch(spans, [len(span.ids) for span in spans])
        logits = np.empty((batch.wanted, self.arch.vocab_size), np.float32)
        self._run(self._kernel.attending_step, batch, logits.ctypes.data, features)
        return logits

    def propose(self, spans: Sequence[Span], depth: int) -> list[Proposal]:
        """See `Drafter.propose`."""
        batch, _kept = self._batch(spans, [depth] * len(spans))
        ids = np.empty((len(spans), depth), np.int32)
        self._run(self._kernel.attending_propose, batch, depth, ids.ctypes.data)
        return [Proposal(row) for row in ids.astype(np.int64)]

    def keep(self, span: Span, rows: Sequence[int]) -> None:
        """See `Drafter.keep`: a chain's rows lie side by side."""
        raise NotImplementedError

    def _run(self, call: Callable[..., int], batch: BatchArgument, *more: Any) -> None:
        if os.getpid() != self._owner:  # its threads did not come along: a step would never end
            raise UsageError("a forked process cannot use this engine; load the model there.")
        with self._turn:  # the lock of Python is given up meanwhile
            failed = call(self._engine, C.byref(batch), *more)
        if failed:
            raise UsageError(f"there is no memory for a step of {batch.rows:,} tokens.")

    def _batch(self, spans: Sequence[Span], slots: Sequence[int]) -> tuple[BatchArgument, Any]:
        """A batch whose spans use so many slots each, and what it has the addresses of."""
        counts = [len(span.ids) for span in spans]
        starts = np.zeros(len(spans) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        ids = np.concatenate([span.ids for span in spans]).astype(np.int32)
        cached = np.array([span.cached for span in spans], np.int32)
        wanted = np.concatenate(
            [
                np.arange(end - span.num_logits, end, dtype=np.int32)
                for end, span in zip(starts[1:], spans, strict=True)
            ]
        )
        table = max(-(-(s.cached + n) // PAGE_TOKENS) for s, n in zip(spans, slots, strict=True))
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
            starts=starts.ctypes.data,
            cached=cached.ctypes.data,
            pages=C.addressof(groups),
            table=table,
            wanted_rows=wanted.ctypes.data,
        )
        return batch, (ids, starts, cached, pages, groups, wanted)

    def _model(
        self, packed: Packed, options: NativeOptions, threads: int, draft: PackedDraft | None
    ) -> ModelArgument:
        arch = packed.arch
        sizes = sorted({spec.head_dim for spec in arch.layers})
        ropes = [(arch.rope, size) for size in sizes]
        layers = [self._layer(packed, spec, sizes.index(spec.head_dim)) for spec in arch.layers]
        embedding = argument(packed.matrices["embedding"])
        told = None
        if draft:
            [spec] = draft.config.arch.layers
            ropes.append((draft.config.arch.rope, spec.head_dim))
            layers.append(self._draft_layer(draft, spec, len(sizes)))
            told = self._draft(draft, embedding)
        frequencies = [inverse_frequencies(rope, size) for rope, size in ropes]
        addresses = (C.c_void_p * len(ropes))(*[f.ctypes.data for f in frequencies])
        dims = np.array([size for _, size in ropes], np.int32)
        factors = np.array([rope.attention_factor for rope, _ in ropes], np.float32)
        pages = np.array(self.num_pages, np.int32)
        listed = (LayerArgument * len(layers))(*layers)
        self._kept += [frequencies, addresses, dims, factors, pages, listed, told]
        return ModelArgument(
            layers=len(arch.layers),
            hidden=arch.hidden_size,
            vocab=arch.vocab_size,
            threads=threads,
            rope_sizes=len(ropes),
            int8_activations=options.activations == "int8",
            int8_kv=options.kv == "int8",
            kept_rows=self.shape.rows,
            norm_eps=arch.norm_eps,
            num_pages=pages.ctypes.data,
            rope_dims=dims.ctypes.data,
            rope_factors=factors.ctypes.data,
            frequencies=C.addressof(addresses),
            layer=C.addressof(listed),
            norm=packed.vectors["model.norm.weight"].ctypes.data,
            embedding=embedding,
            head=embedding if arch.tied else argument(packed.matrices["head"]),
            draft=None if told is None else C.addressof(told),
            features=len(self._features),
            feature_layers=self._features.ctypes.data,
        )

    def _draft(self, draft: PackedDraft, embedding: MatrixArgument) -> DraftArgument:
        self._kept.append(draft)
        own = draft.matrices.get("embedding")
        return DraftArgument(
            words=draft.config.draft_vocab,
            target_ids=draft.target_ids.ctypes.data,
            hidden_norm=draft.vectors["midlayer.hidden_norm.weight"].ctypes.data,
            norm=draft.vectors["norm.weight"].ctypes.data,
            fc=argument(draft.matrices["fc"]),
            head=argument(draft.matrices["head"]),
            embedding=argument(own) if own else embedding,
        )

    def _draft_layer(self, draft: PackedDraft, spec: LayerSpec, rope: int) -> LayerArgument:
        """It sees everything, as far as there are pages for it, but for slot 0."""
        windows, at = self.arch.windows, "midlayer"
        group = 0 if None in windows else len(windows) - 1
        return LayerArgument(
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=windows[group] or 0,
            page_group=group,
            rope=rope,
            first=1,
            norm_eps=draft.config.arch.norm_eps,
            input_norm=draft.vectors[f"{at}.input_layernorm.weight"].ctypes.data,
            post_norm=draft.vectors[f"{at}.post_attention_layernorm.weight"].ctypes.data,
            **{name: argument(draft.matrices[name]) for name in LAYER},
        )

    def _layer(self, packed: Packed, spec: LayerSpec, rope: int) -> LayerArgument:
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
            rope=rope,
            norm_eps=self.arch.norm_eps,
            input_norm=vector("input_layernorm.weight"),
            post_norm=vector("post_attention_layernorm.weight"),
            q_norm=vector("self_attn.q_norm.weight"),
            k_norm=vector("self_attn.k_norm.weight"),
            conv_k=vector("self_attn.conv_k"),
            conv_v=vector("self_attn.conv_v"),
            **{name: argument(packed.matrices[f"{spec.index}.{name}"]) for name in LAYER},
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
