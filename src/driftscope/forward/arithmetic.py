"""The arithmetic that a trace was made in, as far as it is declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.forward.policy import Policy

F32 = NDArray[np.float32]

DTYPES = ("f32", "bf16", "f16")

_ROLE = "model"


@dataclass(frozen=True)
class Arithmetic:
    """How an engine computes.

    Attributes:
        policy: path and activation format of each site, and the type of keys and values.
        dtype: ``f32``; or ``bf16`` or ``f16``, to which weights and the output of every op are rounded, as
            torch does with a model of that dtype. Sums are in f32.
    """

    policy: Policy
    dtype: str = "f32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(
                f"arithmetic: dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}"
            )

    @classmethod
    def of(
        cls, path: str = "f32", *, activation: str | None = None, kv_type: str = "f32", dtype: str = "f32"
    ) -> Arithmetic:
        """The same path everywhere, with weights of the role ``model``."""
        document = {"path": path, "activation": activation, "kv_type": kv_type, "dtype": dtype}
        return cls.from_dict(document)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: those of the policy, and `dtype`."""
        return {**self.policy.to_dict(), "dtype": self.dtype}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Arithmetic:
        """The inverse of `to_dict`; ``artifact`` may be left out, and so may what has its default.

        Raises:
            InputError: a key is unknown or has a nonsensical value.
        """
        values = {"artifact": _ROLE, **document}
        dtype = values.pop("dtype", "f32")
        if not isinstance(dtype, str):
            raise InputError(f"arithmetic: dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
        return cls(Policy.from_dict(values), dtype)


def round_to(x: F32, dtype: str) -> F32:
    """Values of `x` rounded to nearest even of a dtype of `DTYPES`, as float32."""
    if dtype == "f32":
        return x
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)
