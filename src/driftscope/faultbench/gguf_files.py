"""Faults put into a GGUF file on disk: its tensors' bytes and its metadata."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError
from driftscope.faultbench.injection import Spot
from driftscope.faultbench.weights import interleaved, tensor
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.kernels.dequantize import dequantize

U8 = NDArray[np.uint8]


class Disk:
    """A GGUF file that is being edited in place.

    Attributes:
        path: the file.
        artifact: how it was before.
    """

    def __init__(self, path: Path) -> None:
        """Open a file; it is the caller's own copy."""
        self.path = path
        self.artifact: Artifact = open_artifact(path)

    def rows(self, name: str) -> U8:
        """A copy of a tensor's stored bytes, ``uint8[n_rows, bytes_per_row]``."""
        return np.array(self.artifact.tensors[name].raw())

    def put(self, name: str, rows: U8) -> None:
        """Overwrite a tensor's stored bytes.

        Raises:
            InputError: not as many bytes as the tensor has.
        """
        ref = self.artifact.tensors[name]
        if rows.nbytes != ref.nbytes:
            raise InputError(f"{self.path}: {name} has {ref.nbytes} bytes, not {rows.nbytes}")
        with self.path.open("r+b") as stream:
            stream.seek(ref.offset)
            stream.write(np.ascontiguousarray(rows).tobytes())

    def set_float(self, suffix: str, change: Callable[[float], float]) -> None:
        """Change a float32 of the metadata, found by the end of its key.

        Raises:
            InputError: no such key.
        """
        import gguf

        reader = gguf.GGUFReader(self.path, "r+")
        for key, field in reader.fields.items():
            if key.endswith(suffix):
                value = field.parts[field.data[0]]
                value[0] = change(float(value[0]))
                reader.data.flush()
                return
        raise InputError(f"{self.path}: no metadata key ends in {suffix}")


@dataclass(frozen=True)
class GgufFault:
    """One edit of a file.

    Attributes:
        fault: id in the catalogue.
        name: short and unique.
        says: the edit in words.
        model: the tiny model that is edited.
        scheme: its format.
        first: where it should be found, given the layer of faults that sit in one.
        classes: classes that are right.
        edit: changes a file, in a layer.
    """

    fault: str
    name: str
    says: str
    model: str
    scheme: str
    first: Callable[[int], Spot]
    classes: tuple[str, ...]
    edit: Callable[[Disk, int], None]


def edited(source: Path, target: Path, fault: GgufFault, layer: int) -> Path:
    """Copy a file and put a fault into the copy."""
    shutil.copyfile(source, target)
    fault.edit(Disk(target), layer)
    return target


def _rows_put_back(disk: Disk, layer: int) -> None:
    """Q and k in Hugging Face's order, in a file whose reader takes GGUF's for granted."""
    config = disk.artifact.config
    for which, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        name = tensor(layer, which)
        rows = disk.rows(name)
        back = np.empty_like(rows)
        back[interleaved(rows.shape[0], heads)] = rows
        disk.put(name, back)


def _exchange(a: str, b: str) -> Callable[[Disk, int], None]:
    def edit(disk: Disk, layer: int) -> None:
        left, right = a.format(layer, layer + 1), b.format(layer, layer + 1)
        rows = disk.rows(left), disk.rows(right)
        disk.put(left, rows[1])
        disk.put(right, rows[0])

    return edit


def _transpose_o(disk: Disk, layer: int) -> None:
    name = tensor(layer, "o")
    ref = disk.artifact.tensors[name]
    values = dequantize(disk.rows(name), ref.dtype).reshape(ref.shape)
    disk.put(name, quantize(np.ascontiguousarray(values.T), ref.dtype))


def _norm_plus_one(disk: Disk, layer: int) -> None:
    name = f"model.layers.{layer}.post_attention_layernorm.weight"
    values = disk.rows(name).reshape(-1).view(np.float32)
    disk.put(name, (values + np.float32(1)).view(np.uint8))


def _biases_zero(disk: Disk, layer: int) -> None:
    for name in disk.artifact.tensors:
        if name.endswith(".bias"):
            disk.put(name, np.zeros_like(disk.rows(name)))


def _bit(bit: int) -> Callable[[Disk, int], None]:
    def edit(disk: Disk, layer: int) -> None:
        name = tensor(layer, "up")
        rows = disk.rows(name)
        rows[rows.shape[0] // 3, bit // 8] ^= 1 << (bit % 8)
        disk.put(name, rows)

    return edit


def _scale_lost(disk: Disk, layer: int) -> None:
    name = tensor(layer, "down")
    values = disk.rows(name).view(np.float32)
    disk.put(name, (values * np.float32(128)).view(np.uint8))


def _head_is_embedding(disk: Disk, layer: int) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    refs = disk.artifact.tensors
    values = dequantize(disk.rows(embedding), refs[embedding].dtype)
    disk.put(head, quantize(values, refs[head].dtype))


def _eps(disk: Disk, layer: int) -> None:
    disk.set_float("attention.layer_norm_rms_epsilon", lambda value: 10.0 * value)


def _theta(disk: Disk, layer: int) -> None:
    disk.set_float("rope.freq_base", lambda value: 10.0 * value)


def _at(tap: str, part: str = "") -> Callable[[int], Spot]:
    return lambda layer: Spot(layer, tap, part)


def _start(tap: str, part: str = "") -> Callable[[int], Spot]:
    return lambda layer: Spot(0, tap, part)


_MLP = "model.layers.{0}.mlp"
_NEXT_MLP = "model.layers.{1}.mlp"

FAULTS = (
    GgufFault(
        "F01",
        "rows-of-q-and-k",
        "rows of q and k in Hugging Face's order",
        "llama",
        "Q8_0",
        _at("qkv_matmul", "q"),
        ("row-permutation",),
        _rows_put_back,
    ),
    GgufFault(
        "F04",
        "norm-plus-one",
        "one added to the weight of the norm before the MLP",
        "qwen2-square",
        "Q8_0",
        _at("ffn_norm"),
        ("norm-offset",),
        _norm_plus_one,
    ),
    GgufFault(
        "F05",
        "biases-zero",
        "biases of q, k and v set to zero",
        "qwen2-square",
        "Q8_0",
        _start("qkv_bias", "q"),
        ("bias-dropped",),
        _biases_zero,
    ),
    GgufFault(
        "F06",
        "embedding-as-head",
        "output.weight replaced by token_embd.weight",
        "qwen2-square",
        "Q8_0",
        lambda layer: Spot(WHOLE_MODEL, "lm_head"),
        ("head-tie",),
        _head_is_embedding,
    ),
    GgufFault(
        "F08",
        "gate-and-up",
        "ffn_gate and ffn_up exchanged",
        "qwen2-square",
        "Q4_K_M",
        _at("ffn_gate"),
        ("gate-up-swapped",),
        _exchange(f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight"),
    ),
    GgufFault(
        "F09",
        "o-transposed",
        "attn_output transposed",
        "qwen2-square",
        "F32",
        _at("attn_out"),
        ("transposed",),
        _transpose_o,
    ),
    GgufFault(
        "F11",
        "eps-times-ten",
        "layer_norm_rms_epsilon ten times too large",
        "qwen2-square",
        "Q8_0",
        _start("attn_norm"),
        ("norm-eps",),
        _eps,
    ),
    GgufFault(
        "F12",
        "tensor-scale",
        "the scale of ffn_down (1/128) dropped",
        "qwen2-square",
        "F32",
        _at("ffn_out"),
        ("scale-dropped", "output-scale"),
        _scale_lost,
    ),
    GgufFault(
        "F16",
        "theta-times-ten",
        "rope.freq_base ten times too large",
        "qwen2-square",
        "Q4_K_M",
        _start("q_post_rope"),
        ("rope-theta",),
        _theta,
    ),
    GgufFault(
        "F33",
        "down-of-two-layers",
        "ffn_down of two layers exchanged",
        "qwen2-square",
        "Q8_0",
        _at("ffn_out"),
        ("other-layer",),
        _exchange(f"{_MLP}.down_proj.weight", f"{_NEXT_MLP}.down_proj.weight"),
    ),
    GgufFault(
        "F35",
        "scale-bit",
        "an exponent bit of one block's scale of ffn_up flipped",
        "qwen2-square",
        "Q4_K_M",
        _at("ffn_up"),
        ("corrupt-block",),
        _bit(12),
    ),
    GgufFault(
        "F35",
        "quant-bit",
        "the high bit of one quant of ffn_up flipped",
        "qwen2-square",
        "Q8_0",
        _at("ffn_up"),
        ("corrupt-block",),
        _bit(16 + 6),
    ),
)
"""What is edited on disk."""
