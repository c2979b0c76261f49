"""The CUDA sources: their text, how they are compiled, and which instances of their templates are used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from driftscope.kernels.formats import FORMATS

FOLDER = Path(__file__).resolve().parent

# Products are rounded before they are added, as on the CPU. Subnormals are kept and divisions and roots are
# rounded correctly by default.
OPTIONS = ("-std=c++17", "-fmad=false")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""Compute capabilities that the tests compile for; NVRTC of CUDA 12.8 or later knows all three."""

BLOCKS = tuple(name for name, layout in FORMATS.items() if layout.is_integer)
PLAIN = ("F32", "F16", "BF16")
NATIVE = (*PLAIN, *BLOCKS)
"""Formats that the kernels decode; the others are brought to F32 on the host."""

MATMUL_SHAPES = ((64, 1, 4), (32, 2, 16), (16, 4, 64))
"""Threads over rows, outputs a thread each way, and the tokens up to which `multiply` is used so."""

FEW_TOKENS = (1, 4, 8)
"""Tokens for which `dot_rows` decodes a row once."""

TILE_PARTS = (1, 2, 4)
"""Sixteens of tokens in a tile of `dot_tiles`."""

TRANSPOSED = ((False, True), (True, False), (True, True))
"""Which sides of a comparison are stored transposed, where one is."""

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel.

    Attributes:
        file: the source file, e.g. ``dot.cu``.
        name: its name expression, e.g. ``dot_rows<Q4_K, 256, false, 1>``.
    """

    file: str
    name: str


@cache
def source(file: str) -> str:
    """The text of a source file with the shared parts written out where they are first included.

    In one piece, a compiler needs no folder to look in, and a cache that is keyed by the text misses no edit.
    """
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        body = (FOLDER / name).read_text("utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: text(match[1]), body)

    return text(file)


def dequantize(dtype: str, count: int) -> Kernel:
    """Stored values to f32, `count` a thread."""
    return Kernel("dequantize.cu", f"dequantize<{dtype}, {count}>")


def dot_rows(dtype: str, size: int, summed: bool, tokens: int) -> Kernel:
    """Integer dot products for few tokens."""
    return Kernel("dot.cu", f"dot_rows<{dtype}, {size}, {str(summed).lower()}, {tokens}>")


def dot_tiles(dtype: str, size: int, summed: bool, parts: int) -> Kernel:
    """Integer dot products for many tokens."""
    return Kernel("dot.cu", f"dot_tiles<{dtype}, {size}, {str(summed).lower()}, {parts}>")


def multiply(dtype: str, count: int, down: int, each: int) -> Kernel:
    """Float32 matrix product with stored rows."""
    return Kernel("matmul.cu", f"multiply<{dtype}, {count}, {down}, {each}>")


def compare(a: str, b: str, cells: int, count: int, *, transposed: tuple[bool, bool]) -> Kernel:
    """Comparison of two stored tensors; `cells` as in `driftscope.kernels.expected_error`."""
    turned_a, turned_b = (str(turned).lower() for turned in transposed)
    return Kernel("compare.cu", f"compare<{a}, {turned_a}, {b}, {turned_b}, {cells}, {count}>")


FORWARD = {
    name: Kernel("forward.cu", name)
    for name in (
        *("rms_norm", "rope", "silu", "gelu", "soft_cap"),
        *("attention<false>", "attention<true>", "attention_scores", "attention_softmax"),
    )
}
STATISTICS = Kernel("statistics.cu", "tap_statistics")
QUANTIZE = {
    "q8_0": Kernel("activations.cu", "quantize_32<SIMD>"),
    "q8_1": Kernel("activations.cu", "quantize_32<SIMD>"),
    "q8_0_ref": Kernel("activations.cu", "quantize_32<PORTABLE>"),
    "q8_1_ref": Kernel("activations.cu", "quantize_32<PORTABLE>"),
    "q8_K": Kernel("activations.cu", "quantize_256<SIGNED>"),
    "apr_q8k": Kernel("activations.cu", "quantize_256<APR>"),
    "f16": Kernel("activations.cu", "round_to_float16<false>"),
    "bf16": Kernel("activations.cu", "round_to_float16<true>"),
}


def counts_of(dtype: str) -> tuple[int, ...]:
    """Values that a thread may decode at once: quants come in fours, other values also singly."""
    return (4,) if dtype in BLOCKS else (4, 1)


def product_block(dtype: str, activation_block: int) -> int:
    """Values of a block of an integer product: the smaller of the two formats'."""
    return min(FORMATS[dtype].block_size, activation_block)


def all_kernels() -> list[Kernel]:
    """Every instance that may be asked for; of `compare` only those with F32, BF16 or the same format."""
    found = [*FORWARD.values(), STATISTICS, *QUANTIZE.values()]
    for dtype in NATIVE:
        for count in counts_of(dtype):
            found.append(dequantize(dtype, count))
            found += [multiply(dtype, count, down, each) for down, each, _ in MATMUL_SHAPES]
    for dtype in BLOCKS:
        for size in sorted({product_block(dtype, block) for block in (32, 256)}):
            for summed in (False, True) if FORMATS[dtype].offset == "add" else (False,):
                found += [dot_rows(dtype, size, summed, tokens) for tokens in FEW_TOKENS]
                found += [dot_tiles(dtype, size, summed, parts) for parts in TILE_PARTS]
    for b in NATIVE:
        from driftscope.kernels.expected_error import cell_kind

        for a in sorted({"F32", "BF16", b}):
            kind = cell_kind(FORMATS[b])
            for count in sorted(set(counts_of(a)) & set(counts_of(b))):
                found.append(compare(a, b, kind, count, transposed=(False, False)))
            found += [compare(a, b, kind, 1, transposed=turned) for turned in TRANSPOSED]
    return list(dict.fromkeys(found))
