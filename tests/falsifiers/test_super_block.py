"""Packed rows against the gguf package, and the predicted rounding error against the measured one."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from driftscope.errors import InputError
from driftscope.falsifiers import super_block
from driftscope.falsifiers.sampling import generator
from driftscope.kernels.reference import published


def test_packed_rows_are_what_the_gguf_package_reads() -> None:
    random = generator(1)
    quants = random.integers(0, 16, (5, 256))
    scales, mins = random.integers(0, 64, (5, 8)), random.integers(0, 64, (5, 8))
    rows = super_block.pack_rows(quants, scales, mins, 2.0**-7)
    d, dmin = np.float16(2.0**-7), np.float16(7.5 * 2.0**-7)
    expected = float(d) * np.repeat(scales, 32, axis=1) * quants - float(dmin) * np.repeat(mins, 32, axis=1)
    read = gguf.dequantize(rows, gguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(read, expected.astype(np.float32))


@pytest.mark.parametrize("draw", [super_block.random_rows, super_block.gaussian_rows])
def test_drawn_rows_are_centred(draw: object) -> None:
    rows = draw(generator(2), 2000)  # type: ignore[operator]
    values = gguf.dequantize(rows, gguf.GGMLQuantizationType.Q4_K).astype(np.float64)
    assert abs(values.mean()) < 0.02 * values.std()


def test_the_paths_give_the_published_bits() -> None:
    rows, ramp = published.block_bytes()[None], published.activation()[None]
    assert int(super_block.path_a(rows, ramp).view(np.uint32)[0, 0]) == 0xC69384E3
    assert int(super_block.path_b(rows, ramp, "apr_q8k").view(np.uint32)[0, 0]) == 0xC693A21E


def test_swapping_the_nibbles_twice_changes_nothing() -> None:
    rows = super_block.random_rows(generator(3), 4)
    once = super_block.swapped_nibbles(rows)
    assert not np.array_equal(once, rows)
    assert np.array_equal(once[:, :16], rows[:, :16])
    assert np.array_equal(super_block.swapped_nibbles(once), rows)


def test_an_activation_format_of_smaller_blocks_is_refused() -> None:
    rows, x = super_block.random_rows(generator(4), 2), np.ones((1, 256), np.float32)
    with pytest.raises(InputError, match="use apr_q8k or q8_K"):
        super_block.predicted_energy(rows, x, "q8_0")
