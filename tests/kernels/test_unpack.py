"""Unpacked rows against the reference in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftscope.kernels.formats import FORMATS
from driftscope.kernels.reference.dequantize import unpack
from driftscope.kernels.unpack import UnpackedRows

BLOCKS = [name for name, layout in FORMATS.items() if layout.is_integer]


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=10, deadline=None)
@given(n_blocks=st.integers(1, 5), first=st.integers(0, 3), n_rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_integers_and_scales_of_the_reference(
    name: str, n_blocks: int, first: int, n_rows: int, seed: int
) -> None:
    layout = FORMATS[name]
    random = np.random.Generator(np.random.Philox(seed))
    raw = random.integers(0, 256, (7, n_blocks * layout.block_bytes), dtype=np.uint8)
    raw.flags.writeable = False
    rows = UnpackedRows.empty(layout, 4, n_blocks * layout.block_size)
    rows.fill(raw, first, first + n_rows)
    expected = unpack(raw[first : first + n_rows], name)
    for field, values in zip(("quants", "scales", "mins", "d", "dmin"), expected, strict=True):
        found = getattr(rows, field)[:n_rows]
        # A format without scales of its own has one for all that the reference lists.
        np.testing.assert_array_equal(found.reshape(-1), np.asarray(values).reshape(-1), err_msg=field)
