"""Weights of eight bits with scales beside them: ``value = stored * scale``.

What writes them: Hugging Face's ``fp8`` (DeepSeek-V3, Qwen3-FP8: ``weight_scale_inv``, one for a block of
rows and columns, and in spite of its name a factor), ``compressed-tensors`` in its float formats and
``fbgemm_fp8`` (``weight_scale``, one for a tensor, a row or a block). A scale is never left out: a weight
whose scale is missing, has another shape or is of a kind that is not known here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.safetensors import FLOAT_DTYPES, StoredTensor
from driftscope.artifacts.tensor import TensorRef, described
from driftscope.errors import InputError

_SCALES = ("_scale_inv", "_scale")

# What is stored beside a weight and changes no value of it.
_HARMLESS = ("_shape",)

_EIGHT_BITS = tuple(dtype for dtype in FLOAT_DTYPES if dtype.startswith("F8_"))
_WIDE = tuple(dtype for dtype in FLOAT_DTYPES if not dtype.startswith("F8_"))
_METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8")


@dataclass(frozen=True)
class ScaledTensor(TensorRef):
    """A tensor that is decoded and multiplied with its scales, in f32, when it is read.

    Attributes:
        stored: the bytes' format; `dtype` is that of what `raw` gives, F32.
        scale: name, dtype and place of the scales.
        block: rows and columns that share a scale.
    """

    stored: str = field(default="F32", kw_only=True)
    scale: StoredTensor = field(kw_only=True)
    block: tuple[int, int] = field(kw_only=True)

    @property
    def stored_dtype(self) -> str:
        """What the file holds."""
        return self.stored

    def raw(self) -> NDArray[np.uint8]:
        """The values' bytes as ``uint8[n_rows, 4 * columns]``, in stored row order.

        Raises:
            InputError: a file is gone or has become shorter since it was opened.
        """
        from driftscope.kernels.dequantize import dequantize

        values = np.array(dequantize(np.ascontiguousarray(super().raw()), self.stored))
        rows, columns = values.shape
        scales = self._scales()
        first = self.stored_rows[0] if self.stored_rows else 0
        by_column = np.arange(columns) // self.block[1]
        with np.errstate(all="ignore"):
            for block in range(first // self.block[0], -(-(first + rows) // self.block[0])):
                start = max(block * self.block[0] - first, 0)
                end = min((block + 1) * self.block[0] - first, rows)
                values[start:end] *= scales[block, by_column]
        return values.view(np.uint8)

    def _scales(self) -> NDArray[np.float32]:
        """All scales as ``float32[blocks of rows, blocks of columns]``."""
        from driftscope.kernels.dequantize import dequantize

        scale = self.scale
        shape = _grid(scale.shape)
        ref = TensorRef(scale.name, scale.name, shape, scale.dtype, scale.file, scale.offset, scale.nbytes)
        return dequantize(np.ascontiguousarray(ref.raw()), scale.dtype)


def check_quantization(quantization: Any, where: str) -> None:
    """Check the ``quantization_config`` of a ``config.json``: only floats of eight bits are read.

    Whether every weight has the scales that it needs is another question: `scales_beside`.

    Raises:
        InputError: another method, or one that does not say what it is.
    """
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method not in _METHODS:
        raise InputError(
            f"{where}: quantization_config has the quant_method {str(method)[:80]!r}; expected one of "
            f"{', '.join(_METHODS)}"
        )


def scales_beside(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Name of a weight to its scale, for every weight that has one.

    Raises:
        InputError: a weight has two, or something else beside it that would change its values.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        weight, mark, rest = name.rpartition(".weight_")
        weight += ".weight"
        if not mark or weight not in stored or f"_{rest}" in _HARMLESS:
            continue
        if f"_{rest}" not in _SCALES:
            raise InputError(
                f"{tensor.file}: {weight[:120]} has {name[:120]} beside it, which is not supported"
            )
        if weight in found:
            raise InputError(
                f"{tensor.file}: {weight[:120]} has both {found[weight].name[:120]} and {name[:120]}"
            )
        found[weight] = tensor
    return found


def with_scale(ref: TensorRef, scale: StoredTensor | None, config: Mapping[str, Any]) -> TensorRef:
    """A weight that is read with its scale, or as it is.

    Args:
        ref: the weight as it is stored.
        scale: what `scales_beside` found for it.
        config: the parsed ``config.json``.

    Raises:
        InputError: a scale that is missing, unusable, or beside a weight that needs none.
    """
    quantization = config.get("quantization_config")
    if scale is None:
        if quantization is not None and ref.dtype in _EIGHT_BITS:
            raise InputError(
                f"{ref.file}: {ref.stored_name} is stored as {ref.dtype} without a scale; expected "
                f"{ref.stored_name}{_SCALES[1]} or {ref.stored_name}{_SCALES[0]} beside it"
            )
        return ref
    label = f"{scale.file}: {scale.name}"
    if ref.dtype not in _EIGHT_BITS or len(ref.shape) != 2:
        raise InputError(
            f"{label} is the scale of a weight stored as {ref.dtype} {_times(ref.shape)}; expected a matrix "
            f"of {', '.join(_EIGHT_BITS)}"
        )
    if scale.dtype not in (*_WIDE, "F8_E8M0") or not scale.nbytes:
        raise InputError(f"{label} is stored as {scale.dtype} {_times(scale.shape)}; expected floats")
    block = _block(ref.shape, scale, quantization)
    fields = {**described(ref), "dtype": "F32"}
    return ScaledTensor(**fields, stored=ref.dtype, scale=scale, block=block)


def _block(shape: tuple[int, ...], scale: StoredTensor, quantization: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = shape
    grid = _grid(scale.shape)
    if grid == (1, 1):
        return rows, columns
    if grid == (rows, 1):
        return 1, columns
    stated = _stated_block(quantization)
    if stated is not None and grid == (-(-rows // stated[0]), -(-columns // stated[1])):
        return stated
    blocks = f"blocks of {_times(stated)}" if stated else "no weight_block_size in quantization_config"
    raise InputError(
        f"{scale.file}: {scale.name} has the shape {_times(scale.shape)} for a weight of {_times(shape)}, "
        f"with {blocks}; expected a scale for the tensor, for each row or for each block"
    )


def _grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales as that of a matrix: of one column where they are a list."""
    return (*shape, *(1,) * (2 - len(shape)))


def _stated_block(quantization: Any) -> tuple[int, int] | None:
    """The size of a block as a ``quantization_config`` states it."""
    if not isinstance(quantization, Mapping):
        return None
    candidates = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            candidates.append(weights.get("block_structure"))
    for size in candidates:
        if (
            isinstance(size, list)
            and len(size) == 2
            and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in size)
        ):
            return size[0], size[1]
    return None


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))[:120] or "one value"
