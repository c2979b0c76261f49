from __future__ import annotations

import numpy as np
import pytest

from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.matmul import matmul_f32_quantized
from driftscope.kernels.reference import published


def bits(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def test_block_ends() -> None:
    values = dequantize(published.block_bytes()[None, :], "Q4_K")[0]
    assert values[0] == 10.75
    assert values[255] == 1.25


def test_path_a() -> None:
    block, x = published.block_bytes(), published.activation()
    assert bits(published.path_a_dot(block, x)) == 0xC69384E3
    assert bits(matmul_f32_quantized(x[None, :], block[None, :], "Q4_K")[0, 0]) == 0xC69384E3


def test_path_b() -> None:
    block, x = published.block_bytes(), published.activation()
    b = published.path_b_dot(block, x)
    assert bits(b) == 0xC693A21E
    percent = 100 * published.relative_difference(published.path_a_dot(block, x), b)
    assert percent == pytest.approx(0.0774, abs=5e-5)


def chain(path, token: int) -> np.ndarray:
    x = published.activation(token)
    for depth in range(5):
        x = published.normalize(path(published.chained_tensor(depth), x))
    return x.astype(float)


@pytest.mark.parametrize(
    ("token", "percent"),
    [(0, 0.439143), (1, 0.246297), (2, 0.020914), (3, 0.028250), (5, 0.024674), (6, 0.020246)],
)
def test_chain_of_five(token: int, percent: float) -> None:
    a, b = chain(published.path_a_matmul, token), chain(published.path_b_matmul, token)
    assert 100 * np.linalg.norm(a - b) / np.linalg.norm(a) == pytest.approx(percent, abs=1.5e-6)


@pytest.mark.parametrize(
    ("d", "percent"),
    [
        (b"\x33\x29", 0.091924),
        (0.01, 0.091873),
        (0.1, 0.092017),
        (0.5, 0.091932),
        (1, 0.091932),
        (10, 0.091966),
    ],
)
def test_scale_alone(d: float | bytes, percent: float) -> None:
    """The relative difference hardly depends on d when there are no minima.

    One ulp of either dot product is 6e-6 % here; the published figures are 0 to 3 ulp away.
    """
    stored = d if isinstance(d, bytes) else np.float16(d).tobytes()
    block = published.block_bytes(d=stored, dmin=b"\x00\x00")
    x = published.activation()
    a, b = published.path_a_dot(block, x), published.path_b_dot(block, x)
    assert 100 * published.relative_difference(a, b) == pytest.approx(percent, abs=2.5e-5)
