"""Which vector instructions the code that is being compiled may use.

Asked of Numba's target and not of the host, so that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are honoured. The
same text is part of the key under which Numba keeps compiled code on disk: code for one set of instructions
is never loaded where another is asked for.
"""

from __future__ import annotations

import functools

from numba.core.registry import cpu_target

PORTABLE, AVX2, VNNI, VNNI_512 = "portable", "avx2", "vnni", "vnni-512"


@functools.cache
def features() -> frozenset[str]:
    """Features of the target, by LLVM's names."""
    text: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(item[1:] for item in text.split(",") if item.startswith("+"))


@functools.cache
def integer_dots() -> str:
    """How integers of 8 bits are multiplied.

    ``vnni-512`` and ``vnni``: four products a lane and their sum in one instruction (vpdpbusd), in vectors of
    512 or 256 bits; ``avx2``: vpmaddubsw, which keeps sums of two products in 16 bits; ``portable``: plain
    vector operations, which every target has.
    """
    has = features().__contains__
    if has("avx2") and has("avx512vnni") and has("avx512vl"):
        return VNNI_512
    if has("avx2") and has("avxvnni"):
        return VNNI
    return AVX2 if has("avx2") else PORTABLE
