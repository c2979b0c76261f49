"""Integer dot products of stored rows with one token: nothing is unpacked to memory.

Vectors run along a row. Eight rows are worked on side by side, so that the integer sum of a block is one lane
of a vector and its conversion and scaling to f32 are done for eight rows at once, in the same order as in
`driftscope.kernels.integer_tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import types
from numba.core.cgutils import alloca_once
from numpy.typing import NDArray

from driftscope.kernels import ir
from driftscope.kernels.activations import QuantizedActivation
from driftscope.kernels.block_decoders import DECODERS, block_scales, half_at
from driftscope.kernels.formats import FORMATS, BlockFormat
from driftscope.kernels.integer_rows import SUMS, Shared
from driftscope.kernels.ir import F32, I8, I16, I32, Builder, Value, constant, vector
from driftscope.kernels.jit import device, intrinsic, kernel

ROWS = 8


@dataclass(frozen=True)
class Tokens:
    """An activation as rows: one, two, or a multiple of four.

    Attributes:
        quants: ``int8[n, columns]``; for formats of signed quants ``int16``, or where `driftscope.kernels.ir`
            has signs and the quants are levels, ``int8[n, columns / 32, 2, 32]`` with the magnitudes as u8.
        sums: ``int16[n, columns / sub_block]``.
        d: ``float32[n, blocks]``.
        s: ``float32[n, blocks]``, q8_1's ``s``; `d` again where it is not needed.
    """

    quants: NDArray[Any]
    sums: NDArray[np.int16]
    d: NDArray[np.float32]
    s: NDArray[np.float32]

    @classmethod
    def of(cls, activation: QuantizedActivation, layout: BlockFormat) -> Tokens:
        """For rows of a format."""
        quants: NDArray[Any] = activation.quants
        sums = np.zeros((quants.shape[0], quants.shape[1] // layout.sub_block), np.int16)
        decoder = DECODERS[layout.name]
        d, s = activation.d, activation.d if activation.s is None else activation.s
        if quants.shape[0] > 2:
            quants, sums, d, s = (_padded(array) for array in (quants, sums, d, s))
        if decoder.levels and ir.has_signs():
            parts = quants.reshape(quants.shape[0], -1, 1, 32)
            quants = np.concatenate([parts, np.abs(parts)], axis=2).reshape(quants.shape[0], -1)
        elif decoder.largest == 0:
            quants = quants.astype(np.int16)
        elif decoder.bias or layout.offset == "subtract":
            _sum_rows(quants, layout.sub_block, sums)
        return cls(quants, sums, d, s)


def _padded(array: NDArray[Any]) -> NDArray[Any]:
    """With rows of zeros up to a multiple of four."""
    out = np.zeros((-(-array.shape[0] // 4) * 4, array.shape[1]), array.dtype)
    out[: array.shape[0]] = array
    return out


@kernel("void(R(int8, 2), int64, int16[:,::1])")
def _sum_rows(quants: Any, sub_block: int, out: Any) -> None:
    for t in range(quants.shape[0]):
        for s in range(out.shape[1]):
            total = np.int16(0)
            for i in range(sub_block):
                total += np.int16(quants[t, s * sub_block + i])
            out[t, s] = total


def fits(layout: BlockFormat, activation: QuantizedActivation, shared: Shared, n_rows: int) -> bool:
    """Whether `dot_rows` can do it."""
    return (
        n_rows >= ROWS
        and activation.block_size == layout.block_size
        and shared.offset == (SUMS if layout.offset == "add" else shared.offset)
    )


def dot_rows(
    tokens: Tokens,
    raw: NDArray[np.uint8],
    layout: BlockFormat,
    first: int,
    end: int,
    out: NDArray[np.float32],
) -> None:
    """Columns ``first..end`` of `out`, ``float32[tokens, rows]``, from these rows of `raw`."""
    _KERNELS[layout.name](raw, first, end, tokens.quants.view(np.int8), tokens.sums, tokens.d, tokens.s, out)


def _dot_eight(name: str, n_tokens: int) -> Any:
    """An intrinsic for eight rows and `n_tokens` tokens: ``out[token, row]``."""

    def define(
        _context: Any, raw: Any, at: Any, stride: Any, blocks: Any, token: Any,
        quants: Any, sums: Any, d: Any, s: Any, out: Any,
    ) -> Any:  # fmt: skip
        size = types.intp
        result = types.void(raw, size, size, size, size, quants, sums, d, s, out)

        def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
            def element(which: int, index: Value) -> Value:
                return ir.element(context, builder, signature.args[which], arguments[which], index)

            at, stride, blocks, token = arguments[1:5]
            writer = _EightRows(name, n_tokens, context, builder, stride)
            layout = writer.layout
            each = (layout.block_size * writer.width, layout.block_size // layout.sub_block, 1, 1)
            row_sizes = [builder.mul(blocks, blocks.type(count)) for count in each]
            tokens = [
                [
                    element(which, builder.mul(builder.add(token, token.type(t)), row_size))
                    for which, row_size in zip(range(5, 9), row_sizes, strict=True)
                ]
                for t in range(n_tokens)
            ]
            rows = [element(0, builder.add(at, builder.mul(stride, stride.type(i)))) for i in range(ROWS)]
            following = element(0, builder.add(at, builder.mul(stride, stride.type(ROWS))))

            def step(block: Value, before: list[Value]) -> list[Value]:
                here = builder.mul(block, block.type(layout.block_bytes))
                # The rows of a group lie one after the other: what is asked for is the next group.
                ahead = ir.offset(builder, following, builder.mul(here, here.type(ROWS)))
                for line in range(-(-ROWS * layout.block_bytes // 64)):
                    ir.prefetch(builder, ir.offset(builder, ahead, 64 * line))
                places = [
                    [
                        ir.offset(builder, start, builder.mul(block, block.type(count)))
                        for start, count in zip(starts, each, strict=True)
                    ]
                    for starts in tokens
                ]
                terms = writer.block([ir.offset(builder, row, here) for row in rows], places)
                return [builder.fadd(total, term) for total, term in zip(before, terms, strict=True)]

            zeros = [ir.zeros(vector(F32, ROWS))] * n_tokens
            for t, total in enumerate(ir.loop(builder, blocks, zeros, step)):
                ir.store(builder, total, element(9, blocks.type(ROWS * t)))
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


class _EightRows:
    """Writes what a block of eight rows adds to the sums of some tokens.

    A token is four pointers: its quants, their sums, its scale and its ``s``.
    """

    def __init__(self, name: str, n_tokens: int, context: Any, builder: Builder, stride: Value) -> None:
        self.layout, self.decoder, self.n_tokens = FORMATS[name], DECODERS[name], n_tokens
        self.builder, self.stride = builder, stride
        self.subs = self.layout.block_size // self.layout.sub_block
        self.has_minima = self.layout.offset == "subtract"
        self.width = 2 if self.decoder.largest == 0 else 1
        # Partial sums of the dot products, and of the minima's, [token, row].
        kinds = [vector(I32, count) for count in (8, 4)]
        self.room = (
            [alloca_once(builder, kind, size=n_tokens * ROWS) for kind in kinds] if self.subs > 1 else []
        )

    def block(self, pointers: list[Value], tokens: list[list[Value]]) -> list[Value]:
        """A vector of eight rows for each token."""
        builder, decoder = self.builder, self.decoder
        if self.subs == 1:
            found = [decoder.quants(builder, pointer) for pointer in pointers]
            dots = [[self.dot(quants, None, token[0]) for quants in found] for token in tokens]
            minima: list[list[Value]] = [[] for _ in tokens]
        else:
            dots, minima = self.dots_of_large_blocks(pointers[0], tokens)
        d = block_scales(builder, decoder, pointers)
        dmin = half_at(builder, pointers, decoder.dmin) if decoder.dmin >= 0 else None
        return [self.term(d, dmin, *parts) for parts in zip(dots, minima, tokens, strict=True)]

    def term(
        self, d: Value, dmin: Value | None, dots: list[Value], minima: list[Value], token: list[Value]
    ) -> Value:
        """A block's term of the sum, from its integers."""
        builder, floats = self.builder, vector(F32, ROWS)
        dot = ir.horizontal_sums(builder, dots)
        if self.decoder.bias and self.decoder.scales is None:
            total = builder.sext(ir.load(builder, token[1], I16), I32)
            dot = builder.sub(dot, ir.splat(builder, builder.mul(total, I32(self.decoder.bias)), ROWS))
        lane_d = ir.splat(builder, ir.load(builder, token[2], F32), ROWS)
        term = builder.fmul(builder.fmul(d, lane_d), builder.sitofp(dot, floats))
        if dmin is None:
            return term
        if self.has_minima:
            minimum = builder.sitofp(ir.horizontal_sums(builder, minima), floats)
            return builder.fsub(term, builder.fmul(builder.fmul(dmin, lane_d), minimum))
        lane_s = ir.splat(builder, ir.load(builder, token[3], F32), ROWS)
        return builder.fadd(term, builder.fmul(dmin, lane_s))

    def dots_of_large_blocks(
        self, first: Value, tokens: list[list[Value]]
    ) -> tuple[list[list[Value]], list[list[Value]]]:
        """Partial sums of the dot products and minima, ``[token][row]``.

        A loop over the rows keeps the code small, and the tokens' vectors out of registers.
        """
        builder, decoder = self.builder, self.decoder

        def step(row: Value, _: list[Value]) -> list[Value]:
            pointer = ir.offset(builder, first, builder.mul(row, self.stride))
            quants = decoder.quants(builder, pointer)
            scales = decoder.scales(builder, pointer) if decoder.scales else None
            mins = decoder.mins(builder, pointer) if decoder.mins else None
            for t, token in enumerate(tokens):
                at = builder.add(row, row.type(t * ROWS))
                dot = self.dot(quants, scales, token[0])
                if decoder.largest and scales is not None:
                    sums = ir.load(builder, token[1], vector(I16, self.subs))
                    if decoder.bias:
                        biases = ir.multiply_pairs(builder, scales, sums)
                        dot = builder.sub(dot, builder.mul(biases, constant(I32, decoder.bias, 8)))
                    if mins is not None:
                        minima = ir.multiply_pairs(builder, mins, sums)
                        if self.subs == 16:
                            minima = builder.add(*ir.halves(builder, minima))
                        builder.store(minima, builder.gep(self.room[1], [at]))
                builder.store(dot, builder.gep(self.room[0], [at]))
            return []

        ir.loop(builder, self.stride.type(ROWS), [], step)

        def loaded(place: Value) -> list[list[Value]]:
            return [
                [builder.load(builder.gep(place, [I32(t * ROWS + row)])) for row in range(ROWS)]
                for t in range(self.n_tokens)
            ]

        return loaded(self.room[0]), loaded(self.room[1])

    def dot(self, quants: list[Value], scales: Value | None, values: Value) -> Value:
        """Integer dot product of a row's block and a token, as eight partial sums."""
        builder = self.builder
        total = ir.zeros(vector(I32, 8))
        if scales is not None and self.subs == 16:
            scales = ir.pick(builder, scales, [*range(0, 16, 2), *range(1, 16, 2)])
        elif scales is not None:
            scales = ir.both_ways(builder, scales)
        for i, part in enumerate(quants):
            factor = constant(I16, 1, 16)
            if scales is not None:
                factor = ir.spread(builder, scales, i)
            if self.decoder.largest:
                column = ir.load(builder, ir.offset(builder, values, 32 * i), vector(I8, 32))
                products = ir.multiply_bytes(builder, part, column)
                total = builder.add(total, ir.multiply_pairs(builder, products, factor))
                continue
            if self.decoder.levels and ir.has_signs():
                column, magnitudes = (
                    ir.load(builder, ir.offset(builder, values, 64 * i + at), vector(I8, 32))
                    for at in (0, 32)
                )
                # At most 2 * 128 * 127: a token's quant may be -128, a level may not.
                products = ir.multiply_bytes(builder, magnitudes, ir.with_sign(builder, part, column))
                total = builder.add(total, ir.multiply_pairs(builder, products, factor))
                continue
            for half, words in enumerate(ir.halves(builder, part)):
                wide = builder.sext(words, vector(I16, 16))
                if scales is not None:
                    wide = builder.mul(wide, factor)
                column = ir.load(builder, ir.offset(builder, values, 64 * i + 32 * half), vector(I16, 16))
                total = builder.add(total, ir.multiply_pairs(builder, wide, column))
        return total


_SIGNATURE = "void(R(uint8, 2), int64, int64, R(int8, 2), int16[:,::1], R(f4, 2), R(f4, 2), f4[:,::1])"


@device
def _keep(found: Any, count: int, token: int, skip: int, first: int, end: int, out: Any) -> None:
    """Sums of `count` tokens and eight rows; the last rows share a group with rows before them."""
    for t in range(min(count, out.shape[0] - token)):
        for i in range(min(ROWS, end - first)):
            out[token + t, first + i] = found[t, skip + i]


_one_q4_0, _four_q4_0 = _dot_eight("Q4_0", 1), _dot_eight("Q4_0", 4)
_one_q4_1, _four_q4_1 = _dot_eight("Q4_1", 1), _dot_eight("Q4_1", 4)
_one_q5_0, _four_q5_0 = _dot_eight("Q5_0", 1), _dot_eight("Q5_0", 4)
_one_q5_1, _four_q5_1 = _dot_eight("Q5_1", 1), _dot_eight("Q5_1", 4)
_one_q8_0, _four_q8_0 = _dot_eight("Q8_0", 1), _dot_eight("Q8_0", 4)
_one_q2_k, _four_q2_k = _dot_eight("Q2_K", 1), _dot_eight("Q2_K", 4)
_one_q3_k, _four_q3_k = _dot_eight("Q3_K", 1), _dot_eight("Q3_K", 4)
_one_q4_k, _four_q4_k = _dot_eight("Q4_K", 1), _dot_eight("Q4_K", 4)
_one_q5_k, _four_q5_k = _dot_eight("Q5_K", 1), _dot_eight("Q5_K", 4)
_one_q6_k, _four_q6_k = _dot_eight("Q6_K", 1), _dot_eight("Q6_K", 4)
_one_q8_k, _four_q8_k = _dot_eight("Q8_K", 1), _dot_eight("Q8_K", 4)
_one_iq4_nl, _four_iq4_nl = _dot_eight("IQ4_NL", 1), _dot_eight("IQ4_NL", 4)
_one_iq4_xs, _four_iq4_xs = _dot_eight("IQ4_XS", 1), _dot_eight("IQ4_XS", 4)
_one_mxfp4, _four_mxfp4 = _dot_eight("MXFP4", 1), _dot_eight("MXFP4", 4)


@kernel(_SIGNATURE)
def _q4_0(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q4_0(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q4_0(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q4_1(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q4_1(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q4_1(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q5_0(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q5_0(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q5_0(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q5_1(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q5_1(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q5_1(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q8_0(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q8_0(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q8_0(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q2_k(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q2_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q2_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q3_k(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q3_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q3_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q4_k(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q4_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q4_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q5_k(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q5_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q5_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q6_k(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q6_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q6_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _q8_k(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_q8_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_q8_k(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _iq4_nl(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_iq4_nl(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_iq4_nl(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _iq4_xs(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_iq4_xs(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_iq4_xs(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


@kernel(_SIGNATURE)
def _mxfp4(raw: Any, first: int, end: int, quants: Any, sums: Any, d: Any, s: Any, out: Any) -> None:
    found = np.empty((4, ROWS), np.float32)
    stride, blocks = raw.shape[1], d.shape[1]
    for r in range(first, end, ROWS):
        start = min(r, raw.shape[0] - ROWS)
        for t in range(0, d.shape[0], 4 if d.shape[0] > 2 else 1):
            if d.shape[0] <= 2:
                _one_mxfp4(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 1, t, r - start, r, end, out)
            else:
                _four_mxfp4(raw, start * stride, stride, blocks, t, quants, sums, d, s, found)
                _keep(found, 4, t, r - start, r, end, out)


_KERNELS = {
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
