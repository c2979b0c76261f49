"""Rows of a weight in the form that tiles of integer products take."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from driftscope.kernels import instructions, ir
from driftscope.kernels.activations import QuantizedActivation
from driftscope.kernels.block_decoders import DECODERS, Decoder, block_scales, half_at
from driftscope.kernels.formats import FORMATS, BlockFormat
from driftscope.kernels.ir import I8, I16, I32, Builder, Value, vector
from driftscope.kernels.jit import intrinsic, kernel

# What is taken off a block: a bias of the quants, minima times sums of quants, minima times q8_1's ``s``.
NOTHING, BIAS, MINIMA, SUMS = range(4)


@dataclass(frozen=True)
class Shared:
    """What the two factors of an integer product agree on.

    Attributes:
        size: values in a block, the smaller of the two formats'.
        sub_block: values that share an integer scale and minimum.
        steps: steps of four columns whose products are added up before they are scaled, as far as 16 bits
            hold the sum; 0 where the quants are kept as 16 bits, with their scales multiplied in.
        offset: what is taken off a block: `NOTHING`, `BIAS`, `MINIMA` or `SUMS`.
        bias: what the quants have been given to be unsigned.
    """

    size: int
    sub_block: int
    steps: int
    offset: int
    bias: int

    @classmethod
    def of(cls, layout: BlockFormat, activation: QuantizedActivation) -> Shared:
        """For a weight format and an activation."""
        return _shared(layout.name, activation.block_size, activation.s is not None)

    @property
    def groups(self) -> int:
        """Runs of `steps` steps in a block."""
        return self.size // (4 * self.steps) if self.steps else self.size // 8

    @property
    def pairs(self) -> int:
        """Pairs of minima (or biases) a block."""
        return max(1, self.size // self.sub_block // 2)


@functools.cache
def _shared(name: str, activation_block: int, has_sums: bool) -> Shared:
    layout = FORMATS[name]
    steps = _steps(layout)
    offset = BIAS if steps else NOTHING
    if layout.offset != "none":
        offset = SUMS if layout.offset == "add" and has_sums else MINIMA
    size = min(layout.block_size, activation_block)
    return Shared(size, layout.sub_block, steps, offset, _bias(DECODERS[name]))


def _vnni() -> bool:
    return instructions.integer_dots() in (instructions.VNNI, instructions.VNNI_512)


def _bias(decoder: Decoder) -> int:
    """Signed quants are made unsigned where products are added in 32 bits."""
    return 128 if _vnni() and decoder.largest == 0 else decoder.bias


def _steps(layout: BlockFormat) -> int:
    whole = layout.sub_block // 4
    if _vnni():
        return whole
    largest = DECODERS[layout.name].largest
    if largest == 0:
        return 0
    # Two products of at most `largest * 128` a step.
    fit = 32767 // (256 * largest)
    return next(steps for steps in (8, 4, 2) if steps <= min(fit, whole))


@dataclass(frozen=True)
class IntegerRows:
    """Rows of a weight; there is room for a multiple of eight.

    Attributes:
        layout: their format.
        shared: see `Shared`.
        quants: the bytes of ``uint8[rows, columns]``, or ``int16`` where `shared` says so.
        scales: ``int32[rows, columns / (4 * steps)]``, where a scale multiplies pairs of 16 bits twice over.
        extras: ``int16[rows, blocks, 2 * pairs]``, minima or biases times scales.
        d: ``float32[rows, blocks]``.
        dmin: ``float32[rows, blocks]``; negative where the minima are added.
    """

    layout: BlockFormat
    shared: Shared
    quants: NDArray[np.int8]
    scales: NDArray[np.int32]
    extras: NDArray[np.int16]
    d: NDArray[np.float32]
    dmin: NDArray[np.float32]

    @classmethod
    def empty(cls, layout: BlockFormat, shared: Shared, n_rows: int, n_columns: int) -> IntegerRows:
        """Room for `n_rows` rows, rounded up."""
        n_rows = -(-n_rows // 8) * 8
        blocks = n_columns // shared.size
        groups = n_columns // (4 * shared.steps) if shared.steps else 1
        extras = np.zeros((n_rows, blocks, 2 * shared.pairs), np.int16)
        # What the format has no field for stays as it is here.
        extras[:, :, : shared.size // shared.sub_block] = shared.bias if shared.offset == BIAS else 1
        return cls(
            layout,
            shared,
            np.zeros(n_rows * n_columns * (1 if shared.steps else 2), np.int8),
            np.full((n_rows, groups), 1 if _vnni() else 0x10001, np.int32),
            extras,
            np.zeros((n_rows, blocks), np.float32),
            np.zeros((n_rows, blocks), np.float32),
        )

    def fill(self, raw: NDArray[np.uint8], first: int, end: int) -> None:
        """Take rows ``first..end`` of `raw` as rows ``0..end-first``."""
        layout, shared = self.layout, self.shared
        repeat = layout.block_size // shared.size
        blocks = self.d.shape[1] // repeat
        d, dmin, extras = self.d, self.dmin, self.extras
        if repeat > 1:
            n_rows, subs = d.shape[0], layout.block_size // layout.sub_block
            d, dmin = np.zeros((n_rows, blocks), np.float32), np.zeros((n_rows, blocks), np.float32)
            extras = np.zeros((n_rows, blocks, subs), np.int16)
        row = _ROWS[layout.name]
        row(raw, first, end, blocks, self.quants, self.scales, extras, d, dmin)
        if repeat > 1:
            self.d[:], self.dmin[:] = np.repeat(d, repeat, axis=1), np.repeat(dmin, repeat, axis=1)
            if DECODERS[layout.name].scales is not None:
                count = min(2 * shared.pairs, shared.size // layout.sub_block)
                self.extras[:, :, :count] = extras.reshape(*self.d.shape, count)


def _decode_rows(name: str) -> Any:
    """An intrinsic that decodes one row."""
    layout, decoder = FORMATS[name], DECODERS[name]
    subs = layout.block_size // layout.sub_block
    at_once = 8 if subs == 1 else 1

    def define(
        _context: Any,
        raw: Any,
        at: Any,
        blocks: Any,
        row: Any,
        quants: Any,
        scales: Any,
        extras: Any,
        d: Any,
        dmin: Any,
    ) -> Any:
        size = types.intp
        result = types.void(raw, size, size, size, quants, scales, extras, d, dmin)

        def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
            steps = _steps(layout)
            words = 1 if steps else 2
            groups = layout.block_size // (4 * steps) if steps else 0
            blocks, row = arguments[2:4]

            def element(which: int, index: Value) -> Value:
                return ir.element(context, builder, signature.args[which], arguments[which], index)

            def target(which: int, block: Value, each: int) -> Value:
                number = builder.add(builder.mul(row, blocks), block)
                return element(which, builder.mul(number, number.type(each)))

            source = element(0, arguments[1])

            def decode(first: Value, count: int) -> None:
                here = builder.mul(first, first.type(layout.block_bytes))
                pointers = [
                    ir.offset(builder, ir.offset(builder, source, here), i * layout.block_bytes)
                    for i in range(count)
                ]
                ir.store(builder, block_scales(builder, decoder, pointers), target(7, first, 1))
                if decoder.dmin >= 0:
                    values = half_at(builder, pointers, decoder.dmin)
                    ir.store(
                        builder,
                        builder.fneg(values) if layout.offset == "add" else values,
                        target(8, first, 1),
                    )
                to = target(4, first, layout.block_size * words)
                for i, pointer in enumerate(pointers):
                    part = ir.offset(builder, to, i * layout.block_size * words)
                    integers = decoder.scales(builder, pointer) if decoder.scales else None
                    _store_quants(builder, decoder, decoder.quants(builder, pointer), integers, steps, part)
                if decoder.scales is None:
                    return
                integers = decoder.scales(builder, pointers[0])
                if steps:
                    _store_scales(builder, integers, groups // subs, target(5, first, groups))
                if decoder.mins:
                    ir.store(builder, decoder.mins(builder, pointers[0]), target(6, first, subs))
                elif steps:
                    biases = builder.mul(integers, ir.constant(I16, _bias(decoder), subs))
                    ir.store(builder, biases, target(6, first, subs))

            def step(index: Value, _: list[Value]) -> list[Value]:
                decode(builder.mul(index, index.type(at_once)), at_once)
                return []

            whole = builder.udiv(blocks, blocks.type(at_once))
            ir.loop(builder, whole, [], step)
            if at_once > 1:
                done = builder.mul(whole, whole.type(at_once))

                def rest(index: Value, _: list[Value]) -> list[Value]:
                    decode(builder.add(done, index), 1)
                    return []

                ir.loop(builder, builder.sub(blocks, done), [], rest)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


def _store_quants(
    builder: Builder, decoder: Decoder, found: list[Value], scales: Value | None, steps: int, to: Value
) -> None:
    if steps:
        for i, quants in enumerate(found):
            if decoder.largest == 0:
                quants = builder.xor(quants, ir.constant(I8, -128, 32))
            ir.store(builder, quants, ir.offset(builder, to, 32 * i))
        return
    for i, quants in enumerate(found):
        wide = builder.sext(quants, vector(I16, 32))
        if scales is not None:
            wide = builder.mul(wide, ir.pick(builder, scales, [i] * 32))
        ir.store(builder, wide, ir.offset(builder, to, 64 * i))


def _store_scales(builder: Builder, scales: Value, repeat: int, to: Value) -> None:
    count = scales.type.count * repeat
    wide = builder.sext(scales, vector(I32, scales.type.count))
    if not _vnni():
        low = builder.and_(wide, ir.constant(I32, 0xFFFF, scales.type.count))
        wide = builder.or_(low, builder.shl(wide, ir.constant(I32, 16, scales.type.count)))
    ir.store(builder, ir.pick(builder, wide, [i // repeat for i in range(count)]), to)


_SIGNATURE = (
    "void(R(uint8, 2), int64, int64, int64, int8[::1], int32[:,::1], int16[:,:,::1], f4[:,::1], f4[:,::1])"
)
_decode_q4_0 = _decode_rows("Q4_0")
_decode_q4_1 = _decode_rows("Q4_1")
_decode_q5_0 = _decode_rows("Q5_0")
_decode_q5_1 = _decode_rows("Q5_1")
_decode_q8_0 = _decode_rows("Q8_0")
_decode_q2_k = _decode_rows("Q2_K")
_decode_q3_k = _decode_rows("Q3_K")
_decode_q4_k = _decode_rows("Q4_K")
_decode_q5_k = _decode_rows("Q5_K")
_decode_q6_k = _decode_rows("Q6_K")
_decode_q8_k = _decode_rows("Q8_K")
_decode_iq4_nl = _decode_rows("IQ4_NL")
_decode_iq4_xs = _decode_rows("IQ4_XS")
_decode_mxfp4 = _decode_rows("MXFP4")


@kernel(_SIGNATURE)
def _q4_0(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q4_0(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q4_1(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q4_1(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q5_0(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q5_0(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q5_1(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q5_1(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q8_0(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q8_0(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q2_k(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q2_k(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q3_k(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q3_k(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q4_k(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q4_k(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q5_k(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q5_k(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q6_k(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q6_k(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _q8_k(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_q8_k(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _iq4_nl(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_iq4_nl(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _iq4_xs(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_iq4_xs(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


@kernel(_SIGNATURE)
def _mxfp4(
    raw: Any, first: int, end: int, blocks: int, quants: Any, scales: Any, extras: Any, d: Any, dmin: Any
) -> None:
    for r in range(first, end):
        _decode_mxfp4(raw, r * raw.shape[1], blocks, r - first, quants, scales, extras, d, dmin)


_ROWS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
