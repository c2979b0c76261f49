"""What a transformer layer does between its matmuls: RMSNorm, rotary embedding, attention, gated units.

Every kernel takes and returns float32. Sums run in one fixed order that depends neither on the number of
threads nor on how the tokens are batched, and products are never fused with sums, so a token's result
is the same bits alone or in a batch, on every host. exp, tanh, cosine and sine are those of
`driftscope.kernels.elementary`, in float64, and what is made of them is rounded once to float32.

`driftscope.kernels.reference.forward` is the same in plain NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.elementary import cosine_and_sine, exp, tanh
from driftscope.kernels.jit import device, kernel
from driftscope.kernels.moments import LANES
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.row_sums import weighted_rows

F32 = NDArray[np.float32]

# Values that are not worth another thread.
_GRAIN = 1 << 18
_HEAD_GRAIN = 1 << 22

KV_TYPES = ("f32", "f16")
"""Types in which attention may hold its operands; see `attention`."""


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """Divide every row by its root mean square and multiply by the weight.

    The mean square is summed in float64 from the first channel to the last; the reciprocal root is rounded to
    float32 before it is used, as in ggml and transformers (Zhang and Sennrich 2019, equation 4).

    Args:
        x: ``float32[n, channels]``; the channels may be several heads of ``len(weight)`` channels each,
            which are then normalized one by one.
        weight: ``float32[head_channels]``.
        eps: added to the mean square.

    Returns:
        ``float32`` of the shape of `x`.
    """
    rows = np.ascontiguousarray(x).reshape(-1, weight.shape[0])
    out = np.empty(rows.shape, dtype=np.float32)
    _rms_norm(rows, weight, float(eps), out)
    return out.reshape(x.shape)


@kernel("void(R(float32, 2), R(float32, 1), float64, float32[:, ::1])")
def _rms_norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    n, channels = x.shape
    for i in range(n):
        total = 0.0
        for c in range(channels):
            value = np.float64(x[i, c])
            total += value * value
        scale = np.float32(1.0 / math.sqrt(total / channels + eps))
        for c in range(channels):
            out[i, c] = (x[i, c] * scale) * weight[c]


def rope_tables(frequencies: F32, n_positions: int, *, scale: float = 1.0) -> tuple[F32, F32]:
    """Cosine and sine of every rotary angle.

    The angle is the product of position and frequency in float32, as transformers forms it.

    Args:
        frequencies: ``float32[head_dim / 2]``, radians per position; no angle beyond 2^20.
        n_positions: positions 0 to ``n_positions - 1``.
        scale: factor of the rounded values, rounded again: the attention factor of YaRN.

    Returns:
        Two ``float32[n_positions, head_dim / 2]``.
    """
    angles = np.arange(n_positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    cosine, sine = np.empty_like(angles), np.empty_like(angles)
    _rope_tables(angles.reshape(-1), np.float32(scale), cosine.reshape(-1), sine.reshape(-1))
    return cosine, sine


@kernel("void(R(float32, 1), float32, float32[::1], float32[::1])")
def _rope_tables(angles, scale, cosine, sine):  # type: ignore[no-untyped-def]
    for i in range(angles.shape[0]):
        a, b = cosine_and_sine(np.float64(angles[i]))
        cosine[i] = np.float32(a) * scale
        sine[i] = np.float32(b) * scale


def rope(
    x: F32,
    cosine: F32,
    sine: F32,
    positions: NDArray[np.int64],
    *,
    interleaved: bool = False,
    head_dim: int | None = None,
) -> F32:
    """Rotate every head by the angles of its token's position (Su et al. 2021).

    Args:
        x: ``float32[n, heads * head_dim]``.
        cosine: from `rope_tables`, one column a pair of channels that is turned.
        sine: from `rope_tables`.
        positions: ``int64[n]``, the rows of the tables.
        interleaved: channel ``2 i`` of a head is paired with ``2 i + 1``, as in the paper and in ggml's
            normal mode; else channel ``i`` with the one behind it by the number of pairs (split-half), as in
            transformers. Rows of a weight that are stored for one pairing can be permuted for the other.
        head_dim: channels of a head, those behind the pairs stay as they are; None where all are turned.

    Returns:
        ``float32`` of the shape of `x`.
    """
    out = np.empty(x.shape, dtype=np.float32)
    width = head_dim or 2 * cosine.shape[1]
    _rope(np.ascontiguousarray(x), cosine, sine, positions, interleaved, width, out)
    return out


@kernel("void(R(float32, 2), R(float32, 2), R(float32, 2), R(int64, 1), boolean, int64, float32[:, ::1])")
def _rope(x, cosine, sine, positions, interleaved, head_dim, out):  # type: ignore[no-untyped-def]
    half = cosine.shape[1]
    for i in range(x.shape[0]):
        row = positions[i]
        for head in range(0, x.shape[1], head_dim):
            for c in range(head + 2 * half, head + head_dim):
                out[i, c] = x[i, c]
            if interleaved:
                for c in range(half):
                    a, b = x[i, head + 2 * c], x[i, head + 2 * c + 1]
                    out[i, head + 2 * c] = a * cosine[row, c] - b * sine[row, c]
                    out[i, head + 2 * c + 1] = b * cosine[row, c] + a * sine[row, c]
            else:
                for c in range(half):
                    a, b = x[i, head + c], x[i, head + half + c]
                    out[i, head + c] = a * cosine[row, c] - b * sine[row, c]
                    out[i, head + half + c] = b * cosine[row, c] + a * sine[row, c]


def silu(gate: F32, *, threads: int = 1) -> F32:
    """``x / (1 + exp(-x))`` of every value, in float64, rounded once."""
    return _of_each_value(_silu, gate, threads)


@kernel("void(R(float32, 1), float32[::1])")
def _silu(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        out[i] = np.float32(value / (1.0 + exp(-value)))


def gelu(gate: F32, *, threads: int = 1) -> F32:
    """GELU with the tanh of Hendrycks and Gimpel 2016, in float64, rounded once.

    ``x / (1 + exp(-2 u))`` with ``u = sqrt(2 / pi) (x + 0.044715 x^3)``, which is ``x (1 + tanh(u)) / 2``
    without its cancellation.
    """
    return _of_each_value(_gelu, gate, threads)


_MINUS_TWO_ROOTS = -2.0 * math.sqrt(2.0 / math.pi)


@kernel("void(R(float32, 1), float32[::1])")
def _gelu(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        out[i] = np.float32(
            value / (1.0 + exp(_MINUS_TWO_ROOTS * (value + 0.044715 * value * value * value)))
        )


def soft_cap(x: F32, cap: float, *, threads: int = 1) -> F32:
    """``cap * tanh(x / cap)`` of every value, in float64, rounded once (Gemma 2)."""
    return _of_each_value(lambda values, out: _soft_cap(values, float(cap), out), x, threads)


@kernel("void(R(float32, 1), float64, float32[::1])")
def _soft_cap(x, cap, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        out[i] = np.float32(cap * tanh(np.float64(x[i]) / cap))


def _of_each_value(work: Callable[[F32, F32], None], x: F32, threads: int) -> F32:
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty(flat.shape, dtype=np.float32)
    over_rows(
        lambda first, end: work(flat[first:end], out[first:end]), flat.size, threads=threads, grain=_GRAIN
    )
    return out.reshape(x.shape)


def swiglu(gate: F32, up: F32) -> F32:
    """``silu(gate) * up`` (Shazeer 2020, without the projections): silu is rounded, then multiplied."""
    product: F32 = silu(gate) * up
    return product


def geglu(gate: F32, up: F32) -> F32:
    """``gelu(gate) * up`` (Shazeer 2020, without the projections): gelu is rounded, then multiplied."""
    product: F32 = gelu(gate) * up
    return product


def attention(
    q: F32,
    k: F32,
    v: F32,
    starts: NDArray[np.int64],
    *,
    n_heads: int,
    n_kv_heads: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_type: str = "f32",
    threads: int = 1,
) -> F32:
    """Causal attention of several sequences, each over its own tokens.

    Head ``h`` reads the keys and values of head ``h // (n_heads / n_kv_heads)``. A score is the float32
    dot over the channels in order, times `scale`; the softmax takes off the row's maximum and sums in
    float64; the weighted sum runs over the keys in order in float32.

    Args:
        q: ``float32[n, n_heads * head_dim]``, after RoPE.
        k: ``float32[n, n_kv_heads * head_dim]``, after RoPE.
        v: ``float32[n, n_kv_heads * head_dim]``.
        starts: ``int64[n_sequences + 1]``, first token of each sequence, then n.
        n_heads: number of query heads.
        n_kv_heads: number of key and value heads; divides `n_heads`.
        scale: usually ``head_dim ** -0.5``.
        window: a query sees this many keys at most, its own included; None for all before it.
        soft_cap: a score s becomes ``soft_cap * tanh(s / soft_cap)`` before the mask, in float64, rounded
            once (Gemma 2); None for no cap.
        kv_type: ``f32``; or ``f16``, which does what ggml does over a float16 cache: k and v are rounded,
            and q and the softmax are rounded too, because ggml multiplies float16 with float16.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, n_heads * head_dim]``.
    """
    _check_kv_type(kv_type)
    if kv_type == "f16":
        q, k, v = to_f16(q), to_f16(k), to_f16(v)
    q, k, v = np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)
    out = np.empty(q.shape, dtype=np.float32)
    factor, cap, half = np.float32(scale), float(soft_cap or 0.0), kv_type == "f16"

    def work(first: int, end: int) -> None:
        _attention(q, k, v, starts, n_heads, n_kv_heads, factor, window or 0, cap, half, first, end, out)

    longest = int(np.diff(starts).max(initial=0))
    grain = _heads_at_once(longest, q.shape[1] // n_heads)
    over_rows(work, n_heads * (starts.shape[0] - 1), threads=threads, grain=grain)
    return out


def _heads_at_once(length: int, head_dim: int) -> int:
    """Heads whose products are worth a thread."""
    return max(1, _HEAD_GRAIN // max(1, length * length * head_dim))


def attention_scores(
    q: F32,
    k: F32,
    *,
    n_heads: int,
    n_kv_heads: int,
    scale: float,
    soft_cap: float | None = None,
    kv_type: str = "f32",
    threads: int = 1,
) -> F32:
    """Scores of one sequence, scaled and capped, before the mask: the bits that `attention` uses.

    Args:
        q: ``float32[t, n_heads * head_dim]``, after RoPE.
        k: ``float32[t, n_kv_heads * head_dim]``, after RoPE.
        n_heads: number of query heads.
        n_kv_heads: number of key heads.
        scale: as in `attention`.
        soft_cap: as in `attention`.
        kv_type: as in `attention`.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[t, n_heads * t]``: for each query, head by head, one score a key, keys to come included.
    """
    _check_kv_type(kv_type)
    if kv_type == "f16":
        q, k = to_f16(q), to_f16(k)
    q, k = np.ascontiguousarray(q), np.ascontiguousarray(k)
    out = np.empty((q.shape[0], n_heads * q.shape[0]), dtype=np.float32)
    factor, cap = np.float32(scale), float(soft_cap or 0.0)

    def work(first: int, end: int) -> None:
        _scores(q, k, n_heads, n_kv_heads, factor, cap, first, end, out)

    grain = _heads_at_once(q.shape[0], q.shape[1] // n_heads)
    over_rows(work, n_heads, threads=threads, grain=grain)
    return out


def attention_softmax(scores: F32, *, n_heads: int, window: int | None = None, threads: int = 1) -> F32:
    """Softmax of the scores of one sequence under the causal mask, the same bits that `attention` uses.

    Args:
        scores: ``float32[t, n_heads * t]`` from `attention_scores`.
        n_heads: number of query heads.
        window: as in `attention`.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[t, n_heads * t]``, zero where masked. With ``kv_type="f16"`` it is rounded to float16 only
        where it meets the values.
    """
    out = np.zeros(scores.shape, dtype=np.float32)
    scores = np.ascontiguousarray(scores)

    def work(first: int, end: int) -> None:
        _softmax(scores, n_heads, window or 0, first, end, out)

    over_rows(work, scores.shape[0], threads=threads, grain=max(1, _GRAIN // max(1, scores.shape[1])))
    return out


def to_f16(x: F32) -> F32:
    """Round to float16 and back; beyond 65504 becomes infinite, as in ggml."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _check_kv_type(kv_type: str) -> None:
    if kv_type not in KV_TYPES:
        raise ValueError(f"kv_type {kv_type!r}; expected one of {', '.join(KV_TYPES)}")


@device
def _first_key(query, window):  # type: ignore[no-untyped-def]
    if window > 0 and query + 1 > window:
        return query + 1 - window
    return 0


@device
def _score_row(q, kt, first, stop, scale, cap, out):  # type: ignore[no-untyped-def]
    # Channel by channel, with keys side by side in a vector.
    weighted_rows(q, kt, 0, q.shape[0], first, stop, out)
    for j in range(first, stop):
        out[j] = out[j] * scale
    if cap > 0.0:
        for j in range(first, stop):
            out[j] = np.float32(cap * tanh(np.float64(out[j]) / cap))


@device
def _largest(values, first, stop):  # type: ignore[no-untyped-def]
    # Four at a time, as one would wait for the other; a maximum has no order.
    a = b = c = d = np.float32(-np.inf)
    whole = stop - (stop - first) % 4
    for j in range(first, whole, 4):
        a = values[j] if values[j] > a else a
        b = values[j + 1] if values[j + 1] > b else b
        c = values[j + 2] if values[j + 2] > c else c
        d = values[j + 3] if values[j + 3] > d else d
    for j in range(whole, stop):
        a = values[j] if values[j] > a else a
    return max(max(a, b), max(c, d))


@device
def _softmax_row(scores, first, stop, out):  # type: ignore[no-untyped-def]
    # A NaN is never the maximum but makes the sum NaN, and so the whole row.
    largest = _largest(scores, first, stop)
    for j in range(first, stop):
        out[j] = np.float32(exp(np.float64(scores[j]) - np.float64(largest)))
    total = 0.0
    for j in range(first, stop):
        total += np.float64(out[j])
    for j in range(first, stop):
        out[j] = np.float32(np.float64(out[j]) / total)


@device
def _round_row_to_f16(values, bits, first, stop):  # type: ignore[no-untyped-def]
    # For values in [0, 1] and NaN, all that a softmax gives. Below 2^-14 float16 has a fixed step of
    # 2^-24, the step of float32 just under 1; above it, 13 bits of the significand go, to nearest even.
    for j in range(first, stop):
        if values[j] < np.float32(6.103515625e-05):
            values[j] = (values[j] + np.float32(0.75)) - np.float32(0.75)
        elif values[j] <= np.float32(1.0):
            rounded = bits[j] + np.uint32(0xFFF) + ((bits[j] >> np.uint32(13)) & np.uint32(1))
            bits[j] = np.uint32(rounded & np.uint32(0xFFFFE000))


@device
def _weighted_sum(weights, v, first, stop, out):  # type: ignore[no-untyped-def]
    # Value by value, with channels side by side in a vector.
    weighted_rows(weights, v, first, stop, 0, out.shape[0], out)


@device
def _in_vectors(count):  # type: ignore[no-untyped-def]
    return -(-count // LANES) * LANES


@device
def _transposed(k, begin, end, head, head_dim):  # type: ignore[no-untyped-def]
    kt = np.zeros((head_dim, _in_vectors(end - begin)), dtype=np.float32)
    for j in range(end - begin):
        for c in range(head_dim):
            kt[c, j] = k[begin + j, head * head_dim + c]
    return kt


@kernel(
    "void(R(float32, 2), R(float32, 2), R(float32, 2), R(int64, 1), "
    "int64, int64, float32, int64, float64, boolean, int64, int64, float32[:, ::1])"
)
def _attention(  # type: ignore[no-untyped-def]
    q, k, v, starts, n_heads, n_kv_heads, scale, window, cap, f16, first_unit, end_unit, out
):
    # A unit is one head of one sequence.
    head_dim = q.shape[1] // n_heads
    for unit in range(first_unit, end_unit):
        s, head = unit // n_heads, unit % n_heads
        kv_head = head // (n_heads // n_kv_heads)
        begin, end = starts[s], starts[s + 1]
        length = end - begin
        left, right = head * head_dim, (head + 1) * head_dim
        kt = _transposed(k, begin, end, kv_head, head_dim)
        values = np.zeros((length, _in_vectors(head_dim)), dtype=np.float32)
        for j in range(length):
            for c in range(head_dim):
                values[j, c] = v[begin + j, kv_head * head_dim + c]
        scores = np.empty(kt.shape[1], dtype=np.float32)
        sums = np.empty(values.shape[1], dtype=np.float32)
        weights = np.empty(length, dtype=np.float32)
        bits = weights.view(np.uint32)
        for i in range(length):
            first = _first_key(i, window)
            _score_row(q[begin + i, left:right], kt, first, i + 1, scale, cap, scores)
            _softmax_row(scores, first, i + 1, weights)
            if f16:
                _round_row_to_f16(weights, bits, first, i + 1)
            _weighted_sum(weights, values, first, i + 1, sums)
            out[begin + i, left:right] = sums[:head_dim]


@kernel("void(R(float32, 2), R(float32, 2), int64, int64, float32, float64, int64, int64, float32[:, ::1])")
def _scores(q, k, n_heads, n_kv_heads, scale, cap, first_head, end_head, out):  # type: ignore[no-untyped-def]
    length = q.shape[0]
    head_dim = q.shape[1] // n_heads
    group = n_heads // n_kv_heads
    kt = _transposed(k, 0, length, first_head // group, head_dim)
    row = np.empty(kt.shape[1], dtype=np.float32)
    for head in range(first_head, end_head):
        if head > first_head and head % group == 0:
            kt = _transposed(k, 0, length, head // group, head_dim)
        for i in range(length):
            _score_row(q[i, head * head_dim : (head + 1) * head_dim], kt, 0, length, scale, cap, row)
            out[i, head * length : (head + 1) * length] = row[:length]


@kernel("void(R(float32, 2), int64, int64, int64, int64, float32[:, ::1])")
def _softmax(scores, n_heads, window, first_query, end_query, out):  # type: ignore[no-untyped-def]
    length = scores.shape[0]
    for i in range(first_query, end_query):
        first = _first_key(i, window)
        for head in range(n_heads):
            left, right = head * length, (head + 1) * length
            _softmax_row(scores[i, left:right], first, i + 1, out[i, left:right])
