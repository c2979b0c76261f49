from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driftscope.analysis.weights.block_findings import BlockFindings, compare_with_findings, tail_bound
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.compare import compare
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import FORMATS

# A bit that stands out of the noise of each format: field, byte of the block, bit.
TELLING = [
    *(("Q4_0", "d", 1, 6), ("Q4_0", "quant", 5, 3), ("Q4_0", "quant", 5, 7)),
    *(("Q4_1", "d", 1, 5), ("Q4_1", "m", 3, 7), ("Q4_1", "quant", 9, 6)),
    *(("Q5_0", "d", 1, 6), ("Q5_0", "quant", 3, 2), ("Q5_0", "quant", 12, 3)),
    *(("Q5_1", "m", 3, 6), ("Q5_1", "quant", 5, 2), ("Q5_1", "quant", 12, 7)),
    *(("Q8_0", "d", 1, 3), ("Q8_0", "quant", 20, 4), ("Q8_0", "quant", 20, 7)),
    *(("Q2_K", "d", 81, 6), ("Q2_K", "dmin", 83, 6), ("Q2_K", "scale", 3, 3), ("Q2_K", "minimum", 3, 7)),
    *(("Q3_K", "d", 109, 6), ("Q3_K", "scale", 104, 1)),
    *(("Q4_K", "d", 1, 5), ("Q4_K", "dmin", 3, 5), ("Q4_K", "scale", 5, 5), ("Q4_K", "minimum", 9, 5)),
    ("Q4_K", "quant", 60, 7),
    *(("Q5_K", "d", 1, 5), ("Q5_K", "quant", 20, 3), ("Q5_K", "quant", 100, 3)),
    *(("Q6_K", "d", 209, 4), ("Q6_K", "scale", 195, 6), ("Q6_K", "quant", 130, 5), ("Q6_K", "quant", 9, 3)),
    *(("IQ4_NL", "d", 1, 6), ("IQ4_NL", "quant", 7, 3)),
    *(("IQ4_XS", "d", 1, 6), ("IQ4_XS", "scale", 2, 1), ("IQ4_XS", "quant", 50, 3)),
    ("MXFP4", "d", 0, 3),
    *(("F16", "sign", 1, 7), ("F16", "exponent", 1, 3), ("F16", "mantissa", 0, 2)),
    *(("BF16", "sign", 1, 7), ("BF16", "exponent", 1, 5), ("BF16", "mantissa", 0, 2)),
    *(("F32", "sign", 3, 7), ("F32", "exponent", 3, 4), ("F32", "mantissa", 0, 3)),
]
CLEAN = [
    "F32",
    "F16",
    "BF16",
    *(name for name, item in FORMATS.items() if item.is_integer and name != "Q8_K"),
]


class Held(TensorRef):
    """A tensor that is not in a file."""

    stored: NDArray[np.uint8]

    def raw(self) -> NDArray[np.uint8]:
        return self.stored


def held(stored: NDArray[np.uint8], dtype: str, shape: tuple[int, int]) -> TensorRef:
    found = Held("t", "t", shape, dtype, Path("held"), 0, stored.nbytes)
    object.__setattr__(found, "stored", stored)
    return found


def raw(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8).reshape(values.shape[0], -1)


def store(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    if dtype == "F32":
        return raw(values.copy())
    if dtype == "F16":
        return raw(values.astype(np.float16))
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return raw(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    return raw(libgguf.quantize_rows(values, libgguf.GGMLQuantizationType[dtype]))


@cache
def weights() -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(17))
    return (0.02 * generator.standard_normal((128, 1024))).astype(np.float32)


def found_in(a: NDArray[np.float32], stored: NDArray[np.uint8], dtype: str) -> BlockFindings:
    shape = (a.shape[0], a.shape[1])
    figures, found = compare_with_findings(held(raw(a), "F32", shape), held(stored, dtype, shape))
    assert repr(figures) == repr(compare(raw(a), "F32", stored, dtype))
    return found


@pytest.mark.parametrize("dtype", CLEAN)
def test_nothing_is_found_in_a_clean_quantization(dtype: str) -> None:
    found = found_in(weights(), store(weights(), dtype), dtype)
    assert not found.findings
    assert (found.outlying_blocks, found.outlying_rows) == (0, 0)
    assert found.block_count == weights().size // max(32, FORMATS[dtype].block_size)


@pytest.mark.parametrize(("dtype", "field", "byte", "bit"), TELLING)
def test_a_flipped_bit_is_named(dtype: str, field: str, byte: int, bit: int) -> None:
    stored = store(weights(), dtype)
    layout = FORMATS[dtype]
    row, block = 77, 3
    width = max(32, layout.block_size)
    each = width // layout.block_size * layout.block_bytes
    stored[row, block * each + byte] ^= np.uint8(1 << bit)
    found = found_in(weights(), stored, dtype)
    assert [item.kind for item in found.findings] == ["flipped-bit"]
    item = found.findings[0]
    assert (item.row, item.columns) == (row, (block * width, (block + 1) * width))
    assert (item.evidence["byte"], item.evidence["bit"], item.evidence["field"]) == (byte, bit, field)
    assert found.outlying_blocks == 1


def test_a_row_off_by_a_constant_and_a_row_off_by_a_factor_are_told_apart() -> None:
    moved = weights().copy()
    moved[31] += 0.0015
    moved[90] *= 1.2
    found = found_in(weights(), store(moved, "Q4_K"), "Q4_K")
    assert {item.row: item.kind for item in found.findings} == {31: "row-offset", 90: "row-scaled"}
    figures = {item.row: item.evidence for item in found.findings}
    assert figures[31]["mean_difference"] == pytest.approx(0.0015, rel=0.1)
    assert figures[90]["factor"] == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize(("scale", "kind"), [(math.inf, "non-finite-scale"), (0.0, "zero-scale")])
def test_a_wrong_scale_that_no_single_bit_explains(scale: float, kind: str) -> None:
    stored = store(weights(), "Q8_0")
    stored[5, 34 * 7 : 34 * 7 + 2] = np.array([scale], np.float16).view(np.uint8)
    found = found_in(weights(), stored, "Q8_0")
    assert [item.kind for item in found.findings] == [kind]
    assert found.findings[0].columns == (224, 256)


def test_quants_at_their_rails() -> None:
    stored = store(weights(), "Q5_1")
    stored[5, 24 * 7 + 4 : 24 * 8] = 0xFF
    assert [item.kind for item in found_in(weights(), stored, "Q5_1").findings] == ["quants-at-rail"]


def test_neighbouring_blocks_are_one_finding_and_all_are_counted() -> None:
    stored = store(weights(), "Q4_0")
    generator = np.random.Generator(np.random.Philox(2))
    stored[40, 18 * 4 : 18 * 8] = generator.integers(0, 256, 72, np.uint8)
    stored[40, 18 * 4 + 1 : 18 * 8 : 18] = 0x2C  # scales near 0.06
    found = found_in(weights(), stored, "Q4_0")
    assert [(item.kind, item.row, item.columns) for item in found.findings] == [
        ("outlying-error", 40, (128, 256))
    ]
    assert found.outlying_blocks == 4
    assert found.to_dict()["findings"][0]["columns"] == [128, 256]


def test_a_long_run_is_one_finding_however_few_are_listed() -> None:
    stored = store(weights(), "Q8_0")
    stored[40, : 34 * 12 : 34] ^= 0x10
    stored[40, 1 : 34 * 12 : 34] ^= 0x10
    found = found_in(weights(), stored, "Q8_0")
    assert [(item.row, item.columns) for item in found.findings] == [(40, (0, 384))]
    assert found.outlying_blocks == 12


def test_a_value_that_is_not_finite_in_the_reference_is_said_so() -> None:
    values = weights().copy()
    values[9, 70] = math.nan
    found = found_in(values, store(weights(), "Q8_0"), "Q8_0")
    assert [(item.kind, item.row, item.columns) for item in found.findings] == [("non-finite", 9, (64, 96))]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_floats_of_eight_bits(name: str, size: float) -> None:
    values = weights() * np.float32(size)
    dtype = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[name]
    stored = torch.from_numpy(values).to(getattr(torch, name)).view(torch.uint8).numpy().reshape(values.shape)
    assert not found_in(values, stored, dtype).findings
    stored[77, 100] ^= 0x80
    item = found_in(values, stored, dtype).findings[0]
    assert (item.kind, item.row, item.columns) == ("flipped-bit", 77, (96, 128))
    assert (item.evidence["element"], item.evidence["field"]) == (4, "sign")


def test_nothing_is_said_of_a_format_whose_steps_are_not_known() -> None:
    stored = store(weights(), "TQ2_0")
    stored[3, 0] ^= 0xFF
    found = found_in(weights(), stored, "TQ2_0")
    assert not found.findings
    assert found.to_dict()["energy_bound"] is None


def test_two_trainings_have_no_blocks_that_stand_out() -> None:
    other = np.random.Generator(np.random.Philox(3)).standard_normal(weights().shape, dtype=np.float32)
    for dtype in ("Q4_K", "F32", "BF16"):
        assert not found_in(weights(), store(np.float32(0.02) * other, dtype), dtype).findings


def test_the_bound_of_a_normal_tail_is_beyond_what_its_size_reaches() -> None:
    generator = np.random.Generator(np.random.Philox(8))
    for _ in range(20):
        codes = np.clip(100 + 3 * generator.standard_normal(100_000), 0, 255).astype(np.int64)
        bound = tail_bound(np.bincount(codes, minlength=256), 1e-6)
        assert 100 + 3 * 4.75 < bound < 100 + 3 * 12


@pytest.mark.model
def test_real_weights_requantized_have_no_findings(default_gguf: Path) -> None:
    tensors = open_artifact(default_gguf).tensors
    generator = np.random.Generator(np.random.Philox(4))
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        ref = tensors[f"model.layers.11.{name}.weight"]
        values = dequantize(ref.raw(), ref.dtype).reshape(-1, 768)
        # What Q4_1 left lies on a lattice: also without it.
        step = np.abs(np.diff(np.sort(values.reshape(-1, 32), axis=1), axis=1))
        step = np.where(step > 1e-7, step, np.inf).min(axis=1, keepdims=True)
        spread = (generator.random((len(step), 32)) - 0.5) * np.where(np.isfinite(step), step, 0)
        spread = (values + spread.reshape(values.shape)).astype(np.float32)
        for dtype in CLEAN:
            for source in (values, spread):
                assert not found_in(source, store(source, dtype), dtype).findings, (name, dtype)
