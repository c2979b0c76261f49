"""What can be wrong with a projection's weights in places: scales, zero points, one block, one bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.explanations.base import F32, F64, I64, Candidate, Case, figure, rounded
from driftscope.analysis.explanations.general import outlying_channels
from driftscope.analysis.explanations.linear import Linear
from driftscope.analysis.explanations.residual import fit
from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.formats import format_of

_WIDTHS = (32, 256)
_SAMPLED_ROWS = 64
_MOST_WEIGHTS = 1 << 25
_OUTLYING_BLOCK = 5.0
"""A sub-block's error energy over that of even rounding: half a step everywhere would be 3."""


def _stored(case: Case, name: str, rows: I64 | None = None) -> NDArray[np.uint8]:
    """Bytes of canonical rows as the engine's own artifact stores them."""
    ref = _ref(case, name)
    raw, order = ref.raw(), ref.row_order()
    if rows is None:
        return np.ascontiguousarray(raw if order is None else raw[order])
    return np.ascontiguousarray(raw[rows if order is None else order[rows]])


def _ref(case: Case, name: str) -> TensorRef:
    return case.context.own.tensors[name]


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Rows in a block format: integers, steps and offsets, one a sub-block."""

    quants: F64
    steps: F64
    offsets: F64
    scales: F64
    d: F64
    width: int

    def weight(self, steps: F64, offsets: F64) -> F32:
        """The weights with other steps or offsets."""
        values = self.quants * np.repeat(steps, self.width, axis=1) + np.repeat(offsets, self.width, axis=1)
        return values.astype(np.float32)


def _decoded(case: Case, name: str, rows: I64 | None = None) -> _Decoded | None:
    """A stored matrix taken apart; None where it is not in blocks of integers."""
    from driftscope.kernels.unpack import UnpackedRows, check_raw

    layout = format_of(_ref(case, name).dtype)
    if not layout.is_integer or not layout.native:
        return None
    raw, columns = check_raw(_stored(case, name, rows), layout.name)
    parts = UnpackedRows.empty(layout, raw.shape[0], columns)
    parts.fill(raw, 0, raw.shape[0])
    each = layout.block_size // layout.sub_block
    scales = parts.scales.astype(np.float64)
    d = np.repeat(parts.d.astype(np.float64), each, axis=1)
    least = np.repeat(parts.dmin.astype(np.float64), each, axis=1) * parts.mins
    sign = {"none": 0.0, "subtract": -1.0, "add": 1.0}[layout.offset]
    return _Decoded(parts.quants.astype(np.float64), d * scales, sign * least, scales, d, layout.sub_block)


def decoding(case: Case) -> Iterator[Candidate]:
    """A part of the stored scales or minima is not used."""
    linear = Linear.of(case)
    if linear is None or not case.is_engine:
        return
    rows = _some_rows(case)
    found = _decoded(case, linear.name, rows)
    if found is None:
        return
    ones = np.ones_like(found.steps)
    tries = [
        ("scale-dropped", "the scale of each block is not applied", found.scales, found.offsets),
        ("scale-dropped", "the scale of each sub-block is not applied", found.d, found.offsets),
        ("scale-dropped", "no scale is applied", ones, found.offsets),
    ]
    if found.offsets.any():
        tries.append(("zero-point", "the minimum of each block is left out", found.steps, 0 * found.offsets))
        tries.append(
            ("zero-point", "the minimum of each block has the wrong sign", found.steps, -found.offsets)
        )
        tries.append(("scale-dropped", "neither scale nor minimum is applied", ones, 0 * found.offsets))
    for class_, what, steps, offsets in tries:
        if np.array_equal(steps, found.steps) and np.array_equal(offsets, found.offsets):
            continue
        predicted = linear.gives(linear.times(found.weight(steps, offsets)), rows)
        yield Candidate(class_, what, predicted, 1, {"format": _ref(case, linear.name).dtype}, channels=rows)


def parts(case: Case) -> Iterator[Candidate]:
    """The scales are off by one factor and the minima by another."""
    linear = Linear.of(case)
    if linear is None or not case.is_engine:
        return
    rows = _some_rows(case)
    found = _decoded(case, linear.name, rows)
    if found is None or not found.offsets.any():
        return
    scaled = linear.times(found.weight(found.steps, 0 * found.offsets))
    least = linear.times(found.weight(0 * found.steps, found.offsets))
    mask = case.masks[0][:, rows]
    left, right = np.where(mask, scaled, 0.0), np.where(mask, least, 0.0)
    target = np.where(mask, case.target[:, rows] - linear.bias(rows), 0.0)
    fitted = fit(target, left, right)
    if fitted is None:
        return
    a, b = fitted
    changed = "scales" if abs(a - 1.0) > abs(b - 1.0) else "minima"
    yield Candidate(
        "scale-dropped" if changed == "scales" else "zero-point",
        f"the {changed} of the blocks are wrong: scales count {figure(a)} times, minima {figure(b)} times",
        a * left + b * right + linear.bias(rows),
        3,
        {"scale_ratio": rounded(a), "minimum_ratio": rounded(b), "format": _ref(case, linear.name).dtype},
        channels=rows,
    )


def _some_rows(case: Case) -> I64:
    """Some channels, the worst among them."""
    channels = case.target.shape[1]
    rows = np.linspace(0, channels - 1, min(_SAMPLED_ROWS, channels)).astype(np.int64)
    return np.unique(np.append(rows, int(np.argmax(np.sum(case.residual**2, axis=0)))))


def zero_point(case: Case) -> Iterator[Candidate]:
    """Every integer is off by a constant: the error is that times the activation's sum over each group."""
    linear = Linear.of(case)
    if linear is None or not case.has_tensor(linear.name, case.context.own):
        return
    rows = _some_rows(case)
    found = _decoded(case, linear.name, rows)
    if found is None:
        return
    x = linear.x_used
    sums = x.reshape(x.shape[0], -1, found.width).sum(axis=2, dtype=np.float64).astype(np.float32)
    for what, steps, unit in (
        ("zero point", found.steps, "steps"),
        ("zero point of each block", np.where(found.scales != 0, found.d, 0.0), "block scales"),
        ("scale of the minima", found.offsets, "minima"),
    ):
        if not steps.any():
            continue
        shape = linear.times(steps.astype(np.float32), sums)
        shape = np.where(case.masks[0][:, rows], shape, 0.0)
        energy = float(np.sum(shape * shape))
        if energy == 0.0:
            continue
        shift = float(np.sum(case.residual[:, rows] * shape)) / energy
        whole = abs(shift - round(shift)) < 0.02 and round(shift) != 0
        used = float(round(shift)) if whole else shift
        yield Candidate(
            "zero-point",
            f"the {what} is off by {figure(used)} {unit}",
            linear.moved(used * shape, rows),
            1 if whole else 3,
            {"shift": rounded(shift), "unit": unit, "format": _ref(case, linear.name).dtype},
            channels=rows,
        )


def by_blocks(case: Case) -> Iterator[Candidate]:
    """The stored weights differ from the reference's by a constant, or a ratio, in each block."""
    linear = Linear.of(case)
    own = case.context.own
    if linear is None or case.is_engine or not case.has_tensor(linear.name, own):
        return
    rows = _some_rows(case)
    theirs = case.weight(linear.name, rows).astype(np.float64)
    ours = case.weight(linear.name, rows, artifact=own).astype(np.float64)
    noise = _block_noise(case, linear.name, rows, theirs)
    for width in noise:
        a, b = (value.reshape(rows.size, -1, width) for value in (theirs, ours))
        where = "row" if width == theirs.shape[1] else f"block of {width}"
        offsets = np.mean(b - a, axis=2, keepdims=True)
        energy = np.sum(a * a, axis=2, keepdims=True)
        ratios = np.sum(a * b, axis=2, keepdims=True) / np.where(energy > 0, energy, 1.0)
        shifted, scaled = (value.reshape(theirs.shape) for value in (a + offsets, a * ratios))
        middle_a, middle_b = (value.mean(axis=2, keepdims=True) for value in (a, b))
        spread = np.sum((a - middle_a) ** 2, axis=2, keepdims=True)
        slopes = np.sum((a - middle_a) * b, axis=2, keepdims=True) / np.where(spread > 0, spread, 1.0)
        both = (middle_b + slopes * (a - middle_a)).reshape(theirs.shape)
        for class_, what, weight, figures in (
            ("zero-point", f"every {where} of the weights is off by a constant", shifted, offsets),
            ("scale-dropped", f"every {where} of the weights has another scale", scaled, ratios),
            ("scale-dropped", f"every {where} of the weights has another scale and offset", both, slopes),
        ):
            before = np.sum((b - a) ** 2, axis=2)
            after = np.sum((b - weight.reshape(b.shape)) ** 2, axis=2)
            moved = np.sum((weight.reshape(b.shape) - a) ** 2, axis=2)
            # A damaged block or two are not every block, and rounding of scales is no fault.
            if np.mean((after <= 0.5 * before) & (moved > 4.0 * noise[width])) < 0.5:
                continue
            evidence = {
                "width": width,
                "low": rounded(float(np.quantile(figures, 0.05))),
                "high": rounded(float(np.quantile(figures, 0.95))),
            }
            predicted = linear.gives(linear.times(weight.astype(np.float32)), rows)
            complexity = (4 if width > 32 else 5) + (2 if weight is both else 0)
            yield Candidate(class_, what, predicted, complexity, evidence, channels=rows)


def _block_noise(case: Case, name: str, rows: I64, theirs: F64) -> dict[int, F64]:
    """By width of a block, the error energy of each that rounding explains."""
    widths = [width for width in (*_WIDTHS, theirs.shape[1]) if theirs.shape[1] % width == 0]
    found = _decoded(case, name, rows)
    if found is None:
        each = 1e-6 * theirs * theirs
    else:
        each = np.repeat(found.steps**2 / 12, found.width, axis=1)
    return {width: each.reshape(rows.size, -1, width).sum(axis=2) for width in widths}


def corrupt_block(case: Case) -> Iterator[Candidate]:
    """One row alone is wrong, and in it one block: found in the stored bytes, or as a flipped bit."""
    linear = Linear.of(case)
    if linear is None:
        return
    channels = outlying_channels(case)
    if case.is_engine:
        if channels.size:
            yield from _flipped_in_engine(case, linear, int(channels[0]))
        return
    if not case.has_tensor(linear.name, case.context.own):
        return
    row = _damaged_row(case, linear)
    if row is not None or channels.size:
        yield from _damaged_in_file(case, linear, int(channels[0]) if row is None else row, row is not None)


def _damaged_row(case: Case, linear: Linear) -> int | None:
    """The row with the one block whose difference from the reference outlies what its steps explain."""
    rows, columns = linear.shape
    if rows * columns > _MOST_WEIGHTS:
        return None
    found = _decoded(case, linear.name)
    if found is None:
        return None
    ours = case.weight(linear.name, artifact=case.context.own)
    difference = np.nan_to_num(ours.astype(np.float64) - linear.weight, posinf=1e30, neginf=1e30)
    energy = np.sum(difference.reshape(rows, -1, found.width) ** 2, axis=2)
    noise = found.width * found.steps**2 / 12
    worst = np.max(np.divide(energy, noise, out=np.zeros_like(energy), where=noise > 0), axis=1)
    order = np.argsort(-worst, kind="stable")
    first, second = float(worst[order[0]]), float(worst[order[1]])
    return int(order[0]) if first > _OUTLYING_BLOCK and first > 2.5 * second else None


def _damaged_in_file(case: Case, linear: Linear, row: int, alone: bool) -> Iterator[Candidate]:
    here = np.array([row])
    theirs = case.weight(linear.name, here)[0].astype(np.float64)
    ours = case.weight(linear.name, here, artifact=case.context.own)[0].astype(np.float64)
    layout = format_of(_ref(case, linear.name).dtype)
    width = layout.block_size if layout.block_size > 1 else 1
    difference = np.where(np.isfinite(ours - theirs), ours - theirs, 0.0)
    energy = np.sum(difference.reshape(-1, width) ** 2, axis=1)
    block = int(np.argmax(energy))
    left, right = block * width, (block + 1) * width
    changed = theirs.copy()
    changed[left:right] = ours[left:right]
    bit = _bit_to_undo(case, linear, row, block, theirs[left:right])
    evidence = {"row": row, "block": block, "first_column": left, "format": layout.name, **bit}
    which = f"column {left}" if width == 1 else f"block {block} (columns {left} to {right - 1})"
    flipped = f", where bit {bit['bit']} of byte {bit['byte']} is flipped" if bit else ""
    share = float(energy[block] / energy.sum()) if energy.sum() else 0.0
    predicted = linear.moved(linear.times((changed - theirs).astype(np.float32)[None, :]), here)
    yield Candidate(
        "corrupt-block",
        f"row {row} of {linear.name} alone is wrong, in {which}{flipped}; "
        f"{100 * share:.0f} % of the row's difference lies there",
        predicted,
        2,
        {**evidence, "share": rounded(share)},
        accepted=True if alone and bit else None,
        channels=here,
    )


def _bit_to_undo(case: Case, linear: Linear, row: int, block: int, wanted: F64) -> dict[str, int]:
    """The one bit of a block that, flipped back, brings it closest to the reference; empty if none helps."""
    from driftscope.kernels.dequantize import dequantize

    layout = format_of(_ref(case, linear.name).dtype)
    raw = _stored(case, linear.name, np.array([row]))[0]
    stored = raw[block * layout.block_bytes : (block + 1) * layout.block_bytes]
    values = dequantize(_flips(stored), layout.name).astype(np.float64)
    values = np.where(np.isfinite(values), values, 1e30)
    errors = np.sum((values - wanted) ** 2, axis=1)
    now = np.nan_to_num(dequantize(stored[None, :], layout.name).astype(np.float64), nan=1e30)
    best = int(np.argmin(errors))
    if float(errors[best]) > 0.25 * float(np.sum((now - wanted) ** 2)):
        return {}
    return {"byte": best // 8, "bit": best % 8}


def _flips(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All copies of some bytes with one bit flipped, ``uint8[8 * bytes, bytes]``."""
    copies = np.repeat(block[None, :], 8 * block.size, axis=0)
    places = np.arange(8 * block.size)
    copies[places, places // 8] ^= (1 << (places % 8)).astype(np.uint8)
    return copies


def _flipped_in_engine(case: Case, linear: Linear, row: int) -> Iterator[Candidate]:
    """A bit that is flipped in the engine's copy of a row, told from the row's output alone."""
    from driftscope.kernels.dequantize import dequantize

    layout = format_of(_ref(case, linear.name).dtype)
    if not layout.native:
        return
    raw = _stored(case, linear.name, np.array([row]))[0]
    x, residual = linear.x_used.astype(np.float64), case.residual[:, row]
    energy = float(np.sum(residual * residual))
    best: tuple[float, int, int, F64] | None = None
    for block in range(raw.size // layout.block_bytes):
        stored = raw[block * layout.block_bytes : (block + 1) * layout.block_bytes]
        with np.errstate(all="ignore"):
            values = dequantize(_flips(stored), layout.name).astype(np.float64)
            change = values - dequantize(stored[None, :], layout.name).astype(np.float64)
        change = np.where(np.isfinite(change), change, 1e30)
        left = block * layout.block_size
        seen = x[:, left : left + layout.block_size]
        if layout.block_size == 1:
            overlap, size = float(np.sum(seen[:, 0] * residual)), float(np.sum(seen[:, 0] ** 2))
            errors = energy - 2 * change[:, 0] * overlap + change[:, 0] ** 2 * size
        else:
            output = linear.times(change.astype(np.float32), seen.astype(np.float32))
            errors = np.sum((residual[:, None] - output) ** 2, axis=0)
        place = int(np.argmin(errors))
        if best is None or float(errors[place]) < best[0]:
            best = (float(errors[place]), block, place, change[place])
    if best is None:
        return
    _, block, place, change_of_block = best
    left = block * layout.block_size
    output = linear.times(
        change_of_block.astype(np.float32)[None, :],
        np.ascontiguousarray(linear.x_used[:, left : left + layout.block_size]),
    )
    columns = (
        f"column {left}" if layout.block_size == 1 else f"columns {left} to {left + layout.block_size - 1}"
    )
    yield Candidate(
        "corrupt-block",
        f"row {row} of {linear.name} alone is wrong, as if bit {place % 8} of byte {place // 8} of its block "
        f"{block} ({columns}) were flipped",
        linear.moved(output, np.array([row])),
        2,
        {
            "row": row,
            "block": block,
            "first_column": left,
            "byte": place // 8,
            "bit": place % 8,
            "format": layout.name,
        },
        channels=np.array([row]),
    )


HYPOTHESES = (decoding, parts, zero_point, by_blocks, corrupt_block)
