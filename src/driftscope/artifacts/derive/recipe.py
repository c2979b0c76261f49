"""Which format each tensor of a quantized model gets: llama.cpp's own choice.

The rules are those of ``src/llama-quant.cpp`` (``tensor_allows_quantization``,
``llama_tensor_get_type_impl``, ``tensor_type_fallback``) for dense models of the architectures that
driftscope writes, without an importance matrix and without overrides. The rules for mixtures of experts
have no place here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from driftscope.errors import InputError
from driftscope.kernels.formats import FORMATS


@dataclass(frozen=True)
class Scheme:
    """A named mixture of formats.

    Attributes:
        file_type: GGUF's ``general.file_type`` (llama.h, ``llama_ftype``).
        base: format of a matrix that no rule speaks of.
        more_bits: format of the value and down projections of the layers that get more bits, or None.
    """

    file_type: int
    base: str
    more_bits: str | None = None


SCHEMES: dict[str, Scheme] = {
    "F32": Scheme(0, "F32"),
    "F16": Scheme(1, "F16"),
    "BF16": Scheme(32, "BF16"),
    "Q4_0": Scheme(2, "Q4_0"),
    "Q4_1": Scheme(3, "Q4_1"),
    "Q5_0": Scheme(8, "Q5_0"),
    "Q5_1": Scheme(9, "Q5_1"),
    "Q8_0": Scheme(7, "Q8_0"),
    "Q4_K_M": Scheme(15, "Q4_K", more_bits="Q6_K"),
    "Q5_K_M": Scheme(17, "Q5_K", more_bits="Q6_K"),
    "Q6_K": Scheme(18, "Q6_K"),
}

_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.")


def scheme(name: str) -> Scheme:
    """Look a scheme up.

    Raises:
        InputError: the name is not in `SCHEMES`.
    """
    if name not in SCHEMES:
        raise InputError(f"candidate: scheme {name!r} is not supported; expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def tensor_formats(
    shapes: Mapping[str, tuple[int, ...]], name: str, *, architecture: str, n_heads: int, n_kv_heads: int
) -> dict[str, str]:
    """Format of each tensor.

    Args:
        shapes: GGUF name to logical shape (the last axis is the row), of the whole model.
        name: a key of `SCHEMES`.
        architecture: GGUF architecture.
        n_heads: attention heads.
        n_kv_heads: key/value heads.

    Returns:
        GGUF name to format name, in the order of `shapes`.

    Raises:
        InputError: an unknown scheme.
    """
    chosen = scheme(name)
    # ggml counts the axes up to the last that is longer than one.
    matrices = [n for n, shape in shapes.items() if sum(dim > 1 for dim in shape[:-1]) > 0]
    n_layers = 1 + max((int(m[1]) for n in shapes if (m := _LAYER.match(n))), default=-1)
    tied = "output.weight" not in shapes
    is_70b = n_layers == 80 and (
        architecture == "qwen2" or (architecture == "llama" and n_heads != n_kv_heads)
    )
    formats = {}
    for tensor, shape in shapes.items():
        if tensor not in matrices or not tensor.endswith("weight") or "_norm.weight" in tensor:
            formats[tensor] = "F32"
        elif not FORMATS[chosen.base].is_integer:
            formats[tensor] = chosen.base
        else:
            wanted = _wanted(tensor, shape[-1], chosen, n_layers, tied=tied, is_70b=is_70b)
            formats[tensor] = _fitting(wanted, shape[-1])
    return formats


def _wanted(tensor: str, columns: int, chosen: Scheme, n_layers: int, *, tied: bool, is_70b: bool) -> str:
    """The format by role, before rows that do not fit its blocks are looked at."""
    if tensor == "output.weight" or (tied and tensor == "token_embd.weight"):
        if columns % FORMATS[chosen.base].block_size or chosen.base == "Q8_0":
            return "Q8_0"
        return "Q6_K"
    match = _LAYER.match(tensor)
    layer = int(match[1]) if match else 0
    # A fused matrix counts as its most sensitive part.
    is_value = tensor.endswith(("attn_v.weight", "attn_qkv.weight"))
    wanted = chosen.base
    if chosen.more_bits and (is_value or "ffn_down" in tensor) and gets_more_bits(layer, n_layers):
        wanted = chosen.more_bits
    if is_value and is_70b and wanted == "Q4_K":
        wanted = "Q5_K"
    return wanted


def gets_more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: str, columns: int) -> str:
    """`wanted`, or what llama.cpp takes where a row is not a whole number of its blocks."""
    if columns % FORMATS[wanted].block_size:
        wanted = _FALLBACK.get(wanted, wanted)
    return "F16" if columns % FORMATS[wanted].block_size else wanted
