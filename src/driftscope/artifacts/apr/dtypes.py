"""The dtypes of an .apr file: their codes and sizes, and the tensors that hold them.

Four of them are no rows of blocks that a kernel reads: AprQ4 runs its blocks through the whole tensor, AprQ8
has one scale for all of it, rows of K-quants are padded to whole blocks, and integers have no format here.
`AprTensor.raw` gives these in a format that holds the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

APR_Q4, APR_Q8 = "AprQ4", "AprQ8"

# 8 and 9 are what older files say for 128 and 129.
NAMES: dict[int, str] = {
    0: "F32",
    1: "F16",
    3: "F64",
    4: "I32",
    5: "I64",
    6: "I8",
    7: "U8",
    8: APR_Q4,
    9: APR_Q8,
    12: "Q4_K",
    14: "Q6_K",
    30: "BF16",
    128: APR_Q4,
    129: APR_Q8,
}
CODES: dict[str, int] = {name: code for code, name in NAMES.items()}
QUANTIZED = frozenset({APR_Q4, APR_Q8, "Q4_K", "Q6_K"})

_VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
_K_BLOCK = 256
_K_BLOCK_BYTES = {"Q4_K": 144, "Q6_K": 210}
_Q4_BLOCK = 32
_Q4_BLOCK_BYTES = 18
_Q8_K_BYTES = 292
_SCALE_BYTES = 4

# Blocks of AprQ4 that are unpacked at a time, so that memory beside the result stays small.
_Q4_BLOCKS_AT_ONCE = 2**18
# Values of which the steps are looked at, at a time; a multiple of 32.
_VALUES_AT_ONCE = 2**22
# float64 holds every whole number up to here.
_MAX_WHOLE = 2**53


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file.

    Args:
        dtype: a value of `NAMES`.
        shape: in numpy order; a K-quant's rows run along the last axis.
    """
    count = prod(shape)
    if dtype in _VALUE_BYTES:
        return count * _VALUE_BYTES[dtype]
    if not count:
        return 0
    if dtype == APR_Q4:
        return -(-count // _Q4_BLOCK) * _Q4_BLOCK_BYTES
    if dtype == APR_Q8:
        return _SCALE_BYTES + count
    columns = shape[-1] if shape else 1
    return count // columns * -(-columns // _K_BLOCK) * _K_BLOCK_BYTES[dtype]


def format_read_as(dtype: str, shape: tuple[int, ...]) -> str:
    """The format of `driftscope.kernels.formats` in which a stored tensor is read, values unchanged.

    A block of AprQ4 holds what ggml's Q4_0 holds, the values in another order; the scale of AprQ8 is that of
    each of a Q8_K tensor's blocks. Where a row is no whole number of these, the values are read as F32.
    """
    columns = shape[-1]
    if dtype == APR_Q4:
        return "F32" if columns % _Q4_BLOCK else "Q4_0"
    if dtype == APR_Q8:
        return "F32" if columns % _K_BLOCK else "Q8_K"
    if dtype in _K_BLOCK_BYTES:
        return "F32" if columns % _K_BLOCK else dtype
    if dtype in _INTEGERS:
        return "F64" if _VALUE_BYTES[dtype] > 1 else "F32"
    return dtype


@dataclass(frozen=True)
class AprTensor(TensorRef):
    """A tensor of an .apr file whose stored bytes are no rows of its `dtype`.

    Attributes:
        stored_dtype: the dtype of the file; `dtype` is that of `raw`, with the same values.
    """

    stored_dtype: str = field(default="", kw_only=True)

    def raw(self) -> U8:
        """The values as ``uint8[n_rows, bytes_per_row]`` of `dtype`, in stored row order.

        Raises:
            InputError: the file cannot be read, or an I64 value is too large for float64.
        """
        stored = self.stored_bytes()
        if self.dtype == "Q4_0":
            found = q4_0_of_apr_q4(stored)
        elif self.dtype == "Q8_K":
            found = _q8_k_of_apr_q8(stored)
        elif self.stored_dtype == APR_Q4:
            found = dequantize_q4(stored, self.n_elements).view(np.uint8)
        elif self.stored_dtype == APR_Q8:
            found = dequantize_q8(stored).view(np.uint8)
        elif self.stored_dtype in _INTEGERS:
            found = self._whole_numbers(stored).view(np.uint8)
        else:
            found = self._k_values(np.ascontiguousarray(stored.reshape(self.n_rows, -1))).view(np.uint8)
        return found.reshape(self.n_rows, -1)

    def usual_nmse(self) -> float | None:
        """The NMSE of values rounded to the steps that are stored: a twelfth of a step's square for each.

        Returns:
            None for integers, which are no quantization, and where all values are zero.
        """
        if self.stored_dtype in _INTEGERS:
            return None
        energy = signal = 0.0
        for steps, values in self._steps_and_values():
            energy += _squares(steps) / 12.0
            signal += _squares(values)
        return energy / signal if signal > 0 and np.isfinite(energy / signal) else None

    def _steps_and_values(self) -> Iterator[tuple[F32, F32]]:
        """Step of each value, and the values, a bounded number at a time."""
        stored = self.stored_bytes()
        if self.stored_dtype == APR_Q8:
            scale, quants = stored[:_SCALE_BYTES], stored[_SCALE_BYTES:]
            for start in range(0, quants.size, _VALUES_AT_ONCE):
                values = dequantize_q8(np.concatenate((scale, quants[start : start + _VALUES_AT_ONCE])))
                yield np.full_like(values, scale.view("<f4")[0]), values
        elif self.stored_dtype == APR_Q4:
            size = _VALUES_AT_ONCE // _Q4_BLOCK * _Q4_BLOCK_BYTES
            for start in range(0, stored.size, size):
                part = stored[start : start + size]
                count = min(_VALUES_AT_ONCE, self.n_elements - start // _Q4_BLOCK_BYTES * _Q4_BLOCK)
                steps = np.repeat(_q4_scales(part.reshape(-1, _Q4_BLOCK_BYTES)), _Q4_BLOCK)
                yield steps[:count], dequantize_q4(part, count)
        else:
            rows = stored.reshape(self.n_rows, -1)
            count = max(1, _VALUES_AT_ONCE // self.shape[-1])
            for start in range(0, self.n_rows, count):
                part = np.ascontiguousarray(rows[start : start + count])
                yield self._k_steps(part), self._k_values(part)

    def _k_steps(self, rows: U8) -> F32:
        """Step of each value of a K-quant's rows, ``float32[n, columns]``."""
        from driftscope.kernels.formats import format_of
        from driftscope.kernels.unpack import UnpackedRows, check_raw

        layout = format_of(self.stored_dtype)
        raw, columns = check_raw(rows, self.stored_dtype)
        unpacked = UnpackedRows.empty(layout, rows.shape[0], columns)
        unpacked.fill(raw, 0, rows.shape[0])
        with np.errstate(invalid="ignore"):
            scales = np.repeat(unpacked.d, layout.block_size // layout.sub_block, axis=1) * unpacked.scales
        return np.asarray(np.repeat(scales, layout.sub_block, axis=1)[:, : self.shape[-1]], dtype=np.float32)

    def _k_values(self, rows: U8) -> F32:
        """Values of a K-quant's rows without their padding, ``float32[n, columns]``."""
        from driftscope.kernels.dequantize import dequantize

        return np.ascontiguousarray(dequantize(rows, self.stored_dtype)[:, : self.shape[-1]])

    def _whole_numbers(self, stored: U8) -> NDArray[np.generic]:
        values = stored.view(_INTEGERS[self.stored_dtype])
        if self.stored_dtype == "I64" and (np.abs(values.clip(-_MAX_WHOLE - 1)) > _MAX_WHOLE).any():
            raise InputError(f"{self.file}: {self.stored_name} holds whole numbers beyond 2^53")
        return values.astype("<f8" if self.dtype == "F64" else "<f4")


def apr_tensor(ref: TensorRef) -> TensorRef:
    """The tensor as it can be read.

    Args:
        ref: `dtype` is the dtype of the file.

    Returns:
        `ref`, where its bytes are rows of a format; else an `AprTensor`.
    """
    read_as = format_read_as(ref.dtype, ref.shape)
    if read_as == ref.dtype:
        return ref
    values = {name: getattr(ref, name) for name in ref.__dataclass_fields__}
    return AprTensor(**{**values, "dtype": read_as}, stored_dtype=ref.dtype)


def dequantize_q4(stored: U8, count: int) -> F32:
    """Values of AprQ4 blocks as ``float32[count]``: ``(n - 8) * scale``, the low nibble first.

    Args:
        stored: ``uint8[18 * blocks]``: a scale in f16 and 16 bytes of nibbles a block of 32 values.
        count: values; those behind them in the last block are padding.
    """
    blocks = stored.reshape(-1, _Q4_BLOCK_BYTES)
    values = np.empty((blocks.shape[0], _Q4_BLOCK), dtype=np.float32)
    for start in range(0, blocks.shape[0], _Q4_BLOCKS_AT_ONCE):
        part = blocks[start : start + _Q4_BLOCKS_AT_ONCE]
        nibbles = _nibbles(part).astype(np.float32)
        with np.errstate(invalid="ignore"):
            values[start : start + part.shape[0]] = (nibbles - 8) * _q4_scales(part)
    return values.reshape(-1)[:count]


def dequantize_q8(stored: U8) -> F32:
    """Values of an AprQ8 tensor as ``float32[n]``: int8 times the f32 scale in front of them."""
    scale = stored[:_SCALE_BYTES].view("<f4")[0]
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(stored[_SCALE_BYTES:].view(np.int8).astype(np.float32) * scale)


def quantize_q4(values: F32) -> U8:
    """Values as AprQ4 blocks, ``uint8[18 * ceil(n / 32)]``.

    The scale is the largest magnitude over 7, or 1 where all are zero; values are divided by it before it is
    rounded to f16, and ties are rounded away from zero (aprender, ``AprV2Writer::add_q4_tensor``).

    Args:
        values: ``float32[n]``, finite; a last block that is not full is padded with bytes of zero.
    """
    n_blocks = -(-values.size // _Q4_BLOCK)
    padded = np.zeros((n_blocks, _Q4_BLOCK), dtype=np.float32)
    padded.reshape(-1)[: values.size] = values
    scales = _scales(np.abs(padded).max(axis=1, keepdims=True), 7)
    nibbles = (_rounded(padded / scales).clip(-8, 7) + 8).astype(np.uint8)
    nibbles.reshape(-1)[values.size :] = 0
    blocks = np.empty((n_blocks, _Q4_BLOCK_BYTES), dtype=np.uint8)
    blocks[:, :2] = scales.astype("<f2").view(np.uint8)
    blocks[:, 2:] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return blocks.reshape(-1)


def q8_scale(largest: float) -> np.float32:
    """The scale of an AprQ8 tensor whose largest magnitude is `largest`; 1 where that is zero."""
    return np.float32(_scales(np.array([largest], dtype=np.float32), 127)[0])


def quantize_q8(values: F32, scale: np.float32) -> U8:
    """Values as the int8 of an AprQ8 tensor, ``uint8[n]``, without the scale in front of them.

    Args:
        values: ``float32[n]``, finite.
        scale: `q8_scale` of the largest magnitude of the whole tensor.
    """
    return _rounded(values / scale).clip(-127, 127).astype(np.int8).view(np.uint8)


def q4_0_of_apr_q4(stored: U8) -> U8:
    """Bytes of AprQ4 blocks as those of ggml's Q4_0 with the same values, ``uint8[18 * blocks]``.

    Q4_0 has value ``j`` of a block in a low nibble and value ``16 + j`` in the high nibble of the same byte.
    """
    return _reordered(stored, _nibbles, lambda values: (values[:, :16], values[:, 16:]))


def apr_q4_of_q4_0(stored: U8) -> U8:
    """The inverse of `q4_0_of_apr_q4`."""
    return _reordered(stored, _q4_0_nibbles, lambda values: (values[:, 0::2], values[:, 1::2]))


def _reordered(stored: U8, unpack: Callable[[U8], U8], halves: Callable[[U8], tuple[U8, U8]]) -> U8:
    """Blocks of the same scales and values, which are packed as the low and the high nibbles in `halves`."""
    blocks = stored.reshape(-1, _Q4_BLOCK_BYTES)
    out = np.empty_like(blocks, subok=False)
    for start in range(0, blocks.shape[0], _Q4_BLOCKS_AT_ONCE):
        part = blocks[start : start + _Q4_BLOCKS_AT_ONCE]
        out[start : start + part.shape[0], :2] = part[:, :2]
        low, high = halves(unpack(part))
        out[start : start + part.shape[0], 2:] = low | high << np.uint8(4)
    return out.reshape(-1)


def _nibbles(blocks: U8) -> U8:
    """Nibbles of AprQ4 blocks in the order of the values, ``uint8[blocks, 32]``."""
    packed = np.asarray(blocks[:, 2:])
    return np.stack((packed & 15, packed >> 4), axis=2).reshape(-1, _Q4_BLOCK)


def _q4_0_nibbles(blocks: U8) -> U8:
    """Nibbles of Q4_0 blocks in the order of the values, ``uint8[blocks, 32]``."""
    packed = np.asarray(blocks[:, 2:])
    return np.concatenate((packed & 15, packed >> 4), axis=1)


def _q4_scales(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)


def _q8_k_of_apr_q8(stored: U8) -> U8:
    """An AprQ8 tensor of whole blocks as Q8_K: a scale in f32, 256 int8, and the sums of each 16 of them."""
    quants = np.asarray(stored[_SCALE_BYTES:]).reshape(-1, _K_BLOCK)
    out = np.empty((quants.shape[0], _Q8_K_BYTES), dtype=np.uint8)
    out[:, :4] = stored[:_SCALE_BYTES]
    out[:, 4 : 4 + _K_BLOCK] = quants
    sums = quants.view(np.int8).reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
    out[:, 4 + _K_BLOCK :] = sums.astype("<i2").view(np.uint8)
    return out.reshape(-1)


def _squares(values: F32) -> float:
    return float(np.sum(values.astype(np.float64) ** 2))


def _scales(largest: F32, levels: int) -> F32:
    scales = largest / np.float32(levels)
    return np.asarray(np.where(scales == 0, np.float32(1), scales))


def _rounded(values: F32) -> F32:
    """To the nearest whole number, ties away from zero."""
    whole = np.trunc(values)
    return np.asarray(whole + np.where(np.abs(values - whole) >= 0.5, np.sign(values), np.float32(0)))
