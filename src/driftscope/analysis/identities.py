"""Identities that must hold inside one trace, whatever the weights: sums, products, softmax.

They cost nothing and need no model, so they are a first look at a trace of unknown making. A broken one says
that two taps do not belong together; which of them, and whether the engine or its recorder is to blame, only
the consumers' test with the weights can tell (`driftscope.analysis.capture_points`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.forward.arithmetic import round_to
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.kernels import float64

if TYPE_CHECKING:
    from driftscope.analysis.first_divergence import Flag
    from driftscope.analysis.floors import Floors
    from driftscope.analysis.replay import Replayer
    from driftscope.engines.trace import Trace

F64 = NDArray[np.float64]

ROUNDINGS = 8.0
"""Unit roundoffs by which the two sides may differ, in the root mean square."""

_UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}


def identities(
    trace: Trace,
    replayer: Replayer | None = None,
    flagged: Sequence[Flag] = (),
    floors: Floors | None = None,
) -> list[dict[str, Any]]:
    """What a trace says about itself: with weights the capture points, without the broken identities.

    Args:
        trace: the trace.
        replayer: replays it with its weights; None to go without.
        flagged: the flags of the replay.
        floors: as in `driftscope.analysis.capture_points.capture_points`.

    Returns:
        Findings of `capture_points`, or the broken ones of `check_identities`.
    """
    if replayer is None:
        return [check for check in check_identities(trace) if not check["holds"]]
    from driftscope.analysis.capture_points import capture_points

    return capture_points(trace, replayer, flagged, floors).findings


def check_identities(trace: Trace, layers: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Check what must hold between the taps of each layer.

    Args:
        trace: the trace.
        layers: only these; None for all that the trace has.

    Returns:
        One dict a layer and identity whose taps are all there: ``layer``, ``identity``, ``tap`` (the left
        side), ``nmse`` (energy of the difference of both sides over that of the terms), ``tolerance`` (of the
        trace's dtype), ``holds``, and ``reading``: of a broken one, what the recorded values suggest.
    """
    numbers = sorted({layer for layer, _ in trace.places if layer != WHOLE_MODEL})
    wanted = numbers if layers is None else sorted(set(layers) & set(numbers))
    return [check for layer in wanted for check in _Layer(trace, layer).checks()]


class _Layer:
    """The taps of one layer."""

    def __init__(self, trace: Trace, layer: int) -> None:
        self.trace = trace
        self.layer = layer
        self.gemma = str(trace.manifest.model.get("architecture", "")).startswith("gemma")
        arithmetic = trace.manifest.arithmetic
        self.kv_type = "f32" if arithmetic is None else arithmetic.policy.kv_type
        self.dtype = self._guessed() if arithmetic is None else arithmetic.dtype

    def checks(self) -> Iterator[dict[str, Any]]:
        """Every identity whose taps are there."""
        attended, moved = ("post_attn_norm", "post_ffn_norm") if self.gemma else ("attn_out", "ffn_out")
        function = "gelu" if self.gemma else "silu"
        activation, gated = (_gelu, _geglu) if self.gemma else (_silu, _swiglu)
        for tap, sources, name, work in (
            ("post_attn_residual", ("layer_input", attended), f"layer_input + {attended}", np.add),
            ("post_ffn_residual", ("post_attn_residual", moved), f"post_attn_residual + {moved}", np.add),
            ("ffn_silu", ("ffn_gate",), f"{function}(ffn_gate)", activation),
            ("ffn_swiglu", ("ffn_silu", "ffn_up"), "ffn_silu * ffn_up", np.multiply),
            ("ffn_swiglu", ("ffn_gate", "ffn_up"), f"{function}(ffn_gate) * ffn_up", gated),
        ):
            # The product is checked in two steps where the first was recorded.
            skipped = work is gated and self._has("ffn_silu")
            if self._has(tap) and all(map(self._has, sources)) and not skipped:
                yield self._elementwise(tap, sources, name, work)
        yield from self._attention()

    def _elementwise(
        self, tap: str, sources: Sequence[str], name: str, work: Callable[..., F64]
    ) -> dict[str, Any]:
        left, terms = self._tap(tap), [self._tap(source) for source in sources]
        if any(term.shape != left.shape for term in terms):
            return self._check(tap, name, float("inf"), self.dtype, "the widths differ")
        with np.errstate(over="ignore", invalid="ignore"):
            right = work(*terms)
        # A sum may cancel: what its rounding leaves is that of its terms.
        scale = _energy(right) + (sum(map(_energy, terms)) if work is np.add else 0.0)
        nmse = _energy(left - right) / scale if scale > 0 else 0.0
        reading = ""
        for source, term in zip(sources, terms, strict=True):
            if _energy(left - term) <= self._tolerance(self.dtype) * _energy(term):
                reading = (
                    f"{tap} equals {source}: one was recorded at the other's place, or the op is missing"
                )
        # llama.cpp looks GELU up in a table of float16.
        table = work in (_gelu, _geglu) and self.trace.manifest.engine.get("name") == "llama.cpp"
        return self._check(tap, name, nmse, "f16" if table else self.dtype, reading)

    def _attention(self) -> Iterator[dict[str, Any]]:
        if not self._has("attn_softmax"):
            return
        softmax = [part.astype(np.float64) for part in self.trace.ragged(self.layer, "attn_softmax")]
        heads = softmax[0].shape[1] // softmax[0].shape[0]
        split = [part.reshape(part.shape[0], heads, -1) for part in softmax]
        sums = np.concatenate([part.sum(axis=2).reshape(-1) for part in split])
        yield self._check("attn_softmax", "rows sum to 1", float(np.mean((sums - 1) ** 2)), self.dtype, "")
        if self._has("attn_scores"):
            scores = self.trace.ragged(self.layer, "attn_scores")
            expected = [_softmax(a, b) for a, b in zip(scores, split, strict=True)]
            difference = sum(_energy(a - b) for a, b in zip(split, expected, strict=True))
            nmse = difference / max(sum(map(_energy, expected)), 1e-300)
            yield self._check("attn_softmax", "softmax(attn_scores)", nmse, self.dtype, "")
        if self._has("attention") and self._has("qkv_bias"):
            found, qkv = self._tap("attention"), self._tap("qkv_bias")
            width = found.shape[1] // heads
            kv_heads = (qkv.shape[1] // width - heads) // 2
            if width * heads != found.shape[1] or kv_heads < 1 or heads % kv_heads:
                return
            values = qkv[:, (heads + kv_heads) * width :].reshape(qkv.shape[0], kv_heads, width)
            rows = []
            for part, tokens in zip(split, self.trace.batch.slices, strict=True):
                v = np.repeat(values[tokens], heads // kv_heads, axis=1)
                each = [
                    float64.matmul(np.ascontiguousarray(part[:, h]), np.ascontiguousarray(v[:, h].T))
                    for h in range(heads)
                ]
                rows.append(np.concatenate(each, axis=1))
            expected_rows = np.concatenate(rows)
            nmse = _energy(found - expected_rows) / max(_energy(expected_rows), 1e-300)
            dtype = self.kv_type if self.dtype == "f32" else self.dtype
            yield self._check("attention", "attn_softmax * v", nmse, dtype, "")

    def _check(self, tap: str, name: str, nmse: float, dtype: str, reading: str) -> dict[str, Any]:
        tolerance = self._tolerance(dtype)
        holds = bool(nmse <= tolerance)
        return {
            "layer": self.layer,
            "tap": tap,
            "identity": f"{tap} = {name}" if "sum to" not in name else f"{tap}: {name}",
            "nmse": nmse,
            "tolerance": tolerance,
            "holds": holds,
            "reading": None if holds or not reading else reading,
        }

    def _tolerance(self, dtype: str) -> float:
        return (ROUNDINGS * _UNIT[dtype]) ** 2

    def _has(self, tap: str) -> bool:
        return self.trace.has(*self._place(tap))

    def _tap(self, tap: str) -> F64:
        return self.trace.tap(*self._place(tap)).astype(np.float64)

    def _place(self, tap: str) -> tuple[int, str]:
        if tap != "layer_input":
            return self.layer, tap
        return (WHOLE_MODEL, "embedding") if self.layer == 0 else (self.layer - 1, "post_ffn_residual")

    def _guessed(self) -> str:
        """The narrowest dtype that holds a tap's values, where the trace does not say."""
        for tap in ("attn_out", "ffn_out", "post_ffn_residual", "ffn_swiglu"):
            if self._has(tap):
                values = self.trace.tap(self.layer, tap)
                for dtype in ("bf16", "f16"):
                    if np.array_equal(round_to(values, dtype), values):
                        return dtype
                break
        return "f32"


def _silu(x: F64) -> F64:
    return np.asarray(x / (1.0 + np.exp(-x)))


def _swiglu(gate: F64, up: F64) -> F64:
    return np.asarray(_silu(gate) * up)


def _gelu(x: F64) -> F64:
    return float64.gelu(x)


def _geglu(gate: F64, up: F64) -> F64:
    return np.asarray(_gelu(gate) * up)


def _softmax(scores: NDArray[Any], seen: F64) -> F64:
    """Softmax over the keys that have a weight at all, so that no window need be known."""
    rows = scores.astype(np.float64).reshape(seen.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        rows = np.where(seen > 0, rows, -np.inf)
        weights = np.exp(rows - np.max(rows, axis=2, keepdims=True))
    return np.asarray(weights / np.sum(weights, axis=2, keepdims=True))


def _energy(x: F64) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sum(np.square(x)))
