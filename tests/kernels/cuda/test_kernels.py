"""The CUDA kernels mean what the CPU's do: run from their sources on the host, and on a card if there is one.

On the host the compiler's sanitizers watch every access, and each launch runs in two orders of its threads.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.forward.models import write_model
from tests.kernels.cuda.emulation import HostCard, build
from tests.kernels.cuda.instances import WHOLE, sample
from tests.kernels.test_dequantize import F16_FIELDS, ODD_SCALES

from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy
from driftscope.forward.taps import Collector
from driftscope.kernels import activations, compare, dequantize, forward, matmul, statistics
from driftscope.kernels.cuda import sources
from driftscope.kernels.cuda.kernels import CudaKernels
from driftscope.kernels.cuda.sources import BLOCKS, NATIVE
from driftscope.kernels.device import why_not_cuda
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.reference import activations as reference_activations
from driftscope.kernels.reference import dequantize as reference_dequantize
from driftscope.kernels.reference import matmul as reference_matmul

FEW = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaKernels]:
    card = HostCard(build(tmp_path_factory.mktemp("cuda"), sample()))
    yield CudaKernels(card)
    card.close()


@pytest.fixture(scope="session", params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> CudaKernels:
    if request.param == "emulated":
        found: CudaKernels = request.getfixturevalue("emulated")
        return found
    reason = why_not_cuda()
    if reason:
        pytest.skip(reason)
    from driftscope.kernels.cuda.module import CupyCard

    return CudaKernels(CupyCard())


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def random_rows(dtype: str, rows: int, columns: int, seed: int, *, odd: bool = False) -> NDArray[np.uint8]:
    """Stored rows of random bytes; their scales are odd ones, or moderate, so that sums stay finite."""
    layout, rng = FORMATS[dtype], generator(seed)
    if not layout.is_integer:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        stored = {"F32": values, "F16": values.astype(np.float16), "BF16": values.view("<u2")[:, 1::2]}[dtype]
        return np.ascontiguousarray(stored).view(np.uint8).reshape(rows, -1)
    n_blocks = rows * columns // layout.block_size
    blocks = rng.integers(0, 256, (n_blocks, layout.block_bytes), dtype=np.uint8)
    for at in F16_FIELDS.get(dtype, ()):
        scales = rng.choice(ODD_SCALES, n_blocks) if odd else rng.normal(0, 0.1, n_blocks).astype("<f2")
        blocks[:, at : at + 2] = scales.astype("<u2" if odd else "<f2")[:, None].view(np.uint8)
    if dtype == "Q8_K":
        blocks[:, :4] = rng.normal(0, 0.1, n_blocks).astype("<f4")[:, None].view(np.uint8)
    if dtype == "MXFP4" and not odd:
        blocks[:, 0] = rng.integers(115, 130, n_blocks)
    return blocks.reshape(rows, -1)


def activation_of(n: int, k: int, seed: int, kind: str = "normal") -> NDArray[np.float32]:
    rng = generator(seed)
    x = rng.standard_normal((n, k)).astype(np.float32)
    if kind == "outliers":
        x[rng.random(x.shape) < 0.01] *= 300
    elif kind == "ties":
        x = (rng.integers(-255, 256, (n, k)) / 2).astype(np.float32)
        x[:, ::32] = 127
    elif kind == "tiny":
        x *= np.float32(1e-41)
    elif kind == "constant":
        x[:] = rng.choice([0.0, -0.0, 1.5, -3e38], (n, 1))
    elif kind == "not finite":
        hit = rng.random(x.shape) < 0.02
        x[hit] = rng.choice(np.array([np.nan, np.inf, -np.inf, 3e38], np.float32), int(hit.sum()))
        x[rng.random(x.shape) < 0.005] = np.uint32(0xFFC12345).view(np.float32)
    return x


KINDS = st.sampled_from(["normal", "outliers", "ties", "tiny", "constant", "not finite"])


def same_bits(a: Any, b: Any) -> None:
    """Equal bits; where both are NaN, whatever payload."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    both_nan = np.isnan(a) & np.isnan(b)
    unsigned = {4: np.uint32, 8: np.uint64}[a.itemsize]
    np.testing.assert_array_equal(
        np.where(both_nan, 0, np.ascontiguousarray(a).view(unsigned)),
        np.where(both_nan, 0, np.ascontiguousarray(b).view(unsigned)),
    )


# Stored formats


@pytest.mark.parametrize("dtype", NATIVE)
def test_dequantize(kernels: CudaKernels, dtype: str) -> None:
    columns = 512 if dtype in BLOCKS else 30
    for odd in (False, True):
        raw = random_rows(dtype, 5, columns, 1, odd=odd)
        found, expected = kernels.dequantize(raw, dtype), dequantize.dequantize(raw, dtype)
        same_bits(found, expected)
        if platform.machine() == "x86_64":
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
        if dtype in BLOCKS:
            same_bits(found, reference_dequantize.dequantize(raw, dtype))


def test_dequantize_any_bits_of_f16(kernels: CudaKernels) -> None:
    raw = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(64, -1)
    same_bits(kernels.dequantize(raw, "F16"), dequantize.dequantize(raw, "F16"))


@pytest.mark.parametrize("dtype", ["F64", "IQ2_XXS"])
def test_other_formats_go_through_the_host(kernels: CudaKernels, dtype: str) -> None:
    layout = FORMATS[dtype]
    raw = generator(2).integers(0, 256, (3, 2 * layout.block_bytes), dtype=np.uint8)
    same_bits(kernels.dequantize(raw, dtype), dequantize.dequantize(raw, dtype))


# Activations


@pytest.mark.parametrize("fmt", activations.ACTIVATION_FORMATS)
@FEW
@given(n=st.integers(1, 3), blocks=st.integers(1, 3), seed=SEEDS, kind=KINDS)
def test_quantize_activation(
    kernels: CudaKernels, fmt: str, n: int, blocks: int, seed: int, kind: str
) -> None:
    x = activation_of(n, 256 * blocks, seed, kind)
    found, expected = kernels.quantize_activation(x, fmt), activations.quantize_activation(x, fmt)
    assert type(found) is type(expected)
    if isinstance(expected, activations.RoundedActivation):
        assert isinstance(found, activations.RoundedActivation)
        same_bits(found.values, expected.values)
        return
    assert isinstance(found, activations.QuantizedActivation)
    assert (found.format, found.block_size) == (expected.format, expected.block_size)
    np.testing.assert_array_equal(found.quants, expected.quants)
    same_bits(found.d, expected.d)
    assert (found.s is None) == (expected.s is None)
    if expected.s is not None:
        same_bits(found.s, expected.s)
    if kind not in ("not finite", "tiny"):  # the reference is for finite quotients
        quants, d, _ = reference_activations.quantize_activation(x, fmt)
        np.testing.assert_array_equal(found.quants, quants)
        same_bits(found.d, d)


@FEW
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32), fmt=st.sampled_from(["f16", "bf16"])
)
def test_round_any_bits(kernels: CudaKernels, bits: list[int], fmt: str) -> None:
    x = np.array(bits, np.uint32).view(np.float32)[None]
    same_bits(
        kernels.quantize_activation(x, fmt).dequantize(), activations.quantize_activation(x, fmt).dequantize()
    )


# Matrix products


@pytest.mark.parametrize("dtype", BLOCKS)
@FEW
@given(rows=st.integers(1, 9), blocks=st.integers(1, 5), seed=SEEDS, kind=KINDS, many=st.booleans())
def test_integer_product_of_one_token_and_of_many(
    kernels: CudaKernels, dtype: str, rows: int, blocks: int, seed: int, kind: str, many: bool
) -> None:
    columns = blocks * FORMATS[dtype].block_size
    raw = random_rows(dtype, rows, columns, seed, odd=kind == "not finite")
    x = activation_of(17 if many else 1, columns, seed, kind)
    found = kernels.matmul_quantized(x, raw, dtype)
    same_bits(found, matmul.matmul_quantized(x, raw, dtype))
    if kind == "normal":
        same_bits(found, reference_matmul.matmul_quantized(x, raw, dtype, FORMATS[dtype].activation))


@pytest.mark.parametrize("dtype", [dtype for dtype in WHOLE if dtype in BLOCKS])
@pytest.mark.parametrize("activation", ["q8_0", "q8_1", "q8_1_ref", "q8_K", "apr_q8k"])
@pytest.mark.parametrize("n", [2, 7, 20])
def test_integer_product_of_any_pair(kernels: CudaKernels, dtype: str, activation: str, n: int) -> None:
    raw, x = random_rows(dtype, 10, 512, n), activation_of(n, 512, n)
    found = kernels.matmul_quantized(x, raw, dtype, activation=activation)
    same_bits(found, matmul.matmul_quantized(x, raw, dtype, activation=activation))


@pytest.mark.parametrize(("dtype", "columns"), [("Q4_1", 1056), ("Q6_K", 768), ("Q4_K", 768)])
@pytest.mark.parametrize("n", [1, 9, 17, 70])
def test_integer_product_over_several_tiles(kernels: CudaKernels, dtype: str, columns: int, n: int) -> None:
    raw, x = random_rows(dtype, 70, columns, 3), activation_of(n, columns, 4)
    same_bits(kernels.matmul_quantized(x, raw, dtype), matmul.matmul_quantized(x, raw, dtype))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("kind", ["normal", "not finite"])
def test_f32_product_of_any_format(kernels: CudaKernels, dtype: str, kind: str) -> None:
    columns = 512 if dtype in BLOCKS else 33
    raw = random_rows(dtype, 10, columns, 5, odd=kind == "not finite")
    x = activation_of(3, columns, 6, kind)
    found = kernels.matmul_f32_quantized(x, raw, dtype)
    same_bits(found, matmul.matmul_f32_quantized(x, raw, dtype))
    w = dequantize.dequantize(raw, dtype)
    same_bits(found, reference_matmul.matmul_f32(x, w))
    same_bits(found, matmul.matmul_f32(x, w))


@FEW
@given(
    n=st.sampled_from([1, 4, 5, 16, 17, 66]), rows=st.integers(1, 70), columns=st.integers(1, 70), seed=SEEDS
)
def test_f32_product_of_any_shape(kernels: CudaKernels, n: int, rows: int, columns: int, seed: int) -> None:
    x, w = activation_of(n, columns, seed), activation_of(rows, columns, seed + 1)
    x[0, 0], w[0, 0] = -0.0, 1.0
    same_bits(kernels.matmul_f32(x, w), matmul.matmul_f32(x, w))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_float_weights_round_the_activation_on_the_integer_path(kernels: CudaKernels, dtype: str) -> None:
    raw, x = random_rows(dtype, 4, 36, 7), activation_of(2, 36, 8)
    same_bits(kernels.matmul_quantized(x, raw, dtype), matmul.matmul_quantized(x, raw, dtype))


def test_nothing_times_nothing(kernels: CudaKernels) -> None:
    raw, x = random_rows("Q4_K", 3, 256, 9), activation_of(2, 256, 9)
    assert kernels.matmul_quantized(x[:0], raw, "Q4_K").shape == (0, 3)
    assert kernels.matmul_f32_quantized(x, raw[:0], "Q4_K").shape == (2, 0)
    assert kernels.dequantize(raw[:0], "Q4_K").shape == (0, 256)
    assert kernels.tap_statistics(x[:0]).mean.shape == (0,)


def test_arrays_of_the_device_stay_there(kernels: CudaKernels) -> None:
    raw, x = random_rows("Q4_K", 3, 256, 9), activation_of(2, 256, 9)
    on_device = kernels.matmul_quantized(kernels.to_device(x), kernels.to_device(raw), "Q4_K")
    assert kernels.card.owns(on_device)
    same_bits(kernels.to_host(on_device), matmul.matmul_quantized(x, raw, "Q4_K"))
    assert not kernels.card.owns(kernels.matmul_quantized(x, raw, "Q4_K"))


def test_the_least_used_weights_make_room(kernels: CudaKernels) -> None:
    own = CudaKernels(kernels.card)
    size = own.card.memory // 5
    loaded = []
    # On a real card this would fill half of it.
    if size > 1 << 29:
        pytest.skip("would take half of the card's memory; the emulated card shows it")

    def load(name: str) -> Any:
        loaded.append(name)
        return np.zeros(size, np.uint8)

    for name in ("a", "b", "a", "c", "a", "b"):
        own.resident((name,), lambda name=name: load(name))  # type: ignore[misc]
    assert loaded == ["a", "b", "c", "b"]


# Comparison

EXACT = (
    *("element_count", "compared_count", "identical_count", "small_count", "medium_count", "large_count"),
    *("nan_a", "nan_b", "inf_a", "inf_b", "bit_identical"),
    *("max_diff", "max_index", "max_value_a", "max_value_b"),
)


def same_comparison(found: compare.TensorComparison, expected: compare.TensorComparison) -> None:
    """Counts and maxima are equal; sums differ by the rounding of another order."""
    for field in EXACT:
        np.testing.assert_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    n, aa, bb = expected.compared_count, expected.sum_aa, expected.sum_bb
    sizes = {
        "sum_a": (n * aa) ** 0.5,
        "sum_b": (n * bb) ** 0.5,
        "sum_ab": (aa * bb) ** 0.5,
        "sum_aa": aa,
        "sum_bb": bb,
        "centred_aa": aa,
        "centred_bb": bb,
        "sum_abs": expected.sum_abs,
        "sum_dd": expected.sum_dd,
    }
    for field, size in sizes.items():
        assert abs(getattr(found, field) - getattr(expected, field)) <= 1e-13 * n * size, field
    if expected.expected_energy is None:
        assert found.expected_energy is None
    else:
        assert found.expected_energy == pytest.approx(expected.expected_energy, rel=1e-12)


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("odd", [False, True])
def test_compare_with_bf16(kernels: CudaKernels, dtype: str, odd: bool) -> None:
    columns = 512 if dtype in BLOCKS else 500
    a, b = random_rows("BF16", 35, columns, 10), random_rows(dtype, 35, columns, 11, odd=odd)
    a[3, 8:10] = 255  # a NaN
    same_comparison(kernels.compare(a, "BF16", b, dtype), compare.compare(a, "BF16", b, dtype))


@FEW
@given(rows=st.integers(1, 40), columns=st.sampled_from([1, 3, 7, 512, 1100]), seed=SEEDS, kind=KINDS)
def test_compare_of_any_shape(kernels: CudaKernels, rows: int, columns: int, seed: int, kind: str) -> None:
    x = activation_of(rows, columns, seed, kind)
    y = x + activation_of(rows, columns, seed + 1) * generator(seed).choice([0, 1e-4, 1e-3, 1e-2], x.shape)
    a, b = x.view(np.uint8), y.astype(np.float32).view(np.uint8)
    same_comparison(kernels.compare(a, "F32", b, "F32"), compare.compare(a, "F32", b, "F32"))


def test_compare_of_permuted_rows(kernels: CudaKernels) -> None:
    raw = random_rows("Q6_K", 70, 512, 12)
    order = generator(13).permutation(70)
    a = np.ascontiguousarray(dequantize.dequantize(raw, "Q6_K")).view(np.uint8)
    stored = np.empty_like(raw)
    stored[order] = raw
    found = kernels.compare(a, "F32", stored, "Q6_K", rows_b=order)
    assert found.bit_identical
    assert found.cosine_similarity == 1.0
    assert (found.sum_dd, found.identical_count) == (0.0, 70 * 512)
    same_comparison(found, compare.compare(a, "F32", stored, "Q6_K", rows_b=order))


@pytest.mark.parametrize("turned", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", ["F32", "Q6_K"])
def test_compare_of_a_tensor_that_is_stored_transposed(
    kernels: CudaKernels, dtype: str, turned: tuple[bool, bool]
) -> None:
    x, raw = activation_of(70, 256, 18), random_rows(dtype, 70, 256, 19)
    order = generator(20).permutation(70)
    values = np.ascontiguousarray(dequantize.dequantize(raw, dtype)[order])
    if turned[1]:
        # b's rows are the columns of what is compared.
        shaped, other, options = values.T, raw, {"rows_b": order, "transposed_b": True}
    else:
        shaped, other, options = values, raw, {"rows_b": order}
    a = np.ascontiguousarray(x[:70].T if turned[1] else x)
    stored = np.ascontiguousarray(a.T if turned[0] else a)
    found = kernels.compare(stored.view(np.uint8), "F32", other, dtype, transposed_a=turned[0], **options)
    plain = np.ascontiguousarray(shaped).view(np.uint8)
    expected = compare.compare(a.view(np.uint8), "F32", plain, "F32")
    energy = compare.compare(x.view(np.uint8), "F32", raw, dtype).expected_energy
    same_comparison(found, dataclasses.replace(expected, expected_energy=energy))


def test_compare_of_a_slab_that_begins_without_finite_values(kernels: CudaKernels) -> None:
    x = activation_of(40, 1100, 16)
    x[:10] = np.nan
    a, b = x.view(np.uint8), activation_of(40, 1100, 17).view(np.uint8)
    same_comparison(kernels.compare(a, "F32", b, "F32"), compare.compare(a, "F32", b, "F32"))


def test_compare_where_nothing_is_finite(kernels: CudaKernels) -> None:
    a = np.full((40, 512), np.nan, np.float32).view(np.uint8)
    found = kernels.compare(a, "F32", a, "F32")
    assert (found.compared_count, found.max_index, found.bit_identical) == (0, -1, True)


def test_sums_of_a_comparison_do_not_depend_on_the_run(kernels: CudaKernels) -> None:
    a, b = random_rows("BF16", 64, 512, 14), random_rows("Q4_K", 64, 512, 15)
    assert kernels.compare(a, "BF16", b, "Q4_K") == kernels.compare(a, "BF16", b, "Q4_K")


# Statistics and the ops between the matrix products


@FEW
@given(n=st.integers(1, 3), channels=st.integers(1, 700), seed=SEEDS, kind=KINDS)
def test_tap_statistics(kernels: CudaKernels, n: int, channels: int, seed: int, kind: str) -> None:
    x = activation_of(n, channels, seed, kind)
    if kind == "not finite":
        x[0] = np.nan
    found, expected = kernels.tap_statistics(x), statistics.tap_statistics(x)
    for field in ("finite_count", "nan_count", "inf_count", "zero_count", "argmax_channel"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    for field in ("min", "max", "mean", "centred"):
        same_bits(getattr(found, field), getattr(expected, field))
    assert found.channels == expected.channels


@FEW
@given(n=st.integers(1, 4), heads=st.integers(1, 3), channels=st.integers(1, 300), seed=SEEDS, kind=KINDS)
def test_rms_norm(kernels: CudaKernels, n: int, heads: int, channels: int, seed: int, kind: str) -> None:
    x, weight = activation_of(n, heads * channels, seed, kind), activation_of(1, channels, seed + 1)[0]
    same_bits(kernels.rms_norm(x, weight, 1e-5), forward.rms_norm(x, weight, 1e-5))


@FEW
@given(
    n=st.integers(1, 5),
    heads=st.integers(1, 3),
    half=st.integers(1, 20),
    rest=st.integers(0, 5),
    seed=SEEDS,
    interleaved=st.booleans(),
)
def test_rope(
    kernels: CudaKernels, n: int, heads: int, half: int, rest: int, seed: int, interleaved: bool
) -> None:
    x = activation_of(n, heads * (2 * half + rest), seed)
    frequencies = generator(seed).random(half).astype(np.float32)
    cosine, sine = forward.rope_tables(frequencies, 50)
    same_bits(kernels.to_host(kernels.rope_tables(frequencies, 50)[0]), cosine)
    positions = generator(seed).integers(0, 50, n)
    options: dict[str, Any] = {"interleaved": interleaved, "head_dim": 2 * half + rest if rest else None}
    found = kernels.rope(x, cosine, sine, positions, **options)
    same_bits(found, forward.rope(x, cosine, sine, positions, **options))


@FEW
@given(seed=SEEDS, size=st.sampled_from([1e-3, 1.0, 50.0, 1e4]), kind=KINDS)
def test_gates(kernels: CudaKernels, seed: int, size: float, kind: str) -> None:
    with np.errstate(over="ignore"):
        gate, up = activation_of(3, 300, seed, kind) * np.float32(size), activation_of(3, 300, seed + 1)
        for name in ("silu", "gelu"):
            same_bits(getattr(kernels, name)(gate), getattr(forward, name)(gate))
        same_bits(kernels.soft_cap(gate, 30.0), forward.soft_cap(gate, 30.0))
        for name in ("swiglu", "geglu"):
            same_bits(getattr(kernels, name)(gate, up), getattr(forward, name)(gate, up))


@FEW
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    head_dim=st.sampled_from([2, 6, 16]),
    window=st.sampled_from([None, 1, 3]),
    soft_cap=st.sampled_from([None, 0.5, 30.0]),
    kv_type=st.sampled_from(["f32", "f16"]),
    seed=SEEDS,
    kind=st.sampled_from(["normal", "outliers", "not finite"]),
)
def test_attention(
    kernels: CudaKernels,
    lengths: list[int],
    groups: tuple[int, int],
    head_dim: int,
    window: int | None,
    soft_cap: float | None,
    kv_type: str,
    seed: int,
    kind: str,
) -> None:
    n, (n_heads, n_kv_heads) = sum(lengths), groups
    q, k, v = (
        activation_of(n, heads * head_dim, seed + i, kind)
        for i, heads in enumerate((n_heads, n_kv_heads, n_kv_heads))
    )
    starts = np.cumsum([0, *lengths])
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    options: dict[str, Any] = {**heads, "scale": 0.3, "soft_cap": soft_cap, "kv_type": kv_type}
    expected = forward.attention(q, k, v, starts, window=window, **options)
    same_bits(kernels.attention(q, k, v, starts, window=window, **options), expected)
    t = lengths[0]
    scores = forward.attention_scores(q[:t], k[:t], **options)
    same_bits(kernels.attention_scores(q[:t], k[:t], **options), scores)
    weights = forward.attention_softmax(scores, n_heads=n_heads, window=window)
    same_bits(kernels.attention_softmax(scores, n_heads=n_heads, window=window), weights)


def test_attention_over_more_keys_than_threads(kernels: CudaKernels) -> None:
    q, k, v = (activation_of(270, 4, seed) for seed in (1, 2, 3))
    q[:-1] = 0
    options: dict[str, Any] = {"n_heads": 1, "n_kv_heads": 1, "scale": 0.5}
    scores = forward.attention_scores(q, k, **options)[-2:]
    same_bits(kernels.attention_scores(q, k, **options)[-2:], scores)
    starts = np.array([0, 1, 270])
    if isinstance(kernels.card, HostCard):
        starts, q, k, v = np.array([0, 259]), q[-259:], k[-259:], v[-259:]
    same_bits(kernels.attention(q, k, v, starts, **options), forward.attention(q, k, v, starts, **options))


def test_attention_of_more_heads_than_blocks(kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftscope.kernels.cuda.kernels._ATTENTION_BLOCKS", 3)
    q, k, v = (activation_of(9, 24, seed) for seed in (1, 2, 3))
    options: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 4, "scale": 0.5}
    starts = np.array([0, 5, 9])
    same_bits(kernels.attention(q, k, v, starts, **options), forward.attention(q, k, v, starts, **options))


# The whole


@pytest.mark.parametrize("path", ["f32", "int8-dot"])
def test_a_pass_gives_the_same_taps(
    kernels: CudaKernels, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("driftscope.forward.ops.kernels_on", lambda device, threads: kernels)
    artifact = open_artifact(write_model(tmp_path / "model", "qwen2"))
    batch = TokenBatch.of([[3, 1, 4], [5, 9]])
    policy = Policy.uniform("teacher", path)
    on_device, on_host = Collector(), Collector()
    found = ForwardPass({"teacher": artifact}, policy, device="cuda").run(batch, on_device)
    monkeypatch.undo()
    expected = ForwardPass({"teacher": artifact}, policy).run(batch, on_host)
    assert type(found) is np.ndarray
    same_bits(found, expected)
    assert on_device.arrays.keys() == on_host.arrays.keys()
    for name, array in on_host.arrays.items():
        same_bits(on_device.arrays[name], array)


# What is refused


def test_the_same_mistakes_are_refused(kernels: CudaKernels) -> None:
    x, raw = activation_of(1, 64, 1), random_rows("Q4_0", 2, 64, 1)
    with pytest.raises(InputError, match="not known"):
        kernels.quantize_activation(x, "q9")
    with pytest.raises(InputError, match="multiple of 256"):
        kernels.quantize_activation(x, "q8_K")
    with pytest.raises(InputError, match="cannot multiply"):
        kernels.matmul_quantized(x[:, :32], raw, "Q4_0")
    with pytest.raises(InputError, match="no integer dot product"):
        kernels.matmul_quantized(x, x.view(np.uint8), "F32", activation="q8_0")
    with pytest.raises(InputError, match="cannot be compared"):
        kernels.compare(raw, "Q4_0", x.view(np.uint8), "F32")
    with pytest.raises(ValueError, match="rows 0 to 2"):
        kernels.compare(raw, "Q4_0", raw, "Q4_0", rows_b=np.array([0, 2]))


def test_an_access_outside_of_an_array_is_noticed(emulated: CudaKernels) -> None:
    card = emulated.card
    out = card.empty((2, 256), np.float32)
    short = card.upload(random_rows("Q4_K", 2, 256, 1).reshape(-1)[:-1])
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        card.launch(sources.dequantize("Q4_K", 4), (1, 1), 256, short, np.int64(512), out)
    # The next launch starts anew.
    raw = random_rows("Q4_K", 2, 256, 1)
    same_bits(emulated.dequantize(raw, "Q4_K"), dequantize.dequantize(raw, "Q4_K"))
