"""The ops of a transformer in float64: the truth that float32 and integer arithmetic are measured against.

Every sum runs in one fixed order that depends neither on the number of threads nor on the host: products
with weights from the first column to the last, vectors running across rows of weights; products are never
fused with sums. exp, cosine and sine are those of `driftscope.kernels.elementary`. Against float32 the
rounding of these kernels, some 1e-16 of a result, does not count.

`driftscope.kernels.reference.float64` is the same in plain NumPy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir as llvm
from numba.core import types
from numpy.typing import NDArray

from driftscope.kernels import ir
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.elementary import cosine_and_sine, exp, tanh
from driftscope.kernels.formats import row_columns
from driftscope.kernels.ir import F32, I64, Value, vector
from driftscope.kernels.jit import device, intrinsic, kernel
from driftscope.kernels.matmul import check_factor
from driftscope.kernels.parallel import over_rows

F64 = NDArray[np.float64]

_LANES = 8
_DEPTH = 256
# Values of weights that are held as float32 at a time.
_SLAB = 1 << 18
_GRAIN = 1 << 16
_DOUBLE = llvm.DoubleType()
_FOUR = vector(_DOUBLE, 4)


def matmul(x: NDArray[Any], w: NDArray[Any], *, threads: int = 1) -> F64:
    """``out[t, r] = sum over k of x[t, k] * w[r, k]`` in float64, k = 0 first, each operation rounded.

    Args:
        x: ``float[n, k]``, one row a token.
        w: ``float[r, k]``, one row an output.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float64[n, r]``.
    """
    check_factor(x, w.shape[1])
    x = np.ascontiguousarray(x, np.float64)
    out = np.zeros((x.shape[0], w.shape[0]))
    multiply = _multiply_f32 if w.dtype == np.float32 else _multiply_f64
    w = np.ascontiguousarray(w, np.float32 if w.dtype == np.float32 else np.float64)
    over_rows(
        lambda first, end: multiply(x, w, first, end, 0, out), w.shape[0], threads=threads, grain=_LANES
    )
    return out


def matmul_stored(x: NDArray[Any], raw: NDArray[np.uint8], dtype: str, *, threads: int = 1) -> F64:
    """`matmul` with stored rows of any format, dequantized a few at a time.

    Args:
        x: ``float[n, k]``.
        raw: ``uint8[r, row_bytes]``, the stored rows.
        dtype: format name, see `driftscope.kernels.formats`.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float64[n, r]``, bit for bit ``matmul(x, dequantize(raw, dtype))``.

    Raises:
        InputError: unknown format, or a row that does not have k values.
    """
    check_factor(x, row_columns(dtype, raw.shape[1]))
    x = np.ascontiguousarray(x, np.float64)
    out = np.zeros((x.shape[0], raw.shape[0]))
    slab = max(1, _SLAB // max(1, x.shape[1]) // _LANES) * _LANES

    def work(first: int, end: int) -> None:
        for start in range(first, end, slab):
            stop = min(end, start + slab)
            rows = np.ascontiguousarray(dequantize(raw[start:stop], dtype))
            _multiply_f32(x, rows, 0, stop - start, start, out)

    over_rows(work, raw.shape[0], threads=threads, grain=_LANES)
    return out


def _add_products(tokens: int) -> Any:
    """An intrinsic: ``sums[t, r] += x[t, k] * panel[k, r]`` for `tokens` t, eight r and `count` k."""

    def define(_context: Any, x: Any, at: Any, step: Any, panel: Any, sums: Any, to: Any, count: Any) -> Any:
        size = types.intp
        result = types.void(x, size, size, panel, sums, size, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, at, step, panel, sums, to, count = arguments
            kinds = signature.args
            base = ir.element(context, builder, kinds[0], x, at)
            rows = [builder.gep(base, [builder.mul(step, step.type(t))]) for t in range(tokens)]
            weights = ir.element(context, builder, kinds[3], panel, I64(0))
            target = ir.element(context, builder, kinds[4], sums, to)
            places = [ir.offset(builder, target, _LANES * t + 4 * h) for t in range(tokens) for h in range(2)]

            def product(k: Value, before: list[Value]) -> list[Value]:
                start = ir.offset(builder, weights, builder.mul(k, I64(_LANES)))
                pair = [ir.load(builder, ir.offset(builder, start, 4 * h), _FOUR) for h in range(2)]
                after = []
                for t in range(tokens):
                    factor = ir.splat(builder, builder.load(builder.gep(rows[t], [k])), 4)
                    for h in range(2):
                        after.append(builder.fadd(before[2 * t + h], builder.fmul(factor, pair[h])))
                return after

            start = [ir.load(builder, place, _FOUR) for place in places]
            for place, value in zip(places, ir.loop(builder, count, start, product), strict=True):
                ir.store(builder, value, place)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# Six tokens by eight rows: twelve sums of four lanes leave four registers of AVX2 to the factors.
_add_six, _add_three, _add_one = (_add_products(tokens) for tokens in (6, 3, 1))


@intrinsic
def _widen_rows(_context: Any, w: Any, at: Any, step: Any, panel: Any, to: Any) -> Any:
    """``panel[to + 8 c + r] = w[at + r * step + c]`` for eight rows r and eight columns c, f32 to f64."""
    size = types.intp
    result = types.void(w, size, size, panel, size)
    eight = vector(F32, 8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, at, step, panel, to = arguments
        base = ir.element(context, builder, signature.args[0], w, at)
        rows = [
            ir.load(builder, builder.gep(base, [builder.mul(step, step.type(r))]), eight) for r in range(8)
        ]

        def zipped(a: Value, b: Value) -> list[Value]:
            order = [i for k in range(8) for i in (k, 8 + k)]
            return [ir.shuffle(builder, a, b, order[:8]), ir.shuffle(builder, a, b, order[8:])]

        # Three rounds of zipping the first half with the second half transpose eight by eight.
        for _ in range(3):
            rows = [part for r in range(4) for part in zipped(rows[r], rows[r + 4])]
        target = ir.element(context, builder, signature.args[3], panel, to)
        for c, column in enumerate(rows):
            wide = builder.fpext(column, vector(_DOUBLE, 8))
            ir.store(builder, wide, ir.offset(builder, target, 8 * c))
        return context.get_dummy_value()

    return result, generate


@device
def _multiply_panel(x: Any, column: int, panel: Any, sums: Any, count: int) -> None:
    n, k = x.shape
    t = 0
    while t + 6 <= n:
        _add_six(x, t * k + column, k, panel, sums, t * _LANES, count)
        t += 6
    if t + 3 <= n:
        _add_three(x, t * k + column, k, panel, sums, t * _LANES, count)
        t += 3
    while t < n:
        _add_one(x, t * k + column, k, panel, sums, t * _LANES, count)
        t += 1


@device
def _store(sums: Any, n_rows: int, out: Any, to: int) -> None:
    for t in range(out.shape[0]):
        for r in range(n_rows):
            out[t, to + r] = sums[t, r]


@kernel("void(f8[:,::1], R(f4, 2), int64, int64, int64, f8[:,::1])")
def _multiply_f32(x: Any, w: Any, first: int, end: int, to: int, out: Any) -> None:
    """Columns ``to + first .. to + end`` of `out` from rows ``first .. end`` of `w`."""
    k = x.shape[1]
    panel = np.zeros((_DEPTH, _LANES))
    sums = np.empty((x.shape[0], _LANES))
    for row in range(first, end, _LANES):
        n_rows = min(_LANES, end - row)
        sums[:] = 0.0
        for start in range(0, k, _DEPTH):
            count = min(_DEPTH, k - start)
            whole = count // 8 * 8 if n_rows == _LANES else 0
            for c in range(0, whole, 8):
                _widen_rows(w, row * k + start + c, k, panel, c * _LANES)
            for r in range(n_rows):
                for c in range(whole, count):
                    panel[c, r] = np.float64(w[row + r, start + c])
            _multiply_panel(x, start, panel, sums, count)
        _store(sums, n_rows, out, to + row)


@kernel("void(f8[:,::1], f8[:,::1], int64, int64, int64, f8[:,::1])")
def _multiply_f64(x: Any, w: Any, first: int, end: int, to: int, out: Any) -> None:
    """As `_multiply_f32`."""
    k = x.shape[1]
    panel = np.zeros((_DEPTH, _LANES))
    sums = np.empty((x.shape[0], _LANES))
    for row in range(first, end, _LANES):
        n_rows = min(_LANES, end - row)
        sums[:] = 0.0
        for start in range(0, k, _DEPTH):
            count = min(_DEPTH, k - start)
            for r in range(n_rows):
                for c in range(count):
                    panel[c, r] = w[row + r, start + c]
            _multiply_panel(x, start, panel, sums, count)
        _store(sums, n_rows, out, to + row)


def rms_norm(x: NDArray[Any], weight: NDArray[Any], eps: float) -> F64:
    """Divide every row by its root mean square and multiply by the weight.

    Args:
        x: ``float[n, channels]``; the channels may be several heads of ``len(weight)`` channels each, which
            are then normalized one by one.
        weight: ``float[head_channels]``.
        eps: added to the mean square.

    Returns:
        ``float64`` of the shape of `x`.
    """
    rows = np.ascontiguousarray(x, np.float64).reshape(-1, weight.shape[0])
    scale = np.sqrt(_sums_of_squares(rows)[:, None] / rows.shape[1] + eps)
    found: F64 = (rows / scale * weight.astype(np.float64)).reshape(x.shape)
    return found


def _sums_of_squares(rows: F64) -> F64:
    out = np.empty(rows.shape[0])
    _square_rows(rows, out)
    return out


@kernel("void(f8[:,::1], f8[::1])")
def _square_rows(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        total = 0.0
        for c in range(x.shape[1]):
            total += x[i, c] * x[i, c]
        out[i] = total


def rope_tables(frequencies: F64, n_positions: int, *, scale: float = 1.0) -> tuple[F64, F64]:
    """Cosine and sine of every rotary angle, the product of position and frequency.

    The angle is rounded once, to float64; half a turn of a million is good to ten digits.

    Args:
        frequencies: ``float64[head_dim / 2]``, radians per position; no angle beyond 2^20.
        n_positions: positions 0 to ``n_positions - 1``.
        scale: factor of the values: the attention factor of YaRN.

    Returns:
        Two ``float64[n_positions, head_dim / 2]``.
    """
    angles = np.arange(n_positions, dtype=np.float64)[:, None] * frequencies.astype(np.float64)[None, :]
    cosine, sine = np.empty_like(angles), np.empty_like(angles)
    _turn(angles.reshape(-1), cosine.reshape(-1), sine.reshape(-1))
    return cosine * scale, sine * scale


@kernel("void(f8[::1], f8[::1], f8[::1])")
def _turn(angles: Any, cosine: Any, sine: Any) -> None:
    # Only the leading bits of an angle may meet the reduction to a quarter turn; the rest is a small
    # angle that is added by the theorems of addition, whose series need no more than two terms.
    for i in range(angles.shape[0]):
        head = np.float64(np.float32(angles[i]))
        rest = angles[i] - head
        a, b = cosine_and_sine(head)
        square = rest * rest
        c, s = 1.0 - square * (0.5 - square / 24.0), rest * (1.0 - square / 6.0)
        cosine[i] = a * c - b * s
        sine[i] = b * c + a * s


def rope(
    x: NDArray[Any],
    cosine: F64,
    sine: F64,
    positions: NDArray[np.int64],
    *,
    head_dim: int | None = None,
) -> F64:
    """Rotate every head by the angles of its token's position, split halves of what is turned.

    Args:
        x: ``float[n, heads * head_dim]``.
        cosine: from `rope_tables`, one column a pair of channels that is turned.
        sine: from `rope_tables`.
        positions: ``int64[n]``, the rows of the tables.
        head_dim: channels of a head, those behind the pairs stay as they are; None where all are turned.

    Returns:
        ``float64`` of the shape of `x`.
    """
    half = cosine.shape[1]
    heads = np.asarray(x, np.float64).reshape(x.shape[0], -1, head_dim or 2 * half)
    a, b, rest = heads[:, :, :half], heads[:, :, half : 2 * half], heads[:, :, 2 * half :]
    c, s = cosine[positions][:, None, :], sine[positions][:, None, :]
    return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=2).reshape(x.shape)


def scores(
    q: NDArray[Any],
    k: NDArray[Any],
    *,
    n_heads: int,
    n_kv_heads: int,
    scale: float,
    soft_cap: float | None = None,
    threads: int = 1,
) -> F64:
    """Scores of one sequence, scaled and capped, before the mask.

    Args:
        q: ``float[t, n_heads * head_dim]``, after RoPE.
        k: ``float[t, n_kv_heads * head_dim]``, after RoPE.
        n_heads: number of query heads; head ``h`` reads the keys of head ``h // (n_heads / n_kv_heads)``.
        n_kv_heads: number of key heads.
        scale: usually ``head_dim ** -0.5``.
        soft_cap: a score s becomes ``soft_cap * tanh(s / soft_cap)``; None for no cap.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float64[t, n_heads * t]``, head by head one score a key, keys to come included.
    """
    width, group = q.shape[1] // n_heads, n_heads // n_kv_heads
    found = []
    for head in range(n_heads):
        keys = k[:, head // group * width : (head // group + 1) * width]
        found.append(matmul(q[:, head * width : (head + 1) * width], keys, threads=threads) * scale)
    together = np.concatenate(found, axis=1)
    return capped(together, soft_cap) if soft_cap else together


def softmax(scores: NDArray[Any], *, n_heads: int, window: int | None = None, threads: int = 1) -> F64:
    """Softmax of the scores of one sequence under the causal mask.

    Args:
        scores: ``float[t, n_heads * t]``.
        n_heads: number of query heads.
        window: a query sees this many keys at most, its own included; None for all before it.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float64[t, n_heads * t]``, zero where masked.
    """
    values = np.ascontiguousarray(scores, np.float64)
    out = np.zeros(values.shape)

    def work(first: int, end: int) -> None:
        _softmax(values, n_heads, window or 0, first, end, out)

    over_rows(work, values.shape[0], threads=threads, grain=max(1, _GRAIN // max(1, values.shape[1])))
    return out


@kernel("void(f8[:,::1], int64, int64, int64, int64, f8[:,::1])")
def _softmax(scores: Any, n_heads: int, window: int, first_query: int, end_query: int, out: Any) -> None:
    length = scores.shape[0]
    for i in range(first_query, end_query):
        begin = i + 1 - window if window > 0 and i + 1 > window else 0
        for head in range(n_heads):
            row = scores[i, head * length : (head + 1) * length]
            into = out[i, head * length : (head + 1) * length]
            largest = -np.inf
            for j in range(begin, i + 1):
                largest = row[j] if row[j] > largest else largest
            total = 0.0
            for j in range(begin, i + 1):
                # What is below the range of `exp` is nothing, as a mask that was added to the scores.
                into[j] = exp(row[j] - largest) if row[j] - largest > -708.0 else 0.0
                if row[j] != row[j]:
                    into[j] = np.nan
                total += into[j]
            for j in range(begin, i + 1):
                into[j] = into[j] / total


def weigh(weights: NDArray[Any], v: NDArray[Any], *, n_heads: int, n_kv_heads: int, threads: int = 1) -> F64:
    """Weighted sum of the values of one sequence.

    Args:
        weights: ``float[t, n_heads * t]`` from `softmax`.
        v: ``float[t, n_kv_heads * head_dim]``.
        n_heads: number of query heads.
        n_kv_heads: number of value heads.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float64[t, n_heads * head_dim]``.
    """
    length, width, group = v.shape[0], v.shape[1] // n_kv_heads, n_heads // n_kv_heads
    found = []
    for head in range(n_heads):
        values = np.ascontiguousarray(v[:, head // group * width : (head // group + 1) * width].T)
        found.append(matmul(weights[:, head * length : (head + 1) * length], values, threads=threads))
    return np.concatenate(found, axis=1)


def capped(x: NDArray[Any], cap: float) -> F64:
    """``cap * tanh(x / cap)`` of every value, ``float64`` of the shape of `x`."""
    values = np.ascontiguousarray(x, np.float64)
    out = np.empty(values.shape)
    _cap(values.reshape(-1), float(cap), out.reshape(-1))
    return out


@kernel("void(f8[::1], f8, f8[::1])")
def _cap(x: Any, cap: float, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = cap * tanh(x[i] / cap)


def silu(x: NDArray[Any]) -> F64:
    """``x / (1 + exp(-x))`` of every value, ``float64`` of the shape of `x`."""
    values = np.ascontiguousarray(x, np.float64)
    out = np.empty(values.shape)
    _silu(values.reshape(-1), out.reshape(-1))
    return out


def gelu(x: NDArray[Any]) -> F64:
    """GELU with the tanh approximation of every value, ``float64`` of the shape of `x`.

    The form is that of `driftscope.kernels.forward.gelu`.
    """
    values = np.ascontiguousarray(x, np.float64)
    out = np.empty(values.shape)
    _gelu(values.reshape(-1), out.reshape(-1))
    return out


_MINUS_TWO_ROOTS = -2.0 * math.sqrt(2.0 / math.pi)


@kernel("void(f8[::1], f8[::1])")
def _gelu(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = x[i] / (1.0 + exp(_MINUS_TWO_ROOTS * (x[i] + 0.044715 * x[i] * x[i] * x[i])))


@kernel("void(f8[::1], f8[::1])")
def _silu(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = x[i] / (1.0 + exp(-x[i]))
