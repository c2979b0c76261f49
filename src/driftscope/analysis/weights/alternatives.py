"""What a tensor of b might be instead of a's of the same name: the transforms that a search tries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from driftscope.analysis.weights.pairs import EMBEDDING, HEAD
from driftscope.analysis.weights.tensor_rows import F32, Rows, matrix_shape, rows_of
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import layer_of
from driftscope.artifacts.tensor import TensorRef

Change = Callable[[F32], F32]

# An offset this near to a whole number is taken for it.
_WHOLE = 1e-3


@dataclass(frozen=True)
class Alternative:
    """One way in which b's tensor might come from a's.

    Attributes:
        transform: its name.
        source: the tensor of a that b's values are looked for in.
        order: row of the source for each row of b, or None where they are the same. Rows of a vector are its
            values.
        change: what is done to the source's values, or None.
        transposed: whether b's rows are the source's columns.
        skipped: rows of b before the first that comes from the source.
        count: rows of b that come from the source, or None for all.
    """

    transform: str
    source: TensorRef
    order: Rows | None = None
    change: Change | None = None
    transposed: bool = False
    skipped: int = 0
    count: int | None = None


def alternatives(
    tensor: str, a: Artifact, b: Artifact, ref_a: TensorRef, ref_b: TensorRef
) -> Iterator[Alternative]:
    """The alternatives for one tensor, likelier ones first; those of other layers are not among them.

    Args:
        tensor: its canonical name.
        a: the teacher.
        b: the candidate.
        ref_a: the teacher's tensor.
        ref_b: the candidate's.
    """
    rows_a, columns_a = matrix_shape(ref_a.shape)
    rows_b, columns_b = matrix_shape(ref_b.shape)
    same = ref_a.shape == ref_b.shape
    if same and ".self_attn." in tensor and tensor.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        yield from _row_orders(ref_a, rows_a, _head_counts(tensor, a, rows_a))
    if len(ref_a.shape) == 2 and ref_a.shape == ref_b.shape[::-1]:
        yield Alternative("transposed", ref_a, transposed=True)
    if same and len(ref_a.shape) == 1:
        yield from _changed_values(ref_a, ref_b)
    elif same:
        yield Alternative("negated", ref_a, change=_negated)
    yield from _of_the_same_layer(tensor, a, ref_b)
    if tensor in (EMBEDDING, HEAD):
        # The copy may have been made of the one that b stores, which was rounded before.
        for model in (a, b):
            other = model.tensors.get(HEAD if tensor == EMBEDDING else EMBEDDING)
            if other is not None and other not in (ref_a, ref_b) and other.shape == ref_b.shape:
                yield Alternative("tied", other)
    if columns_a == columns_b and rows_a != rows_b and len(ref_a.shape) == len(ref_b.shape) == 2:
        yield from _other_row_counts(ref_a, rows_a, rows_b)


def other_layers(tensor: str, a: Artifact, ref_b: TensorRef) -> Iterator[Alternative]:
    """The tensors of the same name in every other layer of a."""
    layer = layer_of(tensor)
    if layer is None:
        return
    suffix = tensor.removeprefix(f"model.layers.{layer}.")
    for other in range(a.config.num_layers):
        source = a.tensors.get(f"model.layers.{other}.{suffix}")
        if other != layer and source is not None and source.shape == ref_b.shape:
            yield Alternative(f"other-layer({other})", source)


def interleaved(n_rows: int, heads: int) -> Rows:
    """Row of the model for each row in GGUF's order: 2j + s of a head is its row s * head_dim / 2 + j."""
    return np.arange(n_rows, dtype=np.int64).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def deinterleaved(n_rows: int, heads: int) -> Rows:
    """The inverse of `interleaved`."""
    return np.arange(n_rows, dtype=np.int64).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _head_counts(tensor: str, a: Artifact, n_rows: int) -> list[int]:
    """Numbers of heads that so many rows can be: the tensor's own first, then the other's, then others."""
    of_q, of_k = a.config.num_heads, a.config.num_kv_heads
    first = [of_q, of_k] if "q_proj" in tensor else [of_k, of_q]
    rest = [heads for heads in range(1, n_rows // 2) if n_rows % (2 * heads) == 0 and n_rows // heads > 2]
    return list(dict.fromkeys([heads for heads in first if heads in rest] + rest))


def _row_orders(source: TensorRef, n_rows: int, counts: list[int]) -> Iterator[Alternative]:
    for heads in counts:
        yield Alternative(f"rows-interleaved({heads})", source, order=interleaved(n_rows, heads))
        yield Alternative(f"rows-deinterleaved({heads})", source, order=deinterleaved(n_rows, heads))
    # Stored for one number of heads and put back for another.
    back = deinterleaved(n_rows, counts[0]) if counts else None
    for heads in counts[1:]:
        name = f"rows-interleaved({heads})+rows-deinterleaved({counts[0]})"
        yield Alternative(name, source, order=interleaved(n_rows, heads)[back])


def _changed_values(ref_a: TensorRef, ref_b: TensorRef) -> Iterator[Alternative]:
    x, y = (rows_of(ref).reshape(-1).astype(np.float64) for ref in (ref_a, ref_b))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return
    offset = float(np.median(y - x))
    if abs(offset - round(offset)) < _WHOLE:
        offset = float(round(offset))
    for constant in dict.fromkeys((1.0, -1.0, offset)):
        if constant:
            yield Alternative(f"offset{constant:+.6g}", ref_a, change=partial(_plus, constant))
    yield Alternative("negated", ref_a, change=_negated)
    yield Alternative("negated-exponential", ref_a, change=_negated_exponential)
    yield Alternative("logarithm-of-negated", ref_a, change=_logarithm_of_negated)


def _of_the_same_layer(tensor: str, a: Artifact, ref_b: TensorRef) -> Iterator[Alternative]:
    layer = layer_of(tensor)
    if layer is None:
        return
    prefix = f"model.layers.{layer}."
    for name, source in a.tensors.items():
        if name != tensor and name.startswith(prefix) and source.shape == ref_b.shape:
            yield Alternative(f"other-tensor({name.removeprefix(prefix)})", source)


def _other_row_counts(source: TensorRef, rows_a: int, rows_b: int) -> Iterator[Alternative]:
    if rows_b < rows_a:
        yield Alternative(f"rows-cut({rows_a}->{rows_b})", source)
        return
    yield Alternative(f"rows-padded({rows_a}->{rows_b})", source, count=rows_a)
    last = rows_b - rows_a
    yield Alternative(f"fused(rows {last}-{rows_b - 1} of {rows_b})", source, skipped=last, count=rows_a)


def _plus(constant: float, values: F32) -> F32:
    return values + np.float32(constant)


def _negated(values: F32) -> F32:
    return -values


def _negated_exponential(values: F32) -> F32:
    with np.errstate(over="ignore"):
        return (-np.exp(values.astype(np.float64))).astype(np.float32)


def _logarithm_of_negated(values: F32) -> F32:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(-values.astype(np.float64)).astype(np.float32)
