from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from driftscope.kernels.block_errors import BlockErrors, compare_blocks
from driftscope.kernels.compare import compare
from driftscope.kernels.compare_cells import BLOCKS, FLOATS, code_scale
from driftscope.kernels.compare_decode import DIRECT
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import FORMATS, row_bytes
from driftscope.kernels.reference import block_errors as reference


def raw(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8).reshape(values.shape[0], -1)


def random_side(seed: int, dtype: str, rows: int, columns: int) -> NDArray[np.uint8]:
    generator = np.random.Generator(np.random.Philox(seed))
    stored = generator.integers(0, 256, (rows, row_bytes(dtype, columns)), np.uint8)
    # Exponents of MXFP4 so far out that a squared step leaves f32 are left out.
    if dtype == "MXFP4":
        stored[:, :: FORMATS[dtype].block_bytes] = 100 + stored[:, :: FORMATS[dtype].block_bytes] % 50
    return stored


def assert_as_reference(
    found: BlockErrors, a: NDArray[np.float32], b: NDArray[np.float32], stored: NDArray[np.uint8], dtype: str
) -> None:
    layout = FORMATS[dtype]
    energy, peak = reference.ratios(a, b, stored, dtype if layout.native and dtype != "F64" else "F32")
    scale = code_scale(layout)
    np.testing.assert_array_equal(found.energy, scale.code(energy))
    np.testing.assert_array_equal(found.peak, scale.code(peak))
    for codes, counts in ((found.energy, found.energy_counts), (found.peak, found.peak_counts)):
        np.testing.assert_array_equal(counts, np.bincount(codes.reshape(-1), minlength=256))
    both = np.isfinite(a) & np.isfinite(b)
    x, y = (np.where(both, side, 0).astype(np.float64) for side in (a, b))
    terms = np.stack([x, y, x * x, y * y, (x - y) ** 2])
    # Sums of a row are differences of sums of its slab.
    tolerance = 1e-12 * np.abs(terms).sum(axis=(1, 2)) + 1e-300
    assert (np.abs(found.by_row.T - terms.sum(axis=2)) <= tolerance[:, None]).all()


@pytest.mark.parametrize("dtype", [*sorted(DIRECT), "F8_E4M3", "F8_E5M2", "F64", "TQ2_0"])
def test_agrees_with_numpy_for_every_format_on_random_bytes(dtype: str) -> None:
    stored = random_side(5, dtype, 30, 2816)
    generator = np.random.Generator(np.random.Philox(6))
    with np.errstate(all="ignore"):
        b = dequantize(stored, dtype)
        a = np.where(generator.random(b.shape) < 0.5, b, np.float32(1.01) * b).astype(np.float32)
        figures, found = compare_blocks(raw(a), "F32", stored, dtype, threads=2)
        assert repr(figures) == repr(compare(raw(a), "F32", stored, dtype))
        assert_as_reference(found, a, b, stored, dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_agrees_with_numpy_for_any_two_formats_shapes_and_orders(data: st.DataObject) -> None:
    names = [data.draw(st.sampled_from(sorted({*DIRECT, "F64", "TQ2_0"}))) for _ in range(2)]
    floats = all(FORMATS[name].block_size == 1 for name in names)
    rows = data.draw(st.integers(1, 40))
    columns = data.draw(st.integers(1, 300)) if floats else 256 * data.draw(st.sampled_from([1, 2, 9, 17]))
    seed = data.draw(st.integers(0, 2**32))
    stored = [random_side(seed + i, name, rows, columns) for i, name in enumerate(names)]
    order = np.random.Generator(np.random.Philox(seed)).permutation(rows).astype(np.int64)
    with np.errstate(all="ignore"):
        a, b = (dequantize(*side) for side in zip(stored, names, strict=True))
        inputs = (stored[0], names[0], stored[1], names[1])
        threads = data.draw(st.integers(1, 2))
        figures, found = compare_blocks(*inputs, rows_b=order, threads=threads)
        assert repr(figures) == repr(compare(*inputs, rows_b=order))
        assert_as_reference(found, a, b[order], stored[1][order], names[1])


def test_the_error_of_rounding_is_near_one_and_its_peak_at_most_a_quarter() -> None:
    values = np.random.Generator(np.random.Philox(1)).standard_normal((64, 1024), dtype=np.float32)
    for dtype, rounded in (("F16", values.astype(np.float16)), ("F32", values)):
        _, found = compare_blocks(raw(values), "F32", raw(rounded), dtype)
        assert found.scale is FLOATS
        middle = found.scale.ratio(float(np.median(found.energy)))
        assert 0.7 < middle < 1.3 if dtype == "F16" else not found.energy.any()
        assert found.scale.ratio(float(found.peak.max())) <= 0.25


@pytest.mark.parametrize("scale", [BLOCKS, FLOATS])
def test_codes_and_ratios_are_each_others_inverse(scale: Any) -> None:
    codes = np.arange(1, 256)
    ratios = np.array([scale.ratio(int(code)) for code in codes])
    np.testing.assert_array_equal(scale.code(ratios), codes)
    np.testing.assert_array_equal(
        scale.code(np.nextafter(ratios.astype(np.float32), np.float32(0)))[1:], codes[:-1]
    )
    assert scale.code(np.array([0.0, np.inf, np.nan, 1e-30])).tolist() == [0, 255, 255, 1]
