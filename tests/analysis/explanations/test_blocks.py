"""Damage inside a matrix: lost scales, wrong zero points, one flipped bit, in the file or in the engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.analysis.explanations.planted import F32, LAYER, artifact, at, edited, explained

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.forward.model import ForwardPass

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
NAME = f"model.layers.{LAYER}.mlp.down_proj.weight"
PLACE = (LAYER, "ffn_out", "")


def raw_of(own: Artifact) -> tuple[NDArray[np.uint8], str]:
    ref = own.tensors[NAME]
    return np.array(ref.raw()), ref.dtype


def values(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Weights as the gguf package decodes them."""
    if dtype in ("F32", "F16"):
        return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])


def with_bytes(folder: Path, own: Artifact, raw: NDArray[np.uint8]) -> Artifact:
    """The GGUF file with other bytes in one tensor."""
    shutil.copy(own.path, folder / "edited.gguf")
    ref = own.tensors[NAME]
    with open(folder / "edited.gguf", "r+b") as file:
        file.seek(ref.offset)
        file.write(raw.tobytes())
    return open_artifact(folder / "edited.gguf")


def multiplying_with(weight: NDArray[np.float32]) -> type[ForwardPass]:
    """A pass whose down_proj of one layer is another matrix."""

    class Other(ForwardPass):
        def project(self, layer: int, site: str, x: F32) -> F32:
            if at(layer) and site == "down":
                return np.einsum("tc,rc->tr", x, weight)
            return super().project(layer, site, x)

    return Other


def flipped(raw: NDArray[np.uint8], row: int, byte: int, bit: int) -> NDArray[np.uint8]:
    copy = raw.copy()
    copy[row, byte] ^= 1 << bit
    return copy


FLIPS = (("Q8_0", 0, 1, 5), ("Q4_0", 0, 1, 6), ("Q4_K_M", 0, 1, 5), ("Q4_1", 0, 1, 5), ("F16", 0, 1, 6))
"""Scheme, row's first byte of the block, byte in it and bit: each the scale of a block, or a value."""


@pytest.mark.parametrize(("scheme", "block", "byte", "bit"), FLIPS)
@pytest.mark.parametrize("side", ["engine", "file"])
def test_a_flipped_bit_is_named(
    side: str, scheme: str, block: int, byte: int, bit: int, tmp_path: Path
) -> None:
    teacher = artifact("llama", **WIDE)
    own = artifact("llama", scheme, **WIDE)
    raw, dtype = raw_of(own)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]][1]
    row = 37
    broken = flipped(raw, row, size + byte, bit)
    if side == "engine":
        found = explained(tmp_path, own, PLACE, multiplying_with(values(broken, dtype)))
    else:
        found = explained(tmp_path, with_bytes(tmp_path, own, broken), PLACE, reference=teacher)
    assert found[0].class_ == "corrupt-block", found
    evidence = found[0].evidence
    assert (evidence["row"], evidence["block"]) == (row, 1)
    assert (evidence["byte"], evidence["bit"]) == (byte, bit)


def test_a_flipped_bit_of_a_float(tmp_path: Path) -> None:
    own = artifact("llama", **WIDE)
    raw, dtype = raw_of(own)
    broken = flipped(raw, 11, 4 * 100 + 3, 1)
    found = explained(tmp_path, own, PLACE, multiplying_with(values(broken, dtype)))
    assert found[0].class_ == "corrupt-block", found
    assert (found[0].evidence["row"], found[0].evidence["first_column"]) == (11, 100)


def q8_parts(raw: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and integers of Q8_0, as its layout says."""
    blocks = raw.reshape(len(raw), -1, 34)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)
    return scales, blocks[:, :, 2:].view(np.int8).astype(np.float32)


def test_scales_that_the_engine_does_not_apply(tmp_path: Path) -> None:
    own = artifact("llama", "Q8_0", **WIDE)
    raw, _ = raw_of(own)
    _, integers = q8_parts(raw)
    found = explained(tmp_path, own, PLACE, multiplying_with(integers.reshape(len(raw), -1)))
    assert found[0].class_ == "scale-dropped", found


def test_scales_of_the_engine_without_their_minima(tmp_path: Path) -> None:
    """Q4_1 with its scales 128 times too large and its minima as they were."""
    own = artifact("llama", "Q4_1", **WIDE)
    raw, dtype = raw_of(own)
    blocks = raw.reshape(len(raw), -1, 20)
    step = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)
    blocks[:, :, :2] = np.ascontiguousarray((128 * step).astype("<f2")).view(np.uint8)
    found = explained(tmp_path, own, PLACE, multiplying_with(values(raw, dtype)))
    assert found[0].class_ == "scale-dropped", found
    assert found[0].evidence["scale_ratio"] == pytest.approx(128, rel=1e-3)


def test_a_quant_of_the_file_below_the_noise_of_its_row(tmp_path: Path) -> None:
    """The high bit of one integer of Q8_0: its row's output is hardly worse than that of any other."""
    own = artifact("llama", "Q8_0", **WIDE)
    raw, _ = raw_of(own)
    broken = with_bytes(tmp_path, own, flipped(raw, 37, 34 + 12, 3))
    found = explained(tmp_path, broken, PLACE, reference=artifact("llama", **WIDE))
    assert found[0].class_ == "corrupt-block", found
    evidence = found[0].evidence
    assert (evidence["row"], evidence["block"], evidence["byte"], evidence["bit"]) == (37, 1, 12, 3)


@pytest.mark.parametrize("shift", [1, -1, 8])
def test_a_zero_point_of_the_engine(shift: int, tmp_path: Path) -> None:
    own = artifact("llama", "Q8_0", **WIDE)
    raw, _ = raw_of(own)
    scales, integers = q8_parts(raw)
    weight = (scales * (integers + shift)).reshape(len(raw), -1)
    found = explained(tmp_path, own, PLACE, multiplying_with(weight))
    assert found[0].class_ == "zero-point", found
    assert found[0].evidence["shift"] == pytest.approx(shift, rel=1e-3)


def test_a_zero_point_of_the_file(tmp_path: Path) -> None:
    """Q4_1's minimum is off by one step in every block, with the quantization's noise beside it."""
    own = artifact("llama", "Q4_1", **WIDE)
    raw, dtype = raw_of(own)
    assert dtype == "Q4_1"
    blocks = raw.reshape(len(raw), -1, 20)
    step = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)
    least = np.ascontiguousarray(blocks[:, :, 2:4]).view("<f2").astype(np.float32)
    blocks[:, :, 2:4] = np.ascontiguousarray((least + step).astype("<f2")).view(np.uint8)
    broken = with_bytes(tmp_path, own, raw)
    found = explained(tmp_path, broken, PLACE, reference=artifact("llama", **WIDE))
    assert found[0].class_ == "zero-point", found
    assert found[0].evidence["shift"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("width", "class_"), [(32, "zero-point"), (32, "scale-dropped"), (512, "scale-dropped")]
)
def test_blocks_of_a_float_file(width: int, class_: str, tmp_path: Path) -> None:
    reference = artifact("llama", **WIDE)
    random = np.random.Generator(np.random.Philox(5))

    def edit(tensors: dict[str, NDArray[np.float32]]) -> None:
        parts = tensors[NAME].reshape(256, -1, width)
        drawn = random.uniform(0.5, 1.5, (256, parts.shape[1], 1)).astype(np.float32)
        changed = parts * drawn if class_ == "scale-dropped" else parts + np.float32(0.05) * drawn
        tensors[NAME] = np.ascontiguousarray(changed.reshape(256, -1))

    found = explained(tmp_path, edited(tmp_path / "own", reference, edit), PLACE, reference=reference)
    assert found[0].class_ == class_, found


@pytest.mark.parametrize("scheme", ["Q4_0", "Q4_K_M", "Q8_0"])
def test_quantization_alone_is_given_no_name(scheme: str, tmp_path: Path) -> None:
    own = artifact("llama", scheme, **WIDE)
    found = explained(tmp_path, own, PLACE, reference=artifact("llama", **WIDE))
    assert found[0].class_ == "unexplained", found


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_int8_dot_alone_is_given_no_name(part: str, tmp_path: Path) -> None:
    own = artifact("qwen2", "Q4_K_M", **WIDE)
    found = explained(tmp_path, own, (LAYER, "qkv_matmul", part), path="int8-dot")
    assert found[0].class_ == "unexplained", found
