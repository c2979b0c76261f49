"""Integer products of every format against the reference, bit for bit, by every route and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_matmul import BLOCKS, bits, gaussian, generator, random_rows

from driftscope.kernels.activations import QuantizedActivation
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.integer_matmul import multiply_integers
from driftscope.kernels.matmul import matmul_quantized
from driftscope.kernels.reference import matmul as reference

AVX2 = "+sse2,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma,+f16c"
VNNI_512 = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni"


def filled(name: str, n_rows: int, n_columns: int, fill: str, seed: int) -> np.ndarray:
    """Rows of ordinary scales with quants all alike, or of random bytes throughout."""
    raw = random_rows(name, n_rows, n_columns, seed)
    blocks = raw.reshape(-1, FORMATS[name].block_bytes)
    if fill == "random":
        blocks[:] = generator(seed).integers(0, 256, blocks.shape, dtype=np.uint8)
    if fill in ("ones", "zeros", "middle"):
        ordinary = random_rows(name, n_rows, n_columns, seed + 5).reshape(blocks.shape)
        same = raw.reshape(blocks.shape) == ordinary
        # Bytes that two seeds give alike are chance or scales; all that differ are quants or integer scales.
        blocks[~same] = {"ones": 255, "zeros": 0, "middle": 128}[fill]
        at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "MXFP4": 0, "Q8_K": 0}.get(name, 0)
        width = {"MXFP4": 1, "Q8_K": 4}.get(name, 2 if FORMATS[name].offset == "none" else 4)
        blocks[:, at : at + width] = ordinary[:, at : at + width]
    return raw


def extreme(n: int, k: int, block_size: int, fill: str, with_sum: bool, seed: int) -> QuantizedActivation:
    """An activation with the quants that non-finite values leave, which no ordinary row has: -128."""
    random = generator(seed)
    quants = random.integers(-128, 128, (n, k), dtype=np.int8)
    if fill != "random":
        quants[:] = {"ones": -128, "zeros": 0, "middle": 127}[fill]
    d, s = (random.uniform(0.01, 0.1, (n, k // block_size)).astype(np.float32) for _ in range(2))
    return QuantizedActivation("q8_1" if with_sum else "q8_K", block_size, quants, d, s if with_sum else None)


FILLS = ("ordinary", "random", "ones", "zeros", "middle")


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(BLOCKS),
    n=st.integers(1, 40),
    r=st.integers(1, 21),
    blocks=st.integers(1, 5),
    block_size=st.sampled_from((32, 256)),
    fill=st.sampled_from(FILLS),
    token_fill=st.sampled_from(FILLS[1:]),
    with_sum=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_quants_in_any_shape(
    name: str,
    n: int,
    r: int,
    blocks: int,
    block_size: int,
    fill: str,
    token_fill: str,
    with_sum: bool,
    seed: int,
) -> None:
    layout = FORMATS[name]
    k = blocks * max(block_size, layout.block_size)
    raw = filled(name, r, k, fill, seed)
    activation = extreme(n, k, block_size, token_fill, with_sum and block_size == 32, seed)
    with np.errstate(all="ignore"):
        expected = reference.multiply_integers(
            activation.quants.astype(np.int64), activation.d, activation.s, raw, name
        )
    found = multiply_integers(activation, raw, layout, threads=1 + seed % 2)
    # Which NaN comes out is not said.
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(found[known]), bits(expected[known]))


@pytest.mark.parametrize("name", BLOCKS)
def test_bits_do_not_depend_on_company(name: str) -> None:
    """Neither on the other tokens and rows, nor on threads, through every kernel that a format has."""
    raw, x = random_rows(name, 43, 768), gaussian(2, 41, 768)
    whole = bits(matmul_quantized(x, raw, name))
    np.testing.assert_array_equal(whole, bits(matmul_quantized(x, raw, name, threads=2)))
    for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 25):
        for threads in (1, 2):
            alone = bits(matmul_quantized(x[41 - n :], raw, name, threads=threads))
            np.testing.assert_array_equal(whole[41 - n :], alone)
    for rows in (slice(0, 1), slice(5, 12), slice(5, 13), slice(20, 43)):
        for n in (1, 4, 20):
            np.testing.assert_array_equal(whole[:n, rows], bits(matmul_quantized(x[:n], raw[rows], name)))


def test_tokens_of_nan_and_infinity() -> None:
    raw, x = random_rows("Q4_0", 16, 64), gaussian(2, 6, 64)
    x[1, 3], x[4, 40] = np.nan, np.inf
    out = matmul_quantized(x, raw, "Q4_0")
    assert np.all(np.isfinite(out[[0, 2, 3, 5]]))
    for t in range(6):
        np.testing.assert_array_equal(out[t : t + 1], matmul_quantized(x[t : t + 1], raw, "Q4_0"))


DIGEST = """
import hashlib, sys
import numpy as np
from tests.kernels.test_matmul import gaussian, random_rows
from driftscope.kernels import instructions, ir
from driftscope.kernels.matmul import matmul_quantized

if sys.argv[1] != "host":
    # The kernels of the instructions named, with vpdpbusd written out in operations that this host has.
    instructions.integer_dots = lambda: sys.argv[1]

    def add_dots(builder, total, unsigned, signed):
        pairs = ir.vector(ir.I16, 2 * total.type.count)
        u, s = builder.bitcast(unsigned, pairs), builder.bitcast(signed, pairs)
        eight, low = (ir.constant(ir.I16, value, 2 * total.type.count) for value in (8, 255))
        even = builder.and_(u, low), builder.ashr(builder.shl(s, eight), eight)
        odd = builder.lshr(u, eight), builder.ashr(s, eight)
        for factors in (even, odd):
            wide = [builder.sext(factor, ir.vector(ir.I32, 2 * total.type.count)) for factor in factors]
            products = builder.mul(*wide)
            for start in (0, 1):
                some = ir.pick(builder, products, range(start, 2 * total.type.count, 2))
                total = builder.add(total, some)
        return total

    ir.add_dots = add_dots

digest = hashlib.sha256()
for name in sys.argv[2].split(","):
    for n in map(int, sys.argv[3].split(",")):
        raw, x = random_rows(name, 21, 768), gaussian(2, n, 768)
        digest.update(matmul_quantized(x, raw, name).tobytes())
print(instructions.integer_dots(), digest.hexdigest())
"""


def digest(formats: str, tokens: str, *, as_if: str = "host", **environment: str) -> list[str]:
    """What instructions a process of its own chose, and a digest of products."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src")])
    found = subprocess.run(
        [sys.executable, "-c", DIGEST, as_if, formats, tokens],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split()


@pytest.mark.parametrize(
    ("formats", "tokens"),
    [("Q4_K", "1,16"), pytest.param(",".join(BLOCKS), "1,4,8,20", marks=pytest.mark.slow)],
)
def test_plain_vectors_give_the_same_bytes(formats: str, tokens: str, tmp_path: Path) -> None:
    """On any CPU: no instruction of x86 is named. One folder of compiled code holds both, unmixed."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    here = digest(formats, tokens, **cache)
    plain = digest(formats, tokens, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", **cache)
    assert plain[0] == "portable"
    assert plain[1] == here[1]
    assert digest(formats, tokens, **cache) == here


@pytest.mark.parametrize(
    "formats", ["Q6_K,Q8_0,Q8_K", pytest.param(",".join(BLOCKS), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("instructions", ["vnni", "vnni-512"])
def test_the_kernels_of_vnni_give_the_same_bytes(instructions: str, formats: str, tmp_path: Path) -> None:
    """As far as a host without it can tell: vpdpbusd itself is replaced by what it is defined to do."""
    tokens = "20"
    # Compiled code of a patched package belongs in a folder of its own.
    found = digest(formats, tokens, as_if=instructions, NUMBA_CACHE_DIR=str(tmp_path))
    assert found == [instructions, digest(formats, tokens)[1]]


ASSEMBLY = """
import numba
from driftscope.kernels import instructions, integer_tiles
names = {name: getattr(numba.types, name) for name in numba.types.__all__}
kind = eval(integer_tiles._SIGNATURE, {}, names)
compiled = numba.njit(kind, nogil=True, error_model="numpy")(integer_tiles._multiply_16_8.__wrapped__)
lines = compiled.inspect_asm(compiled.signatures[0]).splitlines()
print(instructions.integer_dots())
for line in lines:
    print(line) if "vpdpbusd" in line or "vpmaddubsw" in line else None
"""


@pytest.mark.parametrize(
    ("cpu", "features", "chosen", "instruction", "register"),
    [
        ("znver4", VNNI_512, "vnni-512", "vpdpbusd", "%zmm"),
        ("sapphirerapids", VNNI_512, "vnni-512", "vpdpbusd", "%zmm"),
        ("alderlake", f"{AVX2},+avxvnni", "vnni", "vpdpbusd", "%ymm"),
        ("haswell", AVX2, "avx2", "vpmaddubsw", "%ymm"),
        ("x86-64", "+sse2", "portable", "", ""),
    ],
)
def test_the_assembly_holds_what_was_chosen(
    cpu: str, features: str, chosen: str, instruction: str, register: str
) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    found = subprocess.run(
        [sys.executable, "-c", ASSEMBLY], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found[0] == chosen
    assert len(found) == (65 if instruction else 1)
    assert all(instruction in line and register in line for line in found[1:])
