from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
from decimal import Decimal, localcontext
from functools import cache
from typing import Any

import libgguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.helpers.generic_cpu import on_generic_cpu

from driftscope.errors import InputError
from driftscope.kernels.compare import TensorComparison, compare, merge, rows_of_slab
from driftscope.kernels.compare_decode import DIRECT
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import FORMATS, row_bytes
from driftscope.kernels.reference import compare as reference

QUANTIZED = [name for name, item in FORMATS.items() if item.is_integer and name != "Q8_K"]
EXACT_FIELDS = [
    *("element_count", "compared_count", "identical_count", "small_count", "medium_count", "large_count"),
    *("nan_a", "nan_b", "inf_a", "inf_b", "bit_identical", "max_diff", "max_index"),
    *("max_value_a", "max_value_b"),
]
SUMS = ["sum_a", "sum_b", "sum_aa", "sum_bb", "sum_ab", "sum_abs", "sum_dd", "centred_aa", "centred_bb"]


def raw(values: NDArray[Any]) -> NDArray[np.uint8]:
    values = np.ascontiguousarray(values)
    return values.view(np.uint8).reshape(values.shape[0], values.shape[1] * values.itemsize)


def store(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    if dtype == "F16":
        return raw(values.astype(np.float16))
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return raw(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    kind = libgguf.GGMLQuantizationType[dtype]
    return raw(libgguf.quantize_rows(values, kind))


@cache
def samples(kind: str, rows: int = 128, columns: int = 512) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(11))
    draw = {
        "gaussian": lambda: generator.standard_normal((rows, columns)),
        "uniform": lambda: generator.uniform(-1, 1, (rows, columns)),
        "laplace": lambda: generator.laplace(size=(rows, columns)),
    }[kind]
    return (0.02 * draw()).astype(np.float32)


def assert_agrees(found: TensorComparison, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    expected = reference.compare(a, b)
    figures = dataclasses.asdict(found)
    np.testing.assert_equal(
        {name: figures[name] for name in EXACT_FIELDS}, {name: expected[name] for name in EXACT_FIELDS}
    )
    both = np.isfinite(a) & np.isfinite(b)
    x, y = a[both].astype(np.float64), b[both].astype(np.float64)
    scale = {  # what the sums are of, without cancellation
        "sum_a": np.abs(x).sum(),
        "sum_b": np.abs(y).sum(),
        "sum_ab": np.abs(x * y).sum() + (x * x).sum() + (y * y).sum(),
    }
    for name in SUMS:
        tolerance = 1e-12 * scale.get(name, 0.0) + 1e-300
        assert figures[name] == pytest.approx(expected[name], rel=1e-10, abs=tolerance), name


ORDINARY = st.floats(-4, 4, width=32)
NEAR = st.sampled_from([0.0, -0.0, 1e-3, -1e-3, 1e-2, 9.999e-4, 1e-45, 3e38, -3e38])
BROKEN = st.sampled_from([math.nan, math.inf, -math.inf])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_agrees_with_numpy_on_any_values(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    value = st.one_of(ORDINARY, NEAR, BROKEN) if data.draw(st.booleans()) else st.one_of(ORDINARY, NEAR)
    pairs = st.lists(value, min_size=rows * columns, max_size=rows * columns)
    a = np.array(data.draw(pairs), np.float32).reshape(rows, columns)
    b = np.where(data.draw(st.booleans()), a, np.array(data.draw(pairs), np.float32).reshape(rows, columns))
    assert_agrees(compare(raw(a), "F32", raw(b), "F32"), a, b)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", *QUANTIZED, "Q8_K"])
def test_agrees_with_numpy_for_every_format_on_random_bytes(dtype: str) -> None:
    generator = np.random.Generator(np.random.Philox(5))
    columns, rows = 512, 75
    stored = generator.integers(0, 256, (rows, row_bytes(dtype, columns)), np.uint8)
    with np.errstate(all="ignore"):
        b = dequantize(stored, dtype)
        a = np.where(generator.random(b.shape) < 0.5, b, np.float32(1.01) * b).astype(np.float32)
        found = compare(raw(a), "F32", stored, dtype, threads=2)
        assert_agrees(found, a, b)
        swapped = compare(stored, dtype, raw(a), "F32")
        assert_agrees(swapped, b, a)
        expected = reference.expected_energy(stored, dtype)
    assert found.expected_energy == (None if expected is None else pytest.approx(expected, rel=1e-12))
    assert swapped.expected_energy is None


def test_reads_types_that_only_the_gguf_package_decodes() -> None:
    values = samples("gaussian", 70)
    stored = store(values, "TQ2_0")
    found = compare(raw(values), "F32", stored, "TQ2_0", threads=2)
    assert_agrees(found, values, dequantize(stored, "TQ2_0"))
    assert found.expected_energy is None


@pytest.mark.parametrize("columns", [1, 31, 576, 20_000])
def test_same_bits_whatever_the_threads(columns: int) -> None:
    generator = np.random.Generator(np.random.Philox(7))
    rows = max(3, 200_000 // columns)
    a = generator.standard_normal((rows, columns), dtype=np.float32)
    b = a + np.float32(1e-3) * generator.standard_normal((rows, columns), dtype=np.float32)
    b[1, 0] = np.nan
    one, three = (compare(raw(a), "F32", raw(b), "F32", threads=n) for n in (1, 3))
    assert one == three
    assert_agrees(one, a, b)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 4))
def test_parts_in_order_merge_into_the_whole(seed: int, cut: int) -> None:
    generator = np.random.Generator(np.random.Philox(seed))
    columns = 4096
    slab = rows_of_slab(columns)
    a = generator.standard_normal((4 * slab, columns), dtype=np.float32)
    b = np.round(a, 2)
    a[generator.integers(0, len(a), 3), generator.integers(0, columns, 3)] = np.inf
    at = cut * slab
    whole = compare(raw(a), "F32", raw(b), "F32")
    parts = [compare(raw(a[s]), "F32", raw(b[s]), "F32") for s in (slice(0, at), slice(at, None))]
    merged = dataclasses.asdict(merge(parts))
    for name, value in dataclasses.asdict(whole).items():
        assert merged[name] == (pytest.approx(value, rel=1e-13, abs=1e-9) if name in SUMS else value), name


def test_row_maps_put_both_sides_in_canonical_order() -> None:
    values = samples("gaussian", 64, 256)
    order = np.random.Generator(np.random.Philox(1)).permutation(64)
    stored = np.empty_like(values)
    stored[order] = values
    found = compare(raw(values), "F32", raw(stored), "F32", rows_b=order)
    assert found.bit_identical
    assert compare(raw(stored), "F32", raw(values), "F32", rows_a=order).bit_identical
    assert not compare(raw(values), "F32", raw(stored), "F32").bit_identical


def random_blocks(seed: int, dtype: str, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random bytes, but for blocks that would hold a value that is not finite: those are zero."""
    generator = np.random.Generator(np.random.Philox(seed))
    stored = generator.integers(0, 256, (rows, row_bytes(dtype, columns)), np.uint8)
    layout = FORMATS[dtype]
    blocks = stored.reshape(-1, layout.block_bytes)
    with np.errstate(all="ignore"):
        finite = np.isfinite(dequantize(blocks, dtype)).all(axis=1)
    return np.where(finite[:, None], blocks, np.uint8(0)).reshape(stored.shape)


@pytest.mark.parametrize("dtype", sorted(DIRECT))
def test_decodes_the_very_bits_of_dequantize(dtype: str) -> None:
    stored = random_blocks(3, dtype, 9, 2816)
    values = dequantize(stored, dtype).copy()
    found = compare(stored, dtype, raw(values), "F32")
    assert found.bit_identical
    assert found.identical_count == values.size
    values[4, 1111] = np.nextafter(values[4, 1111], np.float32(np.inf))
    assert not compare(stored, dtype, raw(values), "F32").bit_identical


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_agrees_with_numpy_for_any_two_formats_and_orders(data: st.DataObject) -> None:
    names = st.sampled_from(sorted({*DIRECT, "F64", "TQ2_0"}))
    sides, ordered, options = [], [], {}
    n_rows, n_columns = (256 * data.draw(st.integers(1, 2)) for _ in range(2))
    for side in "ab":
        dtype, transposed, permuted = data.draw(names), data.draw(st.booleans()), data.draw(st.booleans())
        shape = (n_columns, n_rows) if transposed else (n_rows, n_columns)
        seed = data.draw(st.integers(0, 2**32))
        if data.draw(st.booleans()):
            stored = random_blocks(seed, dtype, *shape)
        else:
            generator = np.random.Generator(np.random.Philox(seed))
            stored = generator.integers(0, 256, (shape[0], row_bytes(dtype, shape[1])), np.uint8)
        rows = None
        if permuted:
            rows = np.random.Generator(np.random.Philox(seed + 1)).permutation(shape[0]).astype(np.int64)
        with np.errstate(all="ignore"):
            values = dequantize(stored, dtype)
        sides.append((stored, dtype))
        ordered.append(reference.canonical(values, rows, transposed=transposed))
        options |= {f"rows_{side}": rows, f"transposed_{side}": transposed}
    with np.errstate(all="ignore"):
        found = compare(*sides[0], *sides[1], **options, threads=data.draw(st.integers(1, 2)))
        assert_agrees(found, *ordered)
        expected = reference.expected_energy(*sides[1])
    assert found.expected_energy == (None if expected is None else pytest.approx(expected, rel=1e-12))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 600),
    columns=st.integers(1, 600),
    transposed=st.tuples(st.booleans(), st.booleans()),
    special=st.sampled_from([None, math.nan, math.inf, -math.inf, 1e-45, -0.0, 3e38]),
    seed=st.integers(0, 2**32),
)
def test_transposes_of_any_shape(
    rows: int, columns: int, transposed: tuple[bool, bool], special: float | None, seed: int
) -> None:
    generator = np.random.Generator(np.random.Philox(seed))
    a = generator.standard_normal((rows, columns), dtype=np.float32)
    b = (a + np.float32(0.004) * generator.standard_normal((rows, columns))).astype(np.float32)
    if special is not None:
        for values in (a, b):
            values[generator.integers(0, rows, 3), generator.integers(0, columns, 3)] = special
    stored = [np.ascontiguousarray(v.T) if t else v for v, t in zip((a, b), transposed, strict=True)]
    found = compare(
        *(raw(stored[0]), "F32", raw(stored[1]), "F32"),
        transposed_a=transposed[0],
        transposed_b=transposed[1],
    )
    assert_agrees(found, a, b)


def test_the_cosine_is_right_where_it_is_near_one() -> None:
    generator = np.random.Generator(np.random.Philox(4))
    a = generator.standard_normal((40, 1024), dtype=np.float32)
    for size in (1e-1, 1e-3, 1e-5, 1e-7):
        noise = np.float32(size) * generator.standard_normal(a.shape, dtype=np.float32)
        b = (a + noise).astype(np.float32)
        found = compare(raw(a), "F32", raw(b), "F32")
        x, y = ([Decimal(v) for v in side.reshape(-1).tolist()] for side in (a, b))
        with localcontext(prec=80):
            xy, xx, yy = (sum(map(operator.mul, *pair)) for pair in ((x, y), (x, x), (y, y)))
            exact = xy / (xx * yy).sqrt()
            assert found.cosine_similarity is not None
            assert abs(exact - Decimal(found.cosine_similarity)) < 2e-16
            assert abs(1 - Decimal(found.sum_dd) / (xx - 2 * xy + yy)) < 1e-13
            assert abs(1 - Decimal(found.sum_ab) / xy) < 1e-13


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e5, 1e12])
def test_the_cosine_of_tensors_of_unlike_size(scale: float) -> None:
    generator = np.random.Generator(np.random.Philox(4))
    a = generator.standard_normal((64, 2048), dtype=np.float32)
    b = (np.float32(scale) * (a + generator.standard_normal(a.shape))).astype(np.float32)
    found = compare(raw(a), "F32", raw(b), "F32")
    x, y = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
    xy, xx, yy = (math.fsum((p * q).tolist()) for p, q in ((x, y), (x, x), (y, y)))
    assert found.cosine_similarity == pytest.approx(xy / math.sqrt(xx) / math.sqrt(yy), abs=1e-14)
    assert found.sum_ab == pytest.approx(xy, rel=1e-12)


def test_classes_are_exact_at_their_bounds() -> None:
    values = []
    for bound in (1e-3, 1e-2):
        near = np.float32(bound)
        values += [np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(1))]
    away = np.array([0, 1e-13, -1e-13, 1e-11, -1e-11, 5e-11, -5e-11, 3e-10, -3e-10], np.float32)
    a, b = (np.ascontiguousarray(grid) for grid in np.meshgrid(np.array(values, np.float32), away))
    assert_agrees(compare(raw(a), "F32", raw(b), "F32"), a, b)


def test_the_largest_difference_is_told_from_those_that_f32_takes_for_equal() -> None:
    a, b = np.ones((300, 1024), np.float32), np.zeros((300, 1024), np.float32)
    b[150:] = 1e-12
    b[200, 7] = b[299, 1000] = -1e-10
    found = compare(raw(a), "F32", raw(b), "F32", threads=2)
    assert found.max_index == 200 * 1024 + 7
    assert_agrees(found, a, b)


def test_differences_beyond_f32_are_finite() -> None:
    a = np.full((3, 700), 3e38, np.float32)
    assert_agrees(compare(raw(a), "F32", raw(-a), "F32"), a, -a)


def test_slabs_that_are_not_finite_do_not_hide_others() -> None:
    generator = np.random.Generator(np.random.Philox(9))
    a = generator.standard_normal((256, 4096), dtype=np.float32)
    b = np.round(a, 2)
    a[0, 5], b[100, 0], b[101] = np.nan, np.inf, np.nan
    b[200, 99] = 40.0
    for threads in (1, 2):
        assert_agrees(compare(raw(a), "F32", raw(b), "F32", threads=threads), a, b)


def digest_of_all_formats(threads: int = 1) -> str:
    """Of every figure of comparisons with every format; called in another process as well."""
    digest = hashlib.sha256()
    for dtype in sorted(DIRECT):
        stored = random_blocks(8, dtype, 24, 8192)
        values = dequantize(stored, dtype)
        scale = np.float32(1.01)
        with np.errstate(over="ignore"):
            other = store((values * scale).astype(np.float32), "BF16")
        for found in (
            compare(other, "BF16", stored, dtype, threads=threads),
            compare(stored, dtype, raw(values[::-1]), "F32", threads=threads),
            compare(stored, dtype, raw(values.T), "F32", transposed_b=True, threads=threads),
        ):
            digest.update(repr(dataclasses.astuple(found)).encode())
    return digest.hexdigest()


def test_same_bits_for_every_format_whatever_the_threads() -> None:
    assert digest_of_all_formats() == digest_of_all_formats(threads=2)


@pytest.mark.slow
def test_same_bits_on_a_processor_without_vectors_and_fused_operations() -> None:
    found = on_generic_cpu("tests.kernels.test_compare:digest_of_all_formats", {"digest": ()})
    assert found["digest"] == digest_of_all_formats()


def test_equal_tensors_have_no_error_and_a_cosine_of_one() -> None:
    values = samples("laplace")
    found = compare(raw(values), "F32", raw(values), "F32")
    assert found.bit_identical
    assert (found.nmse, found.cosine_similarity, found.std_ratio) == (0.0, 1.0, 1.0)


def test_zeros_of_either_sign_are_equal_but_not_bit_identical() -> None:
    plus, minus = np.zeros((1, 5), np.float32), -np.zeros((1, 5), np.float32)
    found = compare(raw(plus), "F32", raw(minus), "F32")
    assert found.identical_count == 5
    assert not found.bit_identical
    assert (found.nmse, found.cosine_similarity, found.std_ratio) == (0.0, 1.0, None)


def test_a_difference_from_zeros_has_no_relative_error() -> None:
    zeros, ones = np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)
    found = compare(raw(zeros), "F32", raw(ones), "F32")
    assert (found.nmse, found.relative_l2, found.cosine_similarity) == (None, None, None)
    assert found.rmse == 1.0


def test_nothing_finite_is_nothing_compared() -> None:
    values = np.full((2, 8), np.nan, np.float32)
    found = compare(raw(values), "F32", raw(values), "F32")
    assert (found.compared_count, found.nan_a, found.max_index) == (0, 16, -1)
    assert (found.mean_diff, found.rmse, found.nmse, found.std_a) == (None, None, None, None)
    empty = compare(raw(values[:0]), "F32", raw(values[:0]), "F32")
    assert (empty.element_count, empty.compared_count, empty.nmse) == (0, 0, None)
    merged = merge([empty, found])
    assert (merged.element_count, merged.nan_a, merged.max_index) == (16, 16, -1)


@pytest.mark.parametrize("first", [1000.0, 1e6])
def test_std_is_sound_far_from_zero_and_behind_an_outlier(first: float) -> None:
    generator = np.random.Generator(np.random.Philox(2))
    near = np.float32(1000) + np.float32(1e-3) * generator.standard_normal((8, 4096), dtype=np.float32)
    near[0, 0] = first
    found = compare(raw(near), "F32", raw(near), "F32")
    exact = [math.fsum([v]) for v in near.reshape(-1).tolist()]
    mean = math.fsum(exact) / len(exact)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in exact) / (len(exact) - 1))
    assert found.std_a == pytest.approx(std, rel=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "laplace"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", *QUANTIZED])
def test_measured_error_of_a_quantizer_is_near_the_expected_one(dtype: str, kind: str) -> None:
    values = samples(kind)
    found = compare(raw(values), "F32", store(values, dtype), dtype)
    assert found.nmse is not None
    assert found.expected_nmse is not None
    assert 0.7 < found.nmse / found.expected_nmse < 1.25


def test_a_dropped_scale_is_far_from_the_expected_error() -> None:
    values = samples("gaussian")
    stored = store(2 * values, "Q8_0")
    found = compare(raw(values), "F32", stored, "Q8_0")
    assert found.nmse is not None
    assert found.expected_nmse is not None
    assert found.nmse / found.expected_nmse > 1000
    assert found.std_ratio == pytest.approx(2, rel=1e-3)


def test_unequal_shapes_are_refused() -> None:
    values = samples("gaussian")
    with pytest.raises(InputError, match="128 x 512 and 64 x 512"):
        compare(raw(values), "F32", raw(values[:64]), "F32")
    with pytest.raises(InputError, match="expected a multiple of"):
        compare(raw(values), "F32", raw(values)[:, :7], "Q4_0")
