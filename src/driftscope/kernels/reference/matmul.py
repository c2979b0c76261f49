"""Matrix products in plain NumPy: one column after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def matmul_f32(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float32]:
    """``f32[n, r]``: products and sums rounded to f32, k = 0 first."""
    out = np.zeros((x.shape[0], w.shape[0]), np.float32)
    with np.errstate(all="ignore"):
        for k in range(x.shape[1]):
            out = out + x[:, k, None] * w[None, :, k]
    return out
