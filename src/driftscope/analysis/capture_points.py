"""Taps that were recorded at another point than the standard one, told from faults by what comes after them.

A tap that differs from its op has been computed wrong, or something else was recorded under its name. The
engine's own next ops know: they were fed with what it really had there. If they agree with the value as we
compute it, and not with the value that was recorded, the tap was captured elsewhere. If they agree with what
was recorded, however odd it is, the engine has used it, and the difference is real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.first_divergence import ALPHA, Flag
from driftscope.analysis.floors import Floors
from driftscope.engines.trace import PARTS
from driftscope.forward.architecture import (
    Op,
    embedding_op,
    head_ops,
    layer_ops,
    norm_tensor,
    op_order,
    score_scale,
    tap_name,
)
from driftscope.forward.evaluate import Value
from driftscope.forward.policy import WHOLE_MODEL

if TYPE_CHECKING:
    from driftscope.analysis.replay import OpReplay, Replayer
    from driftscope.artifacts.model import ModelConfig
    from driftscope.engines.trace import Trace

Place = tuple[int, str]
"""Layer (-1 for the whole model) and tap."""

AGREES = ALPHA / 1000
"""Tail probability above which a consumer agrees with a value: `ALPHA` over some thousand tests."""

CLEARLY = 1e-3, 1e-5
"""A consumer that disagrees with the recorded value agrees with the computed one also where that leaves this
part of its error, and no more than this NMSE: what is put in is off by last bits, of which some ops make
more."""

SAME = 1e-3
"""NMSE below which a recorded tap is taken to be the value that stands somewhere else."""

_NORMS = ("attn_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm", "final_norm")


@dataclass(frozen=True)
class CaptureReport:
    """What was captured elsewhere.

    Attributes:
        findings: one a tap, over all layers at which the same was found: ``layer`` (the first of them),
            ``layers``, ``tap``, ``part`` and ``parts``, ``declared`` (where it was to be captured), ``found``
            (where it was), ``evidence``, ``agreed_consumers`` (ops that agree with the value as we compute
            it and not as it was recorded), ``statement``.
        remaining: flags that this does not explain.
        cleared: flags that it does: those of the taps themselves and of ops that read them.
    """

    findings: list[dict[str, Any]]
    remaining: list[Flag]
    cleared: list[Flag]


@dataclass
class _Found:
    """A tap captured elsewhere, in one layer."""

    layer: int
    tap: str
    part: str
    where: str
    nmse: float
    before: float
    consumers: list[str] = field(default_factory=list)


def capture_points(
    trace: Trace, replayer: Replayer, flagged: Sequence[Flag], floors: Floors | None = None
) -> CaptureReport:
    """Find the taps among the flagged ones that were captured elsewhere.

    Taps are gone through in topological order; once one is found, ops that read it are tried with the value
    that it should have had.

    Args:
        trace: the trace.
        replayer: replays it; only its artifact and arithmetic are used.
        flagged: flags of the trace; those of other components than ``engine`` stay.
        floors: what an agreement is judged by; None for what theory says.
    """
    test = _Test(trace, replayer, floors or Floors({}))
    found: list[_Found] = []
    cleared: set[tuple[int, str, str]] = set()
    places = {flag.place for flag in flagged if flag.component == "engine"}
    for layer, tap in sorted({place[:2] for place in places}, key=lambda place: op_order(*place)):
        parts = [part for part in PARTS.get(tap, ("",)) if (layer, tap, part) in places]
        if test.is_read_elsewhere(layer, tap):
            agreed = [part for part in parts if test.agrees(layer, tap, part)]
            cleared |= {(layer, tap, part) for part in agreed}
            parts = [part for part in parts if part not in agreed]
        here = [finding for part in parts if (finding := test.elsewhere(layer, tap, part)) is not None]
        if here:
            found += here
            cleared |= {(layer, tap, finding.part) for finding in here}
            test.accept(layer, tap)
    gone = [flag for flag in flagged if flag.component == "engine" and flag.place in cleared]
    return CaptureReport(
        findings=_aggregated(found, trace, replayer.config),
        remaining=[flag for flag in flagged if flag not in gone],
        cleared=gone,
    )


class _Test:
    """Consumers' tests of one trace, with the values that were found to have been recorded wrongly."""

    def __init__(self, trace: Trace, replayer: Replayer, floors: Floors) -> None:
        self.trace = trace
        self.floors = floors
        self.config = replayer.config
        self._given = replayer
        self._ops: dict[Place, Op] = {
            (WHOLE_MODEL, op.tap): op for op in (embedding_op(self.config), *head_ops(self.config))
        }
        for layer in range(self.config.num_layers):
            self._ops.update({(layer, op.tap): op for op in layer_ops(self.config)})
        self._accepted: dict[Place, Value] = {}
        self._plain = self._replayer({})

    def is_read_elsewhere(self, layer: int, tap: str) -> bool:
        """Whether an op reads, maybe by way of taps that were not recorded, what was found wrong."""
        return any((layer, tap) in {at for at, _ in self._consumers(*place)} for place in self._accepted)

    def agrees(self, layer: int, tap: str, part: str) -> bool:
        """Whether an op is clean with what was found so far."""
        return self._tail(self._plain.op(layer, tap, part), substituted=bool(self._accepted)) >= AGREES

    def elsewhere(self, layer: int, tap: str, part: str) -> _Found | None:
        """The consumers' test of one tap; None where it is a difference, or nobody can tell."""
        replay = self._plain.op(layer, tap, part)
        trial = self._replayer({(layer, tap): self._computed(layer, tap)})
        agreed = []
        for (at, name), parts in self._consumers(layer, tap, part):
            for piece in parts:
                tried, plain = trial.op(at, name, piece), self._plain.op(at, name, piece)
                as_computed = self._tail(tried, substituted=True) >= AGREES
                if self._tail(plain) >= AGREES:
                    if not as_computed:
                        return None
                elif as_computed or _clearly_better(tried, plain):
                    agreed.append(tap_name(at, name) + (f".{piece}" if piece else ""))
        if not agreed:
            return None
        where, nmse = self._name(replay, trial)
        before = _nmse(replay.recorded, replay.declared)
        return _Found(layer, tap, part, where, nmse, before, agreed)

    def accept(self, layer: int, tap: str) -> None:
        """From now on a tap has the value that we compute."""
        self._accepted[layer, tap] = self._computed(layer, tap)
        self._plain = self._replayer({})

    def _computed(self, layer: int, tap: str) -> Value:
        if (layer, tap) in self._accepted:
            return self._accepted[layer, tap]
        parts = [self._plain.op(layer, tap, part).declared for part in PARTS.get(tap, ("",))]
        first = parts[0]
        return first if isinstance(first, list) or len(parts) == 1 else np.concatenate(parts, axis=1)

    def _replayer(self, more: Mapping[Place, Value]) -> Replayer:
        return type(self._given)(
            self.trace,
            self._given.own,
            arithmetic=self._given.arithmetic,
            components=("engine",),
            overrides={**self._accepted, **more},
        )

    def _tail(self, replay: OpReplay, *, substituted: bool = False) -> float:
        """The smallest tail probability of an op, over prompts and statistics.

        An input that was put in for what was recorded is off by a last bit, as a recomputed one is.
        """
        from driftscope.analysis.replay import op_rows

        tails = [1.0]
        for row in op_rows(replay, self.trace, ("engine",), ""):
            if row["non_finite"]:
                return 0.0
            if substituted and not row["recomputed"]:
                row["recomputed"] = "+".join(self._ops[replay.layer, replay.tap].inputs)
            tails += self.floors.tail_probabilities(row, self._given.arithmetic).values()
        return min(tails)

    def _consumers(self, layer: int, tap: str, part: str = "") -> Iterator[tuple[Place, tuple[str, ...]]]:
        """Recorded ops that read a tap, also by way of taps that were not recorded, with their parts."""
        for at, name in self._readers(layer, tap, part):
            if not self.trace.has(at, name):
                yield from self._consumers(at, name, part if name in PARTS else "")
            else:
                yield (at, name), (part,) if part and name in PARTS else PARTS.get(name, ("",))

    def _readers(self, layer: int, tap: str, part: str) -> Iterator[Place]:
        at, name = layer, tap
        if tap in ("post_ffn_residual", "embedding"):
            # What leaves a layer is the input of the next, or of the final norm.
            at = 0 if tap == "embedding" else layer + 1
            at, name = (at if at < self.config.num_layers else WHOLE_MODEL), "layer_input"
        for (number, reader), op in self._ops.items():
            if number != at or name not in op.inputs:
                continue
            if (
                tap == "qkv_bias"
                and part
                and reader != {"q": "q_post_rope", "k": "k_post_rope"}.get(part, "attention")
            ):
                continue
            yield number, reader

    def _name(self, replay: OpReplay, trial: Replayer) -> tuple[str, float]:
        """The point at which a tap was captured, and how well the recorded value fits it (NMSE)."""
        fits = [(_nmse(replay.recorded, value), name) for name, value in self._known_points(replay, trial)]
        nmse, name = min(fits, default=(np.inf, ""))
        if nmse <= SAME:
            return name, float(nmse)
        factor = _factor(replay.recorded, replay.declared)
        if factor is not None:
            scaled = _times(replay.declared, factor)
            # A factor that explains little of the difference is none.
            before = _nmse(replay.recorded, replay.declared)
            if (rest := _nmse(replay.recorded, scaled)) <= min(SAME, before / 2):
                return f"times a factor of {factor:.6g}", rest
        return "another point, none of those we know", float(
            min(nmse, _nmse(replay.recorded, replay.declared))
        )

    def _known_points(self, replay: OpReplay, trial: Replayer) -> Iterator[tuple[str, Any]]:
        """Names of other points, and what stands there."""
        layer, tap, part = replay.layer, replay.tap, replay.part
        config = self.config
        yield from self._inputs(replay)
        for (at, name), _ in self._consumers(layer, tap, part):
            text = _AFTER.get((tap, name))
            if text:
                piece = part if name in PARTS else ""
                yield text, trial.op(at, name, piece).declared
        if tap in _NORMS:
            weight = _norm_weight(self._given, layer, tap)
            with np.errstate(divide="ignore", invalid="ignore"):
                yield "before the norm's weight", np.where(weight != 0, replay.declared / weight, 0)
        if tap == "attn_scores":
            yield "before the scale", _times(replay.declared, 1 / score_scale(config))
        if tap == "q_post_rope":
            yield "after the scale of the scores", _times(replay.declared, score_scale(config))
        if tap in ("q_post_rope", "k_post_rope") and config.qk_norm:
            weight = _norm_weight(self._given, layer, tap)
            yield "after the head norm, before RoPE", self._head_norm(replay, weight)
        if tap == "post_ffn_residual" and layer == 0 and self.trace.has(WHOLE_MODEL, "embedding"):
            yield "of the layer before", self.trace.tap(WHOLE_MODEL, "embedding")
        for other in (layer - 1, layer + 1):
            if layer != WHOLE_MODEL and 0 <= other < config.num_layers and self.trace.has(other, tap):
                yield (
                    f"of the layer {'before' if other < layer else 'after'}",
                    trial.op(other, tap, part).declared,
                )

    def _inputs(self, replay: OpReplay) -> Iterator[tuple[str, Any]]:
        for name, value in replay.inputs.items():
            text = _BEFORE.get((replay.tap, name))
            if text is None or isinstance(value, list):
                continue
            piece = replay.part or (replay.tap[0] if replay.tap.endswith("_post_rope") else "")
            yield text, self._part(value, piece) if name in PARTS else value

    def _part(self, value: NDArray[Any], part: str) -> NDArray[Any]:
        q, kv = (heads * self.config.head_dim for heads in (self.config.num_heads, self.config.num_kv_heads))
        left, right = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[part]
        return value[:, left:right]

    def _head_norm(self, replay: OpReplay, weight: NDArray[Any]) -> NDArray[Any]:
        value = replay.inputs["qkv_bias"]
        assert not isinstance(value, list)
        x = self._part(value, replay.tap[0]).astype(np.float64)
        heads = x.reshape(x.shape[0], -1, self.config.head_dim)
        mean = np.mean(np.square(heads), axis=2, keepdims=True) + self.config.rms_norm_eps
        return np.asarray(heads / np.sqrt(mean) * weight).reshape(x.shape)


_BEFORE = {
    ("attn_norm", "layer_input"): "before the norm",
    ("ffn_norm", "post_attn_residual"): "before the norm",
    ("final_norm", "layer_input"): "before the norm",
    ("qkv_bias", "qkv_matmul"): "before the bias",
    ("q_post_rope", "qkv_bias"): "before RoPE",
    ("k_post_rope", "qkv_bias"): "before RoPE",
    ("post_attn_norm", "attn_out"): "before the norm",
    ("post_ffn_norm", "ffn_out"): "before the norm",
    ("post_attn_residual", "attn_out"): "before the residual",
    ("post_attn_residual", "post_attn_norm"): "before the residual",
    ("post_ffn_residual", "post_ffn_norm"): "before the residual",
    ("post_attn_residual", "layer_input"): "at the input of the layer",
    ("post_ffn_residual", "ffn_out"): "before the residual",
    ("post_ffn_residual", "post_attn_residual"): "before the MLP",
    ("ffn_silu", "ffn_gate"): "before the activation",
    ("ffn_swiglu", "ffn_silu"): "before the product with ffn_up",
    ("ffn_swiglu", "ffn_up"): "ffn_up, before the product",
    ("attn_out", "attention"): "before o_proj",
}
"""Where a tap was captured that equals an input of its op."""

_AFTER = {
    ("qkv_matmul", "qkv_bias"): "after the bias",
    ("qkv_bias", "q_post_rope"): "after RoPE",
    ("qkv_bias", "k_post_rope"): "after RoPE",
    ("attn_out", "post_attn_norm"): "after the norm",
    ("ffn_out", "post_ffn_norm"): "after the norm",
    ("post_attn_norm", "post_attn_residual"): "after the residual",
    ("post_ffn_norm", "post_ffn_residual"): "after the residual",
    ("attn_out", "post_attn_residual"): "after the residual",
    ("attn_out", "ffn_norm"): "after the residual and the norm",
    ("ffn_out", "post_ffn_residual"): "after the residual",
    ("post_attn_residual", "ffn_norm"): "after the norm",
    ("post_ffn_residual", "attn_norm"): "after the norm",
    ("post_ffn_residual", "final_norm"): "after the norm",
    ("ffn_gate", "ffn_silu"): "after the activation",
    ("ffn_gate", "ffn_swiglu"): "after the activation and the product with ffn_up",
    ("ffn_up", "ffn_swiglu"): "after the product with ffn_silu",
    ("ffn_silu", "ffn_swiglu"): "after the product with ffn_up",
    ("attn_scores", "attn_softmax"): "after the softmax",
    ("attention", "attn_out"): "after o_proj",
}
"""Where a tap was captured that equals the output of an op that reads it."""


def _aggregated(found: Sequence[_Found], trace: Trace, config: ModelConfig) -> list[dict[str, Any]]:
    """One finding a tap and point, over layers and parts."""
    standard = {op.tap: op.capture_point for op in (*layer_ops(config), *head_ops(config))}
    standard["embedding"] = embedding_op(config).capture_point
    groups: dict[tuple[str, str], list[_Found]] = {}
    for item in found:
        groups.setdefault((item.tap, item.where), []).append(item)
    findings = []
    for (tap, where), items in groups.items():
        layers = sorted({item.layer for item in items})
        parts = [part for part in PARTS.get(tap, ()) if any(item.part == part for item in items)]
        consumers = sorted({name for item in items for name in item.consumers})
        declared = trace.manifest.capture_points.get(tap, standard[tap])
        name = f"{tap} ({', '.join(parts)})" if parts and parts != list(PARTS[tap]) else tap
        worst, before = max(item.nmse for item in items), max(item.before for item in items)
        findings.append(
            {
                "layer": layers[0],
                "layers": layers,
                "tap": tap,
                "part": parts[0] if len(parts) == 1 else "",
                "parts": parts,
                "declared": declared,
                "found": where,
                "evidence": {"nmse_as_declared": before, "nmse_as_found": worst},
                "agreed_consumers": consumers,
                "statement": (
                    f"{name} was recorded {where}, {_in_layers(layers, config.num_layers)}; declared is: "
                    f"{declared}. {len(consumers)} ops that read it, {consumers[0]} first, agree with the "
                    "value that the declared point has and not with the one recorded."
                ),
            }
        )
    return findings


def _in_layers(layers: Sequence[int], count: int) -> str:
    if list(layers) == [WHOLE_MODEL]:
        return "outside of the layers"
    if len(layers) == count:
        return f"in all {count} layers" if count > 1 else "in the only layer"
    if len(layers) == 1:
        return f"in layer {layers[0]}"
    return f"in {len(layers)} of {count} layers, {layers[0]} first"


def _flat(value: Any) -> NDArray[np.float64]:
    if isinstance(value, list):
        return np.concatenate([np.asarray(part, np.float64).reshape(-1) for part in value])
    return np.asarray(value, np.float64).reshape(-1)


def _nmse(found: Any, expected: Any) -> float:
    """Energy of the difference over that of `expected`; infinite where the shapes differ."""
    x, y = _flat(found), _flat(expected)
    if x.size != y.size:
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        energy, difference = float(np.sum(y * y)), float(np.sum(np.square(x - y)))
    return difference / energy if energy > 0 and np.isfinite(difference) else float("inf")


def _clearly_better(tried: OpReplay, plain: OpReplay) -> bool:
    """Whether an op's error all but goes away; see `CLEARLY`."""
    left, before = _nmse(tried.recorded, tried.declared), _nmse(plain.recorded, plain.declared)
    return left <= min(CLEARLY[0] * before, CLEARLY[1])


def _factor(found: Any, expected: Any) -> float | None:
    """The factor between two taps that fits best."""
    x, y = _flat(found), _flat(expected)
    energy = float(np.sum(y * y))
    factor = float(np.sum(x * y)) / energy if energy > 0 else float("nan")
    return factor if np.isfinite(factor) and factor != 0 else None


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [part * np.float32(factor) for part in value]
    return value * np.float32(factor)


def _norm_weight(replayer: Replayer, layer: int, tap: str) -> NDArray[np.float64]:
    """What a norm multiplies by."""
    from driftscope.forward.weights import Weights

    name = norm_tensor(replayer.config, layer, tap)
    return Weights(replayer.own).norm(name, replayer.own.tensors[name].shape[0]).astype(np.float64)
