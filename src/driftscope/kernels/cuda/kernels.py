"""The kernels of `driftscope.kernels` on a CUDA device: same names, arguments, results and errors.

An array that lies on the device gives results that do; NumPy arrays give NumPy arrays. Results are the CPU's
bit for bit, but for the sums of `compare`, whose order is its own (``compare.cu``), and the payload of a NaN.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.activations import (
    ACTIVATION_FORMATS,
    QuantizedActivation,
    RoundedActivation,
)
from driftscope.kernels.compare import TensorComparison
from driftscope.kernels.cuda import sources
from driftscope.kernels.cuda.pooling import cells_of, largest_of, pooled
from driftscope.kernels.cuda.sources import Kernel
from driftscope.kernels.dequantize import dequantize as dequantize_on_host
from driftscope.kernels.expected_error import NONE, cell_kind
from driftscope.kernels.formats import format_of, row_columns
from driftscope.kernels.forward import _check_kv_type, rope_tables
from driftscope.kernels.matmul import check_factor
from driftscope.kernels.statistics import TapStatistics

Array = Any
"""A NumPy array or one of the device."""

_THREADS = 256
_TILE = 64
_ATTENTION_BLOCKS = 2048

# Values that a thread block of `compare` adds up, about.
_SLAB_VALUES = 1 << 14


class Card(Protocol):
    """What `CudaKernels` needs of a device (`driftscope.kernels.cuda.module.CupyCard`)."""

    name: str
    memory: int

    def owns(self, array: Any) -> bool: ...
    def upload(self, array: NDArray[Any]) -> Any: ...
    def download(self, array: Any) -> NDArray[Any]: ...
    def contiguous(self, array: Any, dtype: Any) -> Any: ...
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any: ...
    def full(self, shape: tuple[int, ...], value: Any, dtype: Any) -> Any: ...
    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, *arguments: Any) -> None: ...


class CudaKernels:
    """The kernels on one device. Weights that were used stay there, up to half of its memory."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self._resident: OrderedDict[tuple[str, ...], Any] = OrderedDict()
        self._resident_bytes = 0

    @property
    def device_name(self) -> str:
        """Name of the card."""
        return self.card.name

    # Arrays

    def to_device(self, array: Array) -> Array:
        """An array on the device, where it stays for the kernels that take it."""
        return array if self.card.owns(array) else self.card.upload(array)

    def to_host(self, array: Array) -> NDArray[Any]:
        """A NumPy array."""
        return self.card.download(array) if self.card.owns(array) else array

    def resident(self, key: tuple[str, ...], load: Callable[[], NDArray[np.uint8]]) -> Array:
        """Stored bytes on the device: those that `key` was last used for, else what `load` gives.

        The least recently used ones make room for others.
        """
        if key in self._resident:
            self._resident.move_to_end(key)
            return self._resident[key]
        array = self.card.upload(load())
        self._resident[key] = array
        self._resident_bytes += array.nbytes
        while self._resident_bytes > self.card.memory // 2 and len(self._resident) > 1:
            _, dropped = self._resident.popitem(last=False)
            self._resident_bytes -= dropped.nbytes
        return array

    def _in(self, array: Array, dtype: Any = np.float32) -> Any:
        if self.card.owns(array):
            return self.card.contiguous(array, dtype)
        return self.card.upload(np.ascontiguousarray(array, dtype))

    def _out(self, result: Any, *inputs: Array) -> Array:
        return result if any(self.card.owns(array) for array in inputs) else self.card.download(result)

    def _stored(self, raw: Array, dtype: str) -> tuple[Any, str, int]:
        """Rows on the device, their format there, and their columns."""
        columns = row_columns(dtype, raw.shape[1])
        if dtype in sources.NATIVE:
            return self._in(raw, np.uint8), dtype, columns
        values = dequantize_on_host(self.to_host(raw), dtype)
        return self._in(np.ascontiguousarray(values).view(np.uint8), np.uint8), "F32", columns

    # Weights

    def dequantize(self, raw: Array, dtype: str) -> Array:
        """See `driftscope.kernels.dequantize.dequantize`."""
        stored, kind, columns = self._stored(raw, dtype)
        out = self.card.empty((raw.shape[0], columns), np.float32)
        if out.size:
            count = _together(kind, columns)
            kernel = sources.dequantize(kind, count)
            grid = (_parts(out.size, count * _THREADS), 1)
            self.card.launch(kernel, grid, _THREADS, stored, np.int64(out.size), out)
        return self._out(out, raw)

    def quantize_activation(self, x: Array, fmt: str) -> RoundedActivation | QuantizedActivation:
        """See `driftscope.kernels.activations.quantize_activation`."""
        values = self._in(x)
        if fmt in ("none", "f16", "bf16"):
            return RoundedActivation(fmt, self._out(self._rounded(values, fmt), x))
        size, quants, d, s, _ = self._quantized(values, fmt)
        kept = self._out(s, x) if fmt.startswith("q8_1") else None
        return QuantizedActivation(fmt, size, self._out(quants, x), self._out(d, x), kept)

    def _rounded(self, values: Any, fmt: str) -> Any:
        if fmt == "none" or not values.size:
            return values
        out = self.card.empty(values.shape, np.float32)
        self._each(sources.QUANTIZE[fmt], values.size, values, np.int64(values.size), out)
        return out

    def _quantized(self, values: Any, fmt: str) -> tuple[int, Any, Any, Any, Any]:
        """Block size, quants, d, s (of d's shape; only blocks of 32 have it) and sums of 16 quants."""
        if fmt not in sources.QUANTIZE:
            known = ", ".join(ACTIVATION_FORMATS)
            raise InputError(f"activation format {fmt!r} is not known; known are {known}")
        kernel = sources.QUANTIZE[fmt]
        size = 32 if kernel.name.startswith("quantize_32") else 256
        n, k = values.shape
        if k % size:
            raise InputError(f"rows of {k} values cannot be {fmt}: expected a multiple of {size} values")
        quants = self.card.empty((n, k), np.int8)
        d = self.card.empty((n, k // size), np.float32)
        s = self.card.empty(d.shape, np.float32) if size == 32 else d
        sums = self.card.empty((n, k // 16), np.int16)
        outputs = (quants, d, s, sums) if size == 32 else (quants, d, sums)
        if d.size:
            grid = (_parts(d.size, _THREADS // 32), 1)
            self.card.launch(kernel, grid, _THREADS, values, np.int64(d.size), *outputs)
        return size, quants, d, s, sums

    # Matrix products

    def matmul_f32(self, x: Array, w: Array) -> Array:
        """See `driftscope.kernels.matmul.matmul_f32`."""
        rows = self._in(w)
        return self.matmul_f32_quantized(x, rows.view(np.uint8).reshape(w.shape[0], -1), "F32")

    def matmul_f32_quantized(self, x: Array, raw: Array, dtype: str) -> Array:
        """See `driftscope.kernels.matmul.matmul_f32_quantized`."""
        check_factor(x, row_columns(dtype, raw.shape[1]))
        stored, kind, columns = self._stored(raw, dtype)
        return self._out(self._multiply(self._in(x), stored, kind, raw.shape[0], columns), x)

    def _multiply(self, x: Any, stored: Any, kind: str, rows: int, columns: int) -> Any:
        n = x.shape[0]
        out = self.card.empty((n, rows), np.float32)
        if out.size:
            shapes = sources.MATMUL_SHAPES
            down, each, _ = next((shape for shape in shapes if n <= shape[2]), shapes[-1])
            kernel = sources.multiply(kind, _together(kind, columns), down, each)
            grid = (_parts(rows, down * each), _parts(n, _THREADS // down * each))
            sizes = (np.int32(n), np.int32(columns), np.int32(rows))
            self.card.launch(kernel, grid, _THREADS, stored, x, *sizes, out)
        return out

    def matmul_quantized(self, x: Array, raw: Array, dtype: str, *, activation: str | None = None) -> Array:
        """See `driftscope.kernels.matmul.matmul_quantized`."""
        layout = format_of(dtype)
        columns = row_columns(dtype, raw.shape[1])
        check_factor(x, columns)
        if activation is None and not layout.native:
            raise InputError(f"there is no integer dot product for {dtype}: choose a float activation format")
        fmt = layout.activation if activation is None else activation
        values = self._in(x)
        if fmt in ("none", "f16", "bf16"):
            stored, kind, _ = self._stored(raw, dtype)
            rounded = self._rounded(values, fmt)
            return self._out(self._multiply(rounded, stored, kind, raw.shape[0], columns), x)
        block, quants, d, s, sums = self._quantized(values, fmt)
        if not layout.is_integer:
            raise InputError(f"there is no integer dot product of {dtype} weights with {fmt}")
        n, rows = x.shape[0], raw.shape[0]
        out = self.card.empty((n, rows), np.float32)
        if not out.size:
            return self._out(out, x)
        stored = self._in(raw, np.uint8)
        size = sources.product_block(dtype, block)
        summed = layout.offset == "add" and fmt.startswith("q8_1")
        few = next((tokens for tokens in sources.FEW_TOKENS if n <= tokens), 0)
        if few:
            kernel = sources.dot_rows(dtype, size, summed, few)
            grid = (_parts(rows, _THREADS // 32), 1)
        else:
            parts = next((parts for parts in sources.TILE_PARTS if n <= 16 * parts), sources.TILE_PARTS[-1])
            kernel = sources.dot_tiles(dtype, size, summed, parts)
            grid = (_parts(rows, _TILE), _parts(n, 16 * parts))
        sizes = (np.int32(n), np.int32(columns), np.int32(block), np.int32(rows))
        factors = (quants, sums, d, s if summed else d)
        self.card.launch(kernel, grid, _THREADS, stored, *factors, *sizes, out)
        return self._out(out, x)

    # Measures

    def compare(
        self,
        a_raw: Array,
        a_dtype: str,
        b_raw: Array,
        b_dtype: str,
        *,
        rows_a: NDArray[np.int64] | None = None,
        rows_b: NDArray[np.int64] | None = None,
        transposed_a: bool = False,
        transposed_b: bool = False,
    ) -> TensorComparison:
        """See `driftscope.kernels.compare.compare`: equal counts and maxima, sums in another order."""
        order_a, order_b = _order(rows_a, a_raw.shape[0]), _order(rows_b, b_raw.shape[0])
        a, kind_a, width_a = self._stored(a_raw, a_dtype)
        b, kind_b, width_b = self._stored(b_raw, b_dtype)
        n_rows, columns = _turned(len(order_a), width_a, transposed_a)
        if (n_rows, columns) != _turned(len(order_b), width_b, transposed_b):
            rows, width = _turned(len(order_b), width_b, transposed_b)
            raise InputError(
                f"tensors of {n_rows} x {columns} and {rows} x {width} values "
                "cannot be compared: expected equal shapes"
            )
        slab = max(1, _SLAB_VALUES // max(1, columns))
        n_slabs = _parts(n_rows, slab) if columns else 0
        figures, tallies = np.zeros((n_slabs, 11)), np.zeros((n_slabs, 9), np.int64)
        layout = format_of(b_dtype)
        if n_slabs:
            on_device = self.card.empty(figures.shape, np.float64), self.card.empty(tallies.shape, np.int64)
            turned = (transposed_a, transposed_b)
            count = 1 if any(turned) else min(_together(kind_a, columns), _together(kind_b, columns))
            self.card.launch(
                sources.compare(kind_a, kind_b, cell_kind(layout), count, transposed=turned),
                (n_slabs, 1),
                _THREADS,
                *(a, self.card.upload(order_a), b, self.card.upload(order_b)),
                *(self.card.upload(cells_of(layout)), np.int64(n_rows), np.uint32(columns), np.uint32(slab)),
                *on_device,
            )
            figures, tallies = (self.card.download(array) for array in on_device)
        largest = (-1, np.nan, np.nan)
        if tallies[:, 0].any():
            # The values at the maximum are looked up on the host, in the first slab that has it.
            worst = int(np.argmax(np.where(tallies[:, 0] > 0, figures[:, 9], -1.0)))
            rows_of_slab = slice(worst * slab, min((worst + 1) * slab, n_rows))
            x = self._part(a_raw, a_dtype, order_a, rows_of_slab, transposed_a)
            y = self._part(b_raw, b_dtype, order_b, rows_of_slab, transposed_b)
            largest = largest_of(x, y, rows_of_slab.start * columns)
        energy_is_known = cell_kind(layout) != NONE
        return pooled(figures, tallies, n_rows * columns, largest, with_energy=energy_is_known)

    def _part(
        self, raw: Array, dtype: str, order: NDArray[np.int64], rows: slice, transposed: bool
    ) -> NDArray[np.float32]:
        """Some canonical rows, flat."""
        if not transposed:
            return dequantize_on_host(self._rows_on_host(raw, order[rows]), dtype).reshape(-1)
        return dequantize_on_host(self._rows_on_host(raw, order), dtype)[:, rows].T.reshape(-1)

    def _rows_on_host(self, raw: Array, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        chosen = raw[self.to_device(rows)] if self.card.owns(raw) else raw[rows]
        return np.ascontiguousarray(self.to_host(chosen))

    def tap_statistics(self, x: Array) -> TapStatistics:
        """See `driftscope.kernels.statistics.tap_statistics`; the result lies on the host."""
        values = self._in(x)
        n, channels = values.shape
        counts = self.card.full((n, 5), 0, np.int64)
        extremes = self.card.full((n, 2), np.nan, np.float32)
        moments = self.card.full((n, 2), 0.0, np.float64)
        if n:
            outputs = (counts, extremes, moments)
            self.card.launch(sources.STATISTICS, (n, 1), _THREADS, values, np.int64(channels), *outputs)
        finite, nans, infinite, zeros, peak = self.card.download(counts).T.copy()
        low, high = self.card.download(extremes).T.copy()
        mean, centred = self.card.download(moments).T.copy()
        return TapStatistics(channels, finite, nans, infinite, zeros, low, high, mean, centred, peak)

    # Between the matrix products; see `driftscope.kernels.forward`

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Divide every row by its root mean square and multiply by the weight."""
        values = self._in(x)
        out = self.card.empty(values.shape, np.float32)
        channels = weight.shape[0]
        if out.size:
            grid = (out.size // channels, 1)
            arguments = (values, self._in(weight), np.int32(channels), np.float64(eps), out)
            self.card.launch(sources.FORWARD["rms_norm"], grid, _THREADS, *arguments)
        return self._out(out, x)

    def rope_tables(
        self, frequencies: NDArray[np.float32], n_positions: int, *, scale: float = 1.0
    ) -> tuple[Array, Array]:
        """Cosine and sine of every rotary angle, made on the host, on the device."""
        cosine, sine = rope_tables(frequencies, n_positions, scale=scale)
        return self.card.upload(cosine), self.card.upload(sine)

    def rope(
        self,
        x: Array,
        cosine: Array,
        sine: Array,
        positions: Array,
        *,
        interleaved: bool = False,
        head_dim: int | None = None,
    ) -> Array:
        """Rotate every head by the angles of its token's position."""
        values = self._in(x)
        n, width = values.shape
        half = cosine.shape[1]
        channels = head_dim or 2 * half
        out = self.card.empty(values.shape, np.float32)
        if out.size:
            tables = (self._in(cosine), self._in(sine), self._in(positions, np.int64))
            sizes = (np.int64(n), *map(np.int32, (width, channels, half, interleaved)))
            self._each(sources.FORWARD["rope"], out.size, values, *tables, *sizes, out)
        return self._out(out, x)

    def silu(self, gate: Array) -> Array:
        """``x / (1 + exp(-x))`` of every value."""
        return self._of_each_value("silu", gate)

    def gelu(self, gate: Array) -> Array:
        """GELU of every value, with the tanh approximation."""
        return self._of_each_value("gelu", gate)

    def soft_cap(self, x: Array, cap: float) -> Array:
        """``cap * tanh(x / cap)`` of every value."""
        return self._of_each_value("soft_cap", x, np.float64(cap))

    def swiglu(self, gate: Array, up: Array) -> Array:
        """``silu(gate) * up``."""
        return self.silu(gate) * up

    def geglu(self, gate: Array, up: Array) -> Array:
        """``gelu(gate) * up``."""
        return self.gelu(gate) * up

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        starts: NDArray[np.int64],
        *,
        n_heads: int,
        n_kv_heads: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        kv_type: str = "f32",
    ) -> Array:
        """Causal attention of several sequences, each over its own tokens."""
        queries, keys, values = (self._of_kv_type(part, kv_type) for part in (q, k, v))
        out = self.card.empty(queries.shape, np.float32)
        n, width = queries.shape
        if out.size:
            lengths = np.diff(starts)
            longest = int(lengths.max())
            sequence_of = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
            blocks = min(n * n_heads, _ATTENTION_BLOCKS)
            heads = _heads(n_heads, n_kv_heads, width // n_heads, scale, soft_cap)
            self.card.launch(
                sources.FORWARD[f"attention<{str(kv_type == 'f16').lower()}>"],
                (blocks, 1),
                _THREADS,
                *(queries, keys, values, self._in(starts, np.int64), self._in(sequence_of, np.int64)),
                *(np.int64(n), *heads, np.int64(window or 0), np.int64(longest)),
                *(self.card.empty((blocks, longest), np.float32), out),
            )
        return self._out(out, q)

    def attention_scores(
        self,
        q: Array,
        k: Array,
        *,
        n_heads: int,
        n_kv_heads: int,
        scale: float,
        soft_cap: float | None = None,
        kv_type: str = "f32",
    ) -> Array:
        """Scaled, and where asked for capped, scores of one sequence before the mask."""
        queries, keys = self._of_kv_type(q, kv_type), self._of_kv_type(k, kv_type)
        length, width = queries.shape
        out = self.card.empty((length, n_heads * length), np.float32)
        if out.size:
            heads = _heads(n_heads, n_kv_heads, width // n_heads, scale, soft_cap)
            arguments = (queries, keys, np.int64(length), *heads, out)
            self._each(sources.FORWARD["attention_scores"], out.size, *arguments)
        return self._out(out, q)

    def attention_softmax(self, scores: Array, *, n_heads: int, window: int | None = None) -> Array:
        """Softmax of the scores of one sequence under the causal mask."""
        values = self._in(scores)
        length = values.shape[0]
        out = self.card.full(values.shape, 0, np.float32)
        if out.size:
            arguments = (values, np.int64(length), np.int32(n_heads), np.int64(window or 0), out)
            self.card.launch(
                sources.FORWARD["attention_softmax"], (length * n_heads, 1), _THREADS, *arguments
            )
        return self._out(out, scores)

    def _of_kv_type(self, x: Array, kv_type: str) -> Any:
        _check_kv_type(kv_type)
        return self._rounded(self._in(x), "f16" if kv_type == "f16" else "none")

    def _of_each_value(self, name: str, x: Array, *arguments: np.generic) -> Array:
        values = self._in(x)
        out = self.card.empty(values.shape, np.float32)
        if out.size:
            self._each(sources.FORWARD[name], out.size, values, np.int64(out.size), *arguments, out)
        return self._out(out, x)

    def _each(self, kernel: Kernel, count: int, *arguments: Any) -> None:
        self.card.launch(kernel, (_parts(count, _THREADS), 1), _THREADS, *arguments)


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def _together(kind: str, columns: int) -> int:
    """Values that a thread decodes at once."""
    return 4 if columns % 4 == 0 else 1


def _order(rows: NDArray[np.int64] | None, n_rows: int) -> NDArray[np.int64]:
    if rows is None:
        return np.arange(n_rows, dtype=np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < n_rows:
        raise ValueError(f"rows {rows.min()} to {rows.max()} of a tensor of {n_rows} rows")
    return np.ascontiguousarray(rows, np.int64)


def _turned(rows: int, columns: int, transposed: bool) -> tuple[int, int]:
    return (columns, rows) if transposed else (rows, columns)


def _heads(
    count: int, kv_count: int, channels: int, scale: float, soft_cap: float | None
) -> tuple[np.generic, ...]:
    shape = (np.int32(count), np.int32(kv_count), np.int32(channels))
    return (*shape, np.float32(scale), np.float64(soft_cap or 0.0))
