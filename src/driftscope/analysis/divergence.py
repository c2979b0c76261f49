"""Two traces of the same tokens, compared as they are: the propagated error at every tap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenSums:
    """Sums over the channels of one tap at each token, in f64, of the pairs where both sides are finite.

    All arrays are ``[n_tokens]``.
    """

    count: NDArray[np.int64]
    a: NDArray[np.float64]
    b: NDArray[np.float64]
    aa: NDArray[np.float64]
    bb: NDArray[np.float64]
    ab: NDArray[np.float64]
    dd: NDArray[np.float64]
    max_abs_diff: NDArray[np.float64]
    channels: int


def token_sums(a: NDArray[np.float32], b: NDArray[np.float32]) -> TokenSums:
    """Sum a tap of two traces over its channels.

    Args:
        a: ``float32[n_tokens, channels]`` of the reference trace.
        b: the same tap of the other trace.
    """
    both = np.isfinite(a) & np.isfinite(b)
    x = np.where(both, a, np.float32(0)).astype(np.float64)
    y = np.where(both, b, np.float32(0)).astype(np.float64)
    d = y - x
    return TokenSums(
        count=both.sum(axis=1),
        a=x.sum(axis=1),
        b=y.sum(axis=1),
        aa=np.square(x).sum(axis=1),
        bb=np.square(y).sum(axis=1),
        ab=(x * y).sum(axis=1),
        dd=np.square(d).sum(axis=1),
        max_abs_diff=np.abs(d).max(axis=1),
        channels=a.shape[1],
    )


def scopes_of(length: int) -> Iterator[tuple[str, int, slice]]:
    """Yield every scope of a prompt of `length` tokens as (scope, position or -1, slice)."""
    yield "all", -1, slice(0, length)
    yield "last", -1, slice(length - 1, length)
    if length > 1:
        yield "all-but-first", -1, slice(1, length)
    for position in range(length):
        yield "token", position, slice(position, position + 1)


def pooled(sums: TokenSums, rows: slice) -> dict[str, Any]:
    """Pool the sums of some tokens into the error figures of the ``divergence`` table.

    NMSE is ``sum (b - a)^2 / sum a^2``; `std_ratio` is std(b) / std(a) over the same values (n - 1).
    A figure that is undefined (nothing finite, a zero denominator) is None.
    """
    n = int(sums.count[rows].sum())
    tokens = rows.stop - rows.start
    aa, bb, ab, dd = (float(v[rows].sum()) for v in (sums.aa, sums.bb, sums.ab, sums.dd))
    nmse = dd / aa if aa > 0 else (0.0 if dd == 0 and n else None)
    variance_a = _variance(float(sums.a[rows].sum()), aa, n)
    variance_b = _variance(float(sums.b[rows].sum()), bb, n)
    return {
        "token_count": tokens,
        "count": tokens * sums.channels,
        "compared_count": n,
        "nmse": nmse,
        "relative_l2": None if nmse is None else float(np.sqrt(nmse)),
        "cosine_similarity": ab / float(np.sqrt(aa) * np.sqrt(bb)) if aa > 0 and bb > 0 else None,
        "max_abs_diff": float(sums.max_abs_diff[rows].max()) if n else None,
        "std_ratio": float(np.sqrt(variance_b / variance_a)) if variance_a and variance_b else None,
    }


def compare_tap(
    a: NDArray[np.float32], b: NDArray[np.float32], prompts: Sequence[tuple[str, slice]]
) -> list[dict[str, Any]]:
    """Compare one tap of two traces in every scope of every prompt.

    Args:
        a: ``float32[n_tokens, channels]`` of the reference trace; all prompts one after another.
        b: the same of the other trace.
        prompts: prompt id and the rows of its tokens.
    """
    rows = []
    for prompt, tokens in prompts:
        sums = token_sums(a[tokens], b[tokens])
        for scope, position, part in scopes_of(tokens.stop - tokens.start):
            rows.append({"prompt": prompt, "scope": scope, "position": position, **pooled(sums, part)})
    return rows


def _variance(total: float, squares: float, n: int) -> float | None:
    if n < 2:
        return None
    return max(squares - total * total / n, 0.0) / (n - 1)
