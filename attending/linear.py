"""A linear classifier over hashed features: small, exact to repeat, and readable as a table.

The identifier tagger and the corpus' scores are both this: softmax regression, trained by AdaGrad
on rows that are sets of feature ids below `buckets`. Stored as int8 with a scale a label.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from attending.errors import CheckpointError, UsageError

Floats = NDArray[np.float32]
Ids = NDArray[np.signedinteger]


class Rows(NamedTuple):
    """Feature ids of many rows, one after the other; row i has ids[starts[i]:starts[i + 1]]."""

    ids: Ids  # [features], 0 <= id < buckets
    starts: Ids  # [rows + 1]


@dataclass(frozen=True, slots=True)
class Linear:
    """logits = mean over a row's features of weights[id], plus bias."""

    labels: tuple[str, ...]
    weights: Floats  # [buckets, labels]
    bias: Floats  # [labels]

    def logits(self, rows: Rows) -> Floats:
        """[rows, labels]; a row without features has the bias alone."""
        result: Floats = _matrix(rows, len(self.weights)) @ self.weights + self.bias
        return result

    def save(self, path: Path) -> None:
        """Write weights as int8 with a scale a label; what is loaded is what was rounded."""
        scale = np.maximum(np.abs(self.weights).max(axis=0), 1e-12).astype(np.float32) / 127
        tensors = {
            "weights": np.round(self.weights / scale).astype(np.int8),
            "scale": scale,
            "bias": self.bias,
        }
        save_file(tensors, path, metadata={"labels": json.dumps(self.labels)})

    @classmethod
    def load(cls, path: Path) -> "Linear":
        """Read what `save` wrote; CheckpointError if it is not that."""
        try:
            with safe_open(path, framework="numpy") as file:
                labels = tuple(json.loads(file.metadata()["labels"]))
                weights, scale, bias = map(file.get_tensor, ("weights", "scale", "bias"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path.name} is no linear model ({error}): train it anew, or reinstall."
            ) from None
        if weights.ndim != 2 or {weights.shape[1], *scale.shape, *bias.shape} != {len(labels)}:
            raise CheckpointError(f"{path.name}: {weights.shape} does not fit {len(labels)} labels")
        return cls(labels, weights * scale, bias)


def fit(
    rows: Rows,
    targets: Sequence[int] | Ids,
    labels: Sequence[str],
    *,
    buckets: int,
    epochs: int = 4,
    rate: float = 0.5,
    decay: float = 1e-7,
    batch: int = 1024,
    seed: int = 0,
) -> Linear:
    """Softmax regression by AdaGrad (Duchi et al. 2011); the same rows and seed give the same bits.

    Args:
        rows: Features of the examples.
        targets: The index of each example's label.
        labels: Their names.
        buckets: Ids are below this.
        epochs: Passes over the examples, each in another order.
        rate: Step size, before AdaGrad divides it by the root of the squared gradients' sum.
        decay: Pull of the touched weights towards zero a step (L2).
        batch: Examples a step.
        seed: Of the order.

    Raises:
        UsageError: A label has no example.
    """
    wanted = np.asarray(targets, np.int64)
    absent = [name for index, name in enumerate(labels) if not (wanted == index).any()]
    if absent or len(wanted) != len(rows.starts) - 1:
        raise UsageError(f"no example for {', '.join(absent) or 'some rows'}: give samples of each")
    matrix = _matrix(rows, buckets)
    weights = np.zeros((buckets, len(labels)), np.float32)
    bias = np.zeros(len(labels), np.float32)
    squares, bias_squares = np.full_like(weights, 1e-8), np.full_like(bias, 1e-8)
    for picked in _batches(len(wanted), epochs, batch, seed):
        part = matrix[picked]
        logits = part @ weights + bias
        logits -= logits.max(axis=1, keepdims=True)
        error = np.exp(logits)
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(picked)), wanted[picked]] -= 1
        error /= len(picked)
        touched, columns = np.unique(part.indices, return_inverse=True)
        shape = (len(picked), len(touched))
        near = csr_matrix((part.data, columns, part.indptr), shape=shape)
        gradient = near.T @ error + decay * weights[touched]
        squares[touched] += gradient**2
        weights[touched] -= rate * gradient / np.sqrt(squares[touched])
        slope = error.sum(axis=0)
        bias_squares += slope**2
        bias -= rate * slope / np.sqrt(bias_squares)
    return Linear(tuple(labels), weights, bias)


def _batches(count: int, epochs: int, batch: int, seed: int) -> Iterator[Ids]:
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(count)
        yield from (order[start : start + batch] for start in range(0, count, batch))


def _matrix(rows: Rows, buckets: int) -> csr_matrix:
    if len(rows.ids) and not 0 <= rows.ids.min() <= rows.ids.max() < buckets:
        raise UsageError(f"feature ids must be in [0, {buckets}): take them modulo the buckets")
    counts = np.diff(rows.starts)
    share = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    return csr_matrix((share, rows.ids, rows.starts), shape=(len(counts), buckets))
