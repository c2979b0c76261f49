"""What is wrong with a block: one flipped bit, a scale, quants at their rails, or none of these."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.block_errors import cell_ratios
from driftscope.kernels.compare_cells import CELL, by_exponent
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import BlockFormat, format_of, row_columns
from driftscope.kernels.unpack import UnpackedRows

_LARGEST_F16 = 65504.0

# Part of the quants at one of the rails that makes a block clipped as a whole.
_CLIPPED = 0.9

# A bit explains a block if the energy that is left without it is at most this part of what it was.
_EXPLAINED = 0.5

# ... and if what is left may be rounding at all: in a tensor of other values, some bit halves an error by
# chance.
_LARGEST_LEFT = 64.0

_EXPONENTS = {
    "F16": (10, 15),
    "BF16": (7, 15),
    "F32": (23, 31),
    "F64": (52, 63),
    "F8_E4M3": (3, 7),
    "F8_E5M2": (2, 7),
    "F8_E4M3FNUZ": (3, 7),
    "F8_E5M2FNUZ": (2, 7),
}
"""First bit of the exponent and bit of the sign."""

Explanation = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """A block of b, or several that follow each other, and the values of a there.

    Attributes:
        a: f32 values.
        stored: bytes of b.
        dtype: format name of b.
        count: blocks.
        file_offset: where the bytes lie in b's file; None where they are not stored as they are read.
    """

    a: NDArray[np.float32]
    stored: NDArray[np.uint8]
    dtype: str
    count: int
    file_offset: int | None


@dataclass(frozen=True)
class Bounds:
    """Beyond what a cell is outlying: as codes, and as ratios."""

    energy_code: int
    peak_code: int
    energy: float
    peak: float


def explain(block: Block, bounds: Bounds) -> Explanation:
    """Kind, a sentence with figures, and the figures."""
    energy, peak = _ratios(block.a, block.stored[None], block.dtype)
    evidence: dict[str, Any] = {"energy": _finite(energy[0].max()), "peak": _finite(peak[0].max())}
    if block.file_offset is not None:
        evidence["file_offset"] = block.file_offset
    if not np.isfinite(block.a).all():
        return "non-finite", "values of a are not finite", evidence
    if block.count == 1:
        found = _flipped_bit(block, bounds, evidence) or _wrong_scale(block, evidence)
        if found is not None:
            return found
    said = _times(energy[0].max())
    if said is None:
        return "non-finite", "values of b are not finite, and no single bit explains it", evidence
    several = f"{block.count} blocks in a row, " if block.count > 1 else ""
    most, bound = np.sqrt(peak[0].max()), np.sqrt(bounds.peak)
    sentence = (
        f"{several}error energy {said} times what the steps predict (bound {bounds.energy:.3g}), largest "
        f"error {most:.3g} steps (bound {bound:.3g}); no single bit explains it"
    )
    return "outlying-error", sentence, evidence


def _ratios(
    a: NDArray[np.float32], stored: NDArray[np.uint8], dtype: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of several versions of the bytes; what is not finite is infinite."""
    wide = np.broadcast_to(a, (len(stored), len(a)))
    energy, peak = cell_ratios(wide, stored, dtype)
    return np.nan_to_num(energy, nan=np.inf, posinf=np.inf), np.nan_to_num(peak, nan=np.inf, posinf=np.inf)


def _flipped_bit(block: Block, bounds: Bounds, evidence: dict[str, Any]) -> Explanation | None:
    """The one bit without which the block is within its bounds, if there is one."""
    n_bytes = len(block.stored)
    turned = np.repeat(block.stored[None], 8 * n_bytes, axis=0)
    bits = np.arange(8 * n_bytes)
    turned[bits, bits // 8] ^= (1 << bits % 8).astype(np.uint8)
    energy, peak = _ratios(block.a, turned, block.dtype)
    with np.errstate(all="ignore"):
        values = dequantize(np.concatenate([block.stored[None], turned]), block.dtype)
    _, was_peak = _ratios(block.a, block.stored[None], block.dtype)
    left = _errors(block, values[1:], turned)
    before = _errors(block, values[:1], block.stored[None])
    # Of the cells that the bit changes alone: others keep their errors.
    changed = left != before
    inside = (energy.max(axis=1) < min(bounds.energy, _LARGEST_LEFT)) & (peak.max(axis=1) < bounds.peak)
    with np.errstate(invalid="ignore"):
        explained = _over(left, changed) <= _EXPLAINED * _over(np.broadcast_to(before, left.shape), changed)
    if by_exponent(format_of(block.dtype)):
        # A last bit is one error among others of like size.
        explained |= peak.max(axis=1) <= _EXPLAINED * was_peak.max()
    inside &= explained
    left = left.sum(axis=1)
    if not inside.any():
        return None
    fitting = np.flatnonzero(inside)
    best = int(fitting[np.argmin(left[fitting])])
    byte, bit = divmod(best, 8)
    field, detail = _field(block, turned[best], byte, bit, values[0], values[1 + best])
    unlike = np.flatnonzero(values[0].view(np.uint32) != values[1 + best].view(np.uint32))
    evidence = {
        **evidence,
        "byte": byte,
        "bit": bit,
        "field": field,
        **detail,
        "first_changed": int(unlike[0]) if len(unlike) else None,
        "changed_values": len(unlike),
        "energy_left": _finite(energy[best].max()),
        "peak_left": _finite(peak[best].max()),
        "other_bits_within_bounds": int(inside.sum()) - 1,
    }
    if block.file_offset is not None:
        evidence["file_offset"] = block.file_offset + byte
    was = _times(np.float64(evidence["energy"])) if evidence["energy"] is not None else None
    sentence = (
        f"bit {bit} of byte {byte} of the block ({field}) is flipped: with it turned back the error energy "
        f"is {energy[best].max():.3g} times what the steps predict, instead of {was or 'not finite'}"
    )
    return "flipped-bit", sentence, evidence


def _over(errors: NDArray[np.float64], cells: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(cells, errors, 0.0).sum(axis=1)


def _errors(block: Block, values: NDArray[np.float32], stored: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Error energy of each cell: in steps of each value for floats, as it is for blocks."""
    if by_exponent(format_of(block.dtype)):
        return _ratios(block.a, stored, block.dtype)[0]
    with np.errstate(all="ignore"):
        squares = (values.astype(np.float64) - block.a) ** 2
    return np.nan_to_num(squares.reshape(len(values), -1, CELL).sum(axis=2), nan=np.inf, posinf=np.inf)


def _field(
    block: Block, turned: NDArray[np.uint8], byte: int, bit: int, before: Any, after: Any
) -> tuple[str, dict[str, Any]]:
    """The name of what a bit belongs to, and which one of them it is."""
    layout = format_of(block.dtype)
    if not layout.is_integer:
        if block.dtype not in _EXPONENTS:
            return "stored bytes", {}
        size = layout.block_bytes
        place = 8 * (byte % size) + bit
        exponent, sign = _EXPONENTS[block.dtype]
        part = "sign" if place == sign else "exponent" if place >= exponent else "mantissa"
        return part, {"element": byte // size, "bit_of_element": place}
    old, new = (_unpacked(layout, stored) for stored in (block.stored, turned))
    names = {"quants": "quant", "scales": "scale", "mins": "minimum", "d": "d", "dmin": "dmin"}
    for key, name in names.items():
        x, y = getattr(old, key)[0], getattr(new, key)[0]
        if key in ("d", "dmin"):
            x, y = x.view(np.uint32), y.view(np.uint32)
        unlike = np.flatnonzero(x != y)
        if not len(unlike):
            continue
        if key == "dmin" and layout.offset == "add":
            name = "m"
        detail: dict[str, Any] = {}
        if key == "quants":
            detail = {
                "element": int(unlike[0]),
                "quant": int(x[unlike[0]]),
                "quant_turned_back": int(y[unlike[0]]),
            }
        elif key in ("scales", "mins"):
            detail = {
                "sub_block": int(unlike[0]),
                name: int(x[unlike[0]]),
                f"{name}_turned_back": int(y[unlike[0]]),
            }
        return name, detail
    return "stored bytes", {}


def _wrong_scale(block: Block, evidence: dict[str, Any]) -> Explanation | None:
    layout = format_of(block.dtype)
    if not layout.is_integer:
        return None
    parts = _unpacked(layout, block.stored)
    scales = {"d": float(parts.d[0, 0]), "dmin": float(parts.dmin[0, 0])}
    evidence = {**evidence, **{key: _finite(value) for key, value in scales.items()}}
    for name, value in scales.items():
        if not np.isfinite(value):
            return "non-finite-scale", f"{name} of the block is {value}", evidence
    largest = float(np.abs(block.a).max())
    if scales["d"] == 0 and largest > 0:
        said = f"d of the block is 0, and a has values up to {largest:.3g}"
        return "zero-scale", said, {**evidence, "largest_a": largest}
    for name, value in scales.items():
        if abs(value) == _LARGEST_F16:
            return "saturated-scale", f"{name} of the block is {value:g}, the largest f16", evidence
    quants = parts.quants[0]
    low, high = _rails(layout)
    at_rail = float(np.mean((quants <= low) | (quants >= high)))
    if at_rail >= _CLIPPED:
        said = f"{100 * at_rail:.0f} % of the quants are the smallest or the largest there is"
        return "quants-at-rail", said, {**evidence, "at_rail": at_rail}
    return None


@cache
def _rails(layout: BlockFormat) -> tuple[int, int]:
    """Smallest and largest quant of a format, from bytes that are all zeros and all ones."""
    seen = [_unpacked(layout, np.full(layout.block_bytes, byte, np.uint8)).quants for byte in range(256)]
    return int(np.min(seen)), int(np.max(seen))


def _unpacked(layout: BlockFormat, stored: NDArray[np.uint8]) -> UnpackedRows:
    rows = UnpackedRows.empty(layout, 1, row_columns(layout.name, len(stored)))
    rows.fill(np.ascontiguousarray(stored[None]), 0, 1)
    return rows


def _times(ratio: np.floating[Any]) -> str | None:
    return f"{ratio:.3g}" if np.isfinite(ratio) else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
