from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftscope.kernels.block_rows import fill
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.unpack import UnpackedRows

BLOCKS = [name for name, layout in FORMATS.items() if layout.is_integer]


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=10, deadline=None)
@given(n_blocks=st.integers(1, 5), first=st.integers(0, 3), n_rows=st.integers(0, 4), seed=st.integers(0, 99))
def test_the_same_integers_and_scales_as_the_plain_unpacker(
    name: str, n_blocks: int, first: int, n_rows: int, seed: int
) -> None:
    layout = FORMATS[name]
    random = np.random.Generator(np.random.Philox(seed))
    raw = random.integers(0, 256, (7, n_blocks * layout.block_bytes), dtype=np.uint8)
    raw.flags.writeable = False
    ours, plain = (UnpackedRows.empty(layout, 4, n_blocks * layout.block_size) for _ in range(2))
    fill(ours, raw, first, first + n_rows)
    plain.fill(raw, first, first + n_rows)
    for field in ("quants", "scales", "mins", "d", "dmin"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(plain, field))
