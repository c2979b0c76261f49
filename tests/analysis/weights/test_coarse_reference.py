"""A reference that is rounded itself: its own error is allowed for, and no bit is blamed for it."""

from __future__ import annotations

from pathlib import Path

import libgguf
import numpy as np
import pytest

from driftscope.analysis.weights.default_band import DEFAULT_BAND
from driftscope.analysis.weights.relations import Band, relation_of
from driftscope.analysis.weights.rounded_copy import is_coarser
from driftscope.analysis.weights.sweep import compare_tensor
from driftscope.analysis.weights.watched_kernels import WatchedKernels
from driftscope.artifacts.tensor import TensorRef
from driftscope.faultbench.edited import EditedTensor
from driftscope.kernels.device import kernels_on

BAND = Band(*DEFAULT_BAND)
RNG = np.random.Generator(np.random.Philox(7))
VALUES = (0.03 * RNG.standard_normal((96, 512))).astype(np.float32)
OTHERS = (VALUES + 0.012 * RNG.standard_normal(VALUES.shape)).astype(np.float32)
IMPORTANCE = (RNG.standard_normal(512) ** 2 * np.exp(2 * RNG.standard_normal(512)) + 1e-8).astype(np.float32)


def _tensor(values: np.ndarray, dtype: str, importance: np.ndarray | None = None) -> TensorRef:
    if dtype == "F32":
        raw = values.view(np.uint8)
    elif dtype == "F16":
        raw = values.astype(np.float16).view(np.uint8)
    elif dtype == "BF16":
        bits = values.view(np.uint32)
        raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    else:
        raw = libgguf.quantize_rows(values, libgguf.GGMLQuantizationType[dtype], importance)
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(len(values), -1)
    stored = TensorRef("x", "x", values.shape, dtype, Path("model"), 0, raw.nbytes)
    return EditedTensor(**vars(stored), _bytes=raw)


@pytest.mark.parametrize(
    ("dtype_a", "dtype_b"),
    [
        ("Q4_K", "Q8_0"),
        ("Q8_0", "Q6_K"),
        ("Q4_K", "Q4_0"),
        ("Q4_K", "BF16"),
        ("Q4_K", "F32"),
        ("BF16", "F32"),
    ],
)
def test_two_roundings_of_the_same_values(dtype_a: str, dtype_b: str) -> None:
    row = compare_tensor(_tensor(VALUES, dtype_a), _tensor(VALUES, dtype_b))
    assert relation_of(row, BAND).name == "quantized-from"
    assert 0.5 < row["nmse"] / row["expected_nmse"] < 1.3


@pytest.mark.parametrize(("dtype_a", "dtype_b"), [("Q4_K", "Q8_0"), ("Q8_0", "Q6_K"), ("Q4_K", "F32")])
def test_other_values_are_different_all_the_same(dtype_a: str, dtype_b: str) -> None:
    row = compare_tensor(_tensor(VALUES, dtype_a), _tensor(OTHERS, dtype_b))
    assert relation_of(row, BAND).name == "different"


@pytest.mark.parametrize("dtype", ["IQ2_XXS", "IQ3_XXS", "Q2_K", "Q4_K", "Q4_0"])
def test_an_importance_matrix_makes_no_other_weights(dtype: str) -> None:
    row = compare_tensor(_tensor(VALUES, "F32"), _tensor(VALUES, dtype, IMPORTANCE))
    assert relation_of(row, BAND).name == "quantized-from"


def test_values_below_the_normal_range_of_f16_are_no_flipped_bits() -> None:
    small = (VALUES * np.exp(-3.0 * np.abs(RNG.standard_normal(VALUES.shape)))).astype(np.float32)
    a, b = _tensor(small, "F16"), _tensor(small, "BF16")
    watched = WatchedKernels(kernels_on("cpu"))
    compare_tensor(a, b, kernels=watched)  # type: ignore[arg-type]
    assert watched.findings(a, b, "x") == []


def test_a_small_value_of_another_tensor_is_no_flipped_bit() -> None:
    other = (0.1 * RNG.standard_normal(VALUES.shape)).astype(np.float32)
    a, b = _tensor(VALUES, "BF16"), _tensor(other, "BF16")
    watched = WatchedKernels(kernels_on("cpu"))
    compare_tensor(a, b, kernels=watched)  # type: ignore[arg-type]
    assert [item["kind"] for item in watched.findings(a, b, "x") if item["kind"] == "flipped-bit"] == []


class _OtherDevice:
    """The kernels of a device that is not the CPU."""

    def __init__(self) -> None:
        self.compared = 0

    def compare(self, *arguments: object, **options: object) -> object:
        self.compared += 1
        return kernels_on("cpu").compare(*arguments, **options)  # type: ignore[arg-type]


def test_beside_another_device_blocks_are_looked_into_as_well() -> None:
    a, b = _tensor(VALUES, "F32"), _tensor(VALUES, "Q8_0")
    raw = b.raw().copy()
    raw[3, 1] ^= 0x40
    device = _OtherDevice()
    found = []
    for kernels in (kernels_on("cpu"), device):
        watched = WatchedKernels(kernels)  # type: ignore[arg-type]
        watched.compare(a.raw(), a.dtype, raw, b.dtype)
        found.append(watched._errors[0])
    assert device.compared == 1
    assert np.array_equal(found[0].energy, found[1].energy)
    assert found[0].energy.any()


def test_which_of_two_is_coarser() -> None:
    assert is_coarser("Q4_K", "F32")
    assert is_coarser("Q8_0", "Q4_K")
    assert is_coarser("BF16", "F32")
    assert is_coarser("F16", "BF16")
    assert is_coarser("BF16", "F16")
    assert not is_coarser("F32", "BF16")
    assert not is_coarser("F32", "Q4_K")
    assert not is_coarser("Q4_K", "Q4_K")
