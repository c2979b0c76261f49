"""Values that are not finite: an overflow of float16, or a value that broke a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.explanations.base import Case, Explanation, figure, rounded
from driftscope.analysis.explanations.linear import Linear
from driftscope.forward.architecture import score_scale

LARGEST_F16 = 65504.0
_LOOKED_AT = 64


def not_finite(case: Case) -> Explanation | None:
    """Explain values that are not finite where they should be; None where there are none."""
    bad: list[NDArray[np.bool_]] = [
        np.isfinite(wanted) & ~np.isfinite(found)
        for found, wanted in zip(case.targets, case.expected_values, strict=True)
    ]
    if case.op.tap == "attn_scores":
        # Some engines give masked scores; minus infinity in the future is no fault.
        bad = [part & np.tile(np.tri(len(part), dtype=bool), part.shape[1] // len(part)) for part in bad]
    count = sum(int(np.count_nonzero(part)) for part in bad)
    if not count:
        return None
    index = next(i for i, part in enumerate(bad) if part.any())
    token, channel = (int(i) for i in np.argwhere(bad[index])[0])
    row = case.tokens[token] if not case.ragged else case.batch.starts[case.sequences[index]] + token
    position = int(case.batch.positions[row])
    columns = np.flatnonzero(bad[index].any(axis=0))
    evidence: dict[str, Any] = {
        "count": count,
        "first_position": position,
        "first_channel": channel,
        "channels": int(columns.size),
        "positions": int(bad[index].any(axis=1).sum()),
    }
    before = case.nmse(case.before)
    largest = _largest(case, bad)
    evidence["largest_magnitude"] = rounded(largest)
    if largest > LARGEST_F16:
        return Explanation(
            "f16-overflow",
            f"{case.place}: {count} values are not finite, first at position {position}, channel {channel}; "
            f"magnitudes on the way there reach {figure(largest)}, beyond the {LARGEST_F16:.0f} of float16.",
            rounded(before),
            rounded(before),
            evidence,
        )
    where = f"row {channel} of the weights" if columns.size == 1 and not case.ragged else f"channel {channel}"
    return Explanation(
        "non-finite",
        f"{case.place}: {count} values are not finite, first at position {position}, {where}; nothing on the "
        f"way there exceeds {figure(largest)}.",
        rounded(before),
        rounded(before),
        evidence,
    )


def _largest(case: Case, bad: list[NDArray[np.bool_]]) -> float:
    """The largest magnitude that an op meets on its way to the values that are not finite."""
    wanted = [
        np.abs(np.where(part, value, 0.0)).max(initial=0.0)
        for part, value in zip(bad, case.expected_values, strict=True)
    ]
    largest = float(max(wanted))
    linear = None if case.ragged else Linear.of(case)
    if case.op.tap == "attn_scores":
        # Before the scale.
        return largest / score_scale(case.config)
    if case.op.tap.endswith("_norm"):
        name = next(iter(case.op.inputs), "")
        if name:
            x = np.where(np.asarray(bad[0].any(axis=1))[:, None], case.value(name).astype(np.float64), 0.0)
            largest = max(largest, float(np.max(np.sum(x * x, axis=1))))
        return largest
    if linear is None:
        return largest
    tokens = np.flatnonzero(bad[0].any(axis=1))[:_LOOKED_AT]
    columns = np.flatnonzero(bad[0].any(axis=0))[:_LOOKED_AT]
    x = linear.x_used[tokens].astype(np.float64)
    largest = max(largest, float(np.abs(x).max(initial=0.0)))
    weight = case.weight(linear.name, columns).astype(np.float64)
    for row in weight:
        partial = np.cumsum(x * row, axis=1)
        largest = max(largest, float(np.abs(np.where(np.isfinite(partial), partial, 0.0)).max(initial=0.0)))
    # The sums over blocks of 32 that go with activations of 8 bits.
    width = x.shape[1] - x.shape[1] % 32
    if width:
        sums = np.abs(x[:, :width].reshape(x.shape[0], -1, 32).sum(axis=2))
        largest = max(largest, float(sums.max(initial=0.0)))
    return largest
