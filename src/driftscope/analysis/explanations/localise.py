"""Where an op's error lies: which positions, heads, channels and blocks hold how much of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from driftscope.analysis.explanations.base import F64, Context, Replayed, rounded

_TOP = 5
_BLOCKS = (32, 256)
_MOST = 0.5
_HEADED = ("qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", "attention", "attn_scores", "attn_softmax")


def localise(op: Replayed, context: Context | None = None) -> dict[str, Any]:
    """Say which share of an op's error energy lies where.

    Args:
        op: the op.
        context: gives the component, the sequences and the number of heads; without it the component
            is ``engine``, positions are rows, and there are no heads.

    Returns:
        ``energy``; for each of ``position``, ``head``, ``channel``, ``block32``, ``block256`` that the op has
        the count of places and the top few as ``{"index", "share"}``; and ``sentence``.
        A value that is not finite where one is expected is counted in ``non_finite`` and left out.
    """
    engine = context is None or context.component == "engine"
    found, wanted = (op.recorded, op.declared) if engine else (op.exact, op.reference)
    if isinstance(found, list | tuple):
        energies, non_finite = _ragged(found, wanted)
    else:
        energies, non_finite = _dense(np.asarray(found, np.float64), np.asarray(wanted, np.float64))
    rows = energies.pop("row")
    positions = None
    if context is not None:
        positions = context.trace.batch.positions
        energies["position"] = np.bincount(positions, weights=rows).astype(np.float64)
    else:
        energies["position"] = rows
    heads = _heads(op, context)
    if heads and "channel" in energies and energies["channel"].size % heads == 0:
        energies["head"] = energies["channel"].reshape(heads, -1).sum(axis=1)
    total = float(rows.sum())
    answer: dict[str, Any] = {"energy": rounded(total), "non_finite": non_finite}
    for name in ("position", "head", "channel", "block32", "block256"):
        values = energies.get(name)
        if values is not None and values.size > 1:
            order = np.argsort(-values, kind="stable")[:_TOP]
            answer[name] = {
                "count": int(values.size),
                "top": [
                    {"index": int(i), "share": rounded(float(values[i]) / total) if total else 0.0}
                    for i in order
                ],
            }
    answer["sentence"] = _sentence(answer, total, non_finite)
    return answer


def _dense(found: F64, wanted: F64) -> tuple[dict[str, F64], int]:
    with np.errstate(invalid="ignore", over="ignore"):
        difference = found - wanted
    squares = np.where(np.isfinite(difference), difference * difference, 0.0)
    channel = squares.sum(axis=0)
    energies = {"row": squares.sum(axis=1), "channel": channel}
    for size in _BLOCKS:
        if channel.size > size:
            padded = np.zeros(-(-channel.size // size) * size)
            padded[: channel.size] = channel
            energies[f"block{size}"] = padded.reshape(-1, size).sum(axis=1)
    return energies, int(np.count_nonzero(np.isfinite(wanted) & ~np.isfinite(found)))


def _ragged(found: Any, wanted: Any) -> tuple[dict[str, F64], int]:
    rows, heads, non_finite = [], None, 0
    for a, b in zip(found, wanted, strict=True):
        parts, count = _dense(np.asarray(a, np.float64), np.asarray(b, np.float64))
        length = np.shape(a)[0]
        rows.append(parts["row"])
        by_head = parts["channel"].reshape(-1, length).sum(axis=1)
        heads = by_head if heads is None else heads + by_head
        non_finite += count
    assert heads is not None
    return {"row": np.concatenate(rows), "head": heads}, non_finite


def _heads(op: Replayed, context: Context | None) -> int:
    if context is None or op.tap not in _HEADED:
        return 0
    config = context.config
    if op.tap == "k_post_rope" or op.part in ("k", "v"):
        return config.num_kv_heads
    return 0 if op.tap.startswith("qkv") and op.part != "q" else config.num_heads


_NAMES = {
    "channel": "channel {}",
    "position": "position {}",
    "head": "head {}",
    "block32": "the block of 32 channels from {}",
    "block256": "the block of 256 channels from {}",
}


def _sentence(answer: dict[str, Any], total: float, non_finite: int) -> str:
    lost = f"{non_finite} values are not finite. " if non_finite else ""
    if not total:
        return lost or "There is no error."
    for name, text in _NAMES.items():
        if name not in answer:
            continue
        first = answer[name]["top"][0]
        # A share says something only where an even spread would give much less.
        if first["share"] >= _MOST and first["share"] >= 4.0 / answer[name]["count"]:
            step = int(name.removeprefix("block")) if name.startswith("block") else 1
            where = text.format(first["index"] * step)
            return f"{lost}{100 * first['share']:.0f} % of the error lies in {where}."
    return f"{lost}The error is spread over positions and channels."
