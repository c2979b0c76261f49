"""What a format usually leaves of a matrix, where its stored steps are not at hand to predict it from.

The codebook formats of ggml are read through the gguf package, which gives values and no steps. Their NMSE
hardly depends on the values: quantized by ggml (libgguf), normal, uniform, Laplace and Student's t values (5
degrees of freedom), with flat and with log-normal importance, left 0.65 to 1.35 times what stands here.

A float of m significand bits rounds a value to a part of 2^-m of its power of two: 2^-2m / 12 of that power's
square. Over a binade that is 0.54 of it in units of the value's own square, if logarithms are spread evenly.
It holds whatever factor the values were multiplied by before.
"""

from __future__ import annotations

import math

from driftscope.artifacts.apr.dtypes import AprTensor
from driftscope.artifacts.tensor import TensorRef

_CODEBOOKS = {
    "IQ1_S": 0.25,
    "IQ1_M": 0.215,
    "IQ2_XXS": 0.13,
    "IQ2_XS": 0.10,
    "IQ2_S": 0.073,
    "IQ3_XXS": 0.037,
    "IQ3_S": 0.021,
    "NVFP4": 0.0115,
}
_SIGNIFICAND_BITS = {"F8_E4M3": 3, "F8_E4M3FNUZ": 3, "F8_E5M2": 2, "F8_E5M2FNUZ": 2}
_OVER_A_BINADE = 0.75 / (2 * math.log(2))


def usual_nmse(b: TensorRef) -> float | None:
    """The NMSE that the format of a tensor usually leaves, or None where nothing is known of it."""
    if isinstance(b, AprTensor):
        return b.usual_nmse()
    bits = _SIGNIFICAND_BITS.get(b.stored_dtype)
    if bits is not None:
        return math.ldexp(_OVER_A_BINADE / 12, -2 * bits)
    return _CODEBOOKS.get(b.stored_dtype)
