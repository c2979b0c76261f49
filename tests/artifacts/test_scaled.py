"""Checkpoints of eight bits with scales, against torch and the ways in which others apply the scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.helpers.tiny_models import save_tiny_model

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.scaled import ScaledTensor
from driftscope.errors import InputError
from driftscope.forward.policy import Choice
from driftscope.forward.weights import Weights
from driftscope.kernels.dequantize import dequantize

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], None]


def write(folder: Path, quantization: Any, change: Change) -> dict[str, torch.Tensor]:
    """A llama folder whose tensors were changed; returns what is stored."""
    save_tiny_model(folder, "llama", max_shard_size="1GB")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def to_float8(
    tensors: dict[str, torch.Tensor],
    shape_of: Callable[[int, int], tuple[int, ...]],
    suffix: str = "_scale",
    dtype: torch.dtype = torch.float32,
) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, values in list(tensors.items()):
        if values.ndim == 2 and ".layers." in name:
            tensors[name] = (16 * values).to(torch.float8_e4m3fn)
            scale = 0.01 + torch.rand(shape_of(*values.shape), generator=generator)
            tensors[name + suffix] = scale.to(dtype)


def values_of(folder: Path, name: str) -> np.ndarray:
    ref = open_artifact(folder).tensors[name]
    return dequantize(ref.raw(), ref.dtype)


BLOCK = 48  # Divides neither 64 nor 128: the last block of a row and of a column is a part of one.
SCALES = {
    "one for a tensor": ({"quant_method": "fbgemm_fp8"}, lambda r, c: (1,), "_scale", torch.float32),
    "a scalar": ({"quant_method": "compressed-tensors"}, lambda r, c: (), "_scale", torch.bfloat16),
    "one for a row": ({"quant_method": "compressed-tensors"}, lambda r, c: (r, 1), "_scale", torch.float32),
    "a list of rows": ({"quant_method": "fbgemm_fp8"}, lambda r, c: (r,), "_scale", torch.float32),
    "one for a block": (
        {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
        lambda r, c: (-(-r // BLOCK), -(-c // BLOCK)),
        "_scale_inv",
        torch.float32,
    ),
    "groups": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"block_structure": [16, 32]}}},
        },
        lambda r, c: (-(-r // 16), -(-c // 32)),
        "_scale",
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_values_are_codes_times_scales(tmp_path: Path, case: str) -> None:
    quantization, shape_of, suffix, dtype = SCALES[case]
    stored = write(tmp_path, quantization, lambda tensors: to_float8(tensors, shape_of, suffix, dtype))
    artifact = open_artifact(tmp_path)
    check_complete(artifact)
    assert artifact.unmapped == ()
    for name, ref in artifact.tensors.items():
        weight = stored[name].to(torch.float32)
        if name + suffix in stored:
            assert isinstance(ref, ScaledTensor)
            assert (ref.dtype, ref.stored_dtype) == ("F32", "F8_E4M3")
            scale = stored[name + suffix].to(torch.float32)
            if scale.ndim == 2 and scale.shape[1] > 1:
                rows, columns = quantization.get("weight_block_size") or (16, 32)
                scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]]
                scale = scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]
            elif scale.ndim:
                scale = scale.reshape(-1, 1)
            weight = weight * scale
        found = dequantize(ref.raw(), ref.dtype)
        assert np.array_equal(found.reshape(weight.shape), weight.numpy())


def test_matmul_reads_the_scales(tmp_path: Path) -> None:
    quantization, shape_of, suffix, dtype = SCALES["one for a block"]
    write(tmp_path, quantization, lambda tensors: to_float8(tensors, shape_of, suffix, dtype))
    expected = values_of(tmp_path, Q_PROJ)
    x = np.random.Generator(np.random.Philox(0)).standard_normal((3, 64), dtype=np.float32)
    found = Weights(open_artifact(tmp_path)).matmul(x, Q_PROJ, (64, 64), Choice("f32"))
    np.testing.assert_allclose(
        found, x.astype(np.float64) @ expected.T.astype(np.float64), rtol=1e-4, atol=1e-4
    )


def test_floats_of_eight_bits_without_a_quantization_are_plain(tmp_path: Path) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.float8_e5m2)

    stored = write(tmp_path, None, cast)
    ref = open_artifact(tmp_path).tensors[Q_PROJ]
    assert ref.dtype == ref.stored_dtype == "F8_E5M2"
    assert np.array_equal(values_of(tmp_path, Q_PROJ), stored[Q_PROJ].to(torch.float32).numpy())


def drop_a_scale(tensors: dict[str, torch.Tensor]) -> None:
    to_float8(tensors, lambda r, c: (1,))
    del tensors[Q_PROJ + "_scale"]


def two_scales(tensors: dict[str, torch.Tensor]) -> None:
    to_float8(tensors, lambda r, c: (1,))
    tensors[Q_PROJ + "_scale_inv"] = torch.ones(1)


def second_level(tensors: dict[str, torch.Tensor]) -> None:
    to_float8(tensors, lambda r, c: (1,))
    tensors[Q_PROJ + "_scale_2"] = torch.ones(1)


def zero_point(tensors: dict[str, torch.Tensor]) -> None:
    to_float8(tensors, lambda r, c: (1,))
    tensors[Q_PROJ + "_zero_point"] = torch.ones(1)


def wide_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ + "_scale"] = torch.ones(1)


def integer_scale(tensors: dict[str, torch.Tensor]) -> None:
    to_float8(tensors, lambda r, c: (1,))
    tensors[Q_PROJ + "_scale"] = torch.ones(1, dtype=torch.int32)


def no_scale_in_it(tensors: dict[str, torch.Tensor]) -> None:
    to_float8(tensors, lambda r, c: (1,))
    tensors[Q_PROJ + "_scale"] = torch.ones(0)


def other_grid(tensors: dict[str, torch.Tensor]) -> None:
    to_float8(tensors, lambda r, c: (2, 3))


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.int8)
    tensors[Q_PROJ + "_scale"] = torch.ones(64, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_scale, "q_proj.weight is stored as F8_E4M3 without a scale"),
        (
            two_scales,
            r"q_proj.weight has both .*q_proj.weight_scale",
        ),
        (second_level, "q_proj.weight_scale_2 beside it, which is not supported"),
        (zero_point, "q_proj.weight_zero_point beside it, which is not supported"),
        (wide_weight, "q_proj.weight_scale is the scale of a weight stored as F32 64x64"),
        (integer_scale, "q_proj.weight_scale is stored as I32"),
        (no_scale_in_it, "q_proj.weight_scale is stored as F32"),
        (other_grid, "_proj.weight_scale has the shape 2x3 for a weight of"),
        (integers, "q_proj.weight is stored as I8; expected one of"),
    ],
)
def test_a_scale_is_never_left_out(tmp_path: Path, damage: Change, message: str) -> None:
    write(tmp_path, {"quant_method": "fp8"}, damage)
    with pytest.raises(InputError, match=message):
        open_artifact(tmp_path)


@pytest.mark.parametrize("quantization", [{"quant_method": "awq"}, {}, [], "fp8", {"quant_method": ["fp8"]}])
def test_other_quantizations_are_refused(tmp_path: Path, quantization: Any) -> None:
    write(tmp_path, quantization, lambda tensors: None)
    with pytest.raises(InputError, match=r"config\.json: quantization_config has the quant_method"):
        open_artifact(tmp_path)


def test_a_scale_beyond_all_codes_gives_infinities_and_no_warning(tmp_path: Path) -> None:
    def huge(tensors: dict[str, torch.Tensor]) -> None:
        to_float8(tensors, lambda r, c: (1,))
        tensors[Q_PROJ + "_scale"] = torch.tensor([3e38])

    stored = write(tmp_path, {"quant_method": "fp8"}, huge)
    expected = stored[Q_PROJ].to(torch.float32) * 3e38
    assert np.array_equal(values_of(tmp_path, Q_PROJ), expected.numpy())
