"""Which instances of the kernels the tests compile: each format and each shape, but not each of both."""

from __future__ import annotations

import re

from driftscope.kernels.cuda.sources import NATIVE, Kernel, all_kernels
from driftscope.kernels.formats import FORMATS

WHOLE = ("F32", "Q4_1", "Q4_K", "Q6_K")
"""Formats of which every instance is compiled."""


def sample() -> list[Kernel]:
    """For the other formats, the instances for one token and, of the tiles, those for ggml's own pairing."""
    return [kernel for kernel in all_kernels() if _chosen(kernel)]


def core() -> list[Kernel]:
    """Those of `sample` that decode nothing, or a few formats only."""
    few = {*WHOLE, "BF16"}
    return [kernel for kernel in sample() if set(re.findall(r"\w+", kernel.name)) & set(NATIVE) <= few]


def _chosen(kernel: Kernel) -> bool:
    name, _, rest = kernel.name.rstrip(">").partition("<")
    arguments = re.split(", ", rest)
    dtype = arguments[0]
    if name == "compare":
        _, turned_a, other, turned_b, *_ = arguments
        if "true" in (turned_a, turned_b):
            return (dtype, other) in (("F32", "Q6_K"), ("F32", "F32"))
        return dtype == "BF16" or (dtype == "F32" and other in ("F32", "Q6_K"))
    if dtype in WHOLE or name not in ("multiply", "dot_rows", "dot_tiles"):
        return True
    if name == "multiply":
        return arguments[2] == "64"
    own_size = arguments[1] == str(FORMATS[dtype].block_size)
    # One token, or tiles of 32: the tests have 17 where they have many.
    return own_size and arguments[3] == ("1" if name == "dot_rows" else "2")
