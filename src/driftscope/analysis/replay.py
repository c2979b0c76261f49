"""Every op of a trace, recomputed from the trace's own recorded inputs.

What is left between a recorded output and the truth falls into three components that add up: what the engine
did beyond its declared arithmetic (``engine``), what that arithmetic costs (``arithmetic``), and what the
weights and hyperparameters of the model that it ran cost against those of a reference (``model``). Nothing
is inherited from earlier ops, so an error shows at the op that makes it. `docs/explanation/replay.md` tells
more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.noise import COMPONENTS, Noise, Spread, Tap, side_by_side
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.engines.trace import PARTS, RAGGED, Trace
from driftscope.errors import InputError
from driftscope.forward.architecture import (
    Op,
    embedding_op,
    head_ops,
    layer_ops,
    norm_tensor,
    op_order,
    site_shape,
    site_tensor,
)
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.evaluate import DeclaredOps, Value
from driftscope.forward.exact import ExactOps, ExactValue
from driftscope.forward.ops import Ops, check_same_shape
from driftscope.forward.policy import MATMUL_SITES, WHOLE_MODEL
from driftscope.forward.rounded import rounded

F64 = NDArray[np.float64]

Place = tuple[int, str, str]
"""Layer (-1 for the whole model), tap, part."""

_EMBEDDING = "model.embed_tokens.weight"

_TABLE_GELU = "llama.cpp"
"""Engine that looks GELU up in a table."""

_NORM_NUMBERS = ("rms_norm_eps", "norm_offset")
_ROPE_NUMBERS = ("rope_theta", "rope_scaling", "local_rope_theta", "rotary_dim", "sliding_layers")
_HYPERPARAMETERS = {
    "embedding": ("embedding_scale",),
    **dict.fromkeys(
        ("attn_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm", "final_norm"), _NORM_NUMBERS
    ),
    **dict.fromkeys(("q_post_rope", "k_post_rope"), (*_ROPE_NUMBERS, *_NORM_NUMBERS)),
    "attn_scores": ("attention_scale", "attention_softcap"),
    "attn_softmax": ("sliding_window", "sliding_layers"),
    "ffn_silu": ("activation",),
    "lm_head": ("logit_softcap",),
}
"""Hyperparameters that an op reads, beside those that all artifacts of a model share."""


class _AnyEvaluator(Protocol):
    def evaluate(self, layer: int, tap: str, inputs: Mapping[str, Any], batch: Any) -> Any: ...


@dataclass(frozen=True)
class OpReplay:
    """One op of a trace, recorded and recomputed from what the trace recorded of its inputs.

    Attributes:
        layer: its layer, -1 for the whole model's.
        tap: its output.
        part: ``q``, ``k`` or ``v`` of the taps that have parts, else empty.
        inputs: what the op read, by tap name: recorded, or recomputed in the declared arithmetic.
        recomputed: what the trace does not have and had to be recomputed, directly or not an input.
        recorded: the trace's output, ``float32[n_tokens, channels]``; of ragged taps one array a sequence,
            ``float32[t, heads * t]``. Scores of keys to come are zero here and in what follows.
        declared: with the own weights in the declared arithmetic.
        exact: with the own weights in float64; None where no component asks for it.
        reference: with the reference's weights in float64; None where there is no reference. Where the two
            artifacts store the same, it is `exact`, or None too where nothing asks for that.
        predicted: component to the error energy to be expected.
        identical: whether own artifact and reference store the same for this op.
        heads: number of heads, by which ragged taps are divided.
    """

    layer: int
    tap: str
    part: str
    inputs: Mapping[str, Value]
    recomputed: tuple[str, ...]
    recorded: Value
    declared: Value
    exact: ExactValue | None
    reference: ExactValue | None
    predicted: Mapping[str, Spread]
    identical: bool
    heads: int

    def sides(self, component: str) -> tuple[Tap, Tap] | None:
        """The two outputs that a component is the difference of; None where one is missing."""
        pair: tuple[Any, Any] = {
            "engine": (self.recorded, self.declared),
            "arithmetic": (self.declared, self.exact),
            "model": (self.exact, self.reference),
        }[component]
        return None if pair[0] is None or pair[1] is None else pair


@dataclass(frozen=True)
class Difference:
    """A component of one op's error at some tokens; pairs with a value that is not finite are left out.

    Attributes:
        measured: energy of the difference.
        signal: energy of what was to be.
        count: pairs with both values finite.
        non_finite: pairs of which only the first value is not finite.
    """

    measured: Spread
    signal: float
    count: int
    non_finite: int


def difference(a: Tap, b: Tap, sequence: int, tokens: slice, heads: int) -> Difference:
    """What `a` has over `b` in one sequence.

    Args:
        a: a tap of all tokens, or of a ragged tap the list of all sequences.
        b: likewise.
        sequence: its number.
        tokens: its rows.
        heads: number of heads, for ragged taps.
    """
    x, y = (np.asarray(v[sequence] if isinstance(v, list) else v[tokens], np.float64) for v in (a, b))
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(invalid="ignore", over="ignore"):
        squares = np.where(finite, np.square(x - y), 0.0)
        signal = np.where(finite, np.square(y), 0.0)
    if isinstance(a, list):
        squares = np.sum(squares.reshape(x.shape[0], heads, -1), axis=2)
    return Difference(
        Spread(np.sum(squares, axis=1), np.sum(squares, axis=0)),
        float(np.sum(signal)),
        int(np.count_nonzero(finite)),
        int(np.count_nonzero(np.isfinite(y) & ~np.isfinite(x))),
    )


@dataclass
class _Side:
    """One way to compute, with what it has computed of the layers at hand."""

    ops: _AnyEvaluator
    values: dict[tuple[int, str], Any] = field(default_factory=dict)


class Replayer:
    """Recomputes the ops of a trace.

    Asking layer by layer is cheapest: what was computed of a layer is kept until one farther on is asked for.
    """

    def __init__(
        self,
        trace: Trace,
        own: Artifact,
        *,
        reference: Artifact | None = None,
        arithmetic: Arithmetic | None = None,
        components: Collection[str] = COMPONENTS,
        threads: int = 1,
        overrides: Mapping[tuple[int, str], Value] | None = None,
    ) -> None:
        """Prepare.

        Args:
            trace: what an engine recorded.
            own: the artifact that the engine ran.
            reference: the artifact that holds the truth, or None.
            arithmetic: what the engine is taken to compute in; None for what the trace declares, or float32
                where it declares nothing. Every role of its policy means `own`.
            components: which of ``engine``, ``arithmetic`` and ``model`` to compute.
            threads: number of threads; the result does not depend on it.
            overrides: by layer and tap, values that stand in for what the trace recorded.

        Raises:
            InputError: an artifact and the trace or the other artifact are not of one model.
        """
        if unknown := sorted(set(components) - set(COMPONENTS)):
            raise ValueError(f"component {unknown[0]!r}; expected some of {', '.join(COMPONENTS)}")
        self.trace = trace
        self.own = own
        self.reference = reference
        self.batch = trace.batch
        self.config = own.config
        self.arithmetic = arithmetic or trace.manifest.arithmetic or Arithmetic.of()
        self.components = tuple(
            name for name in COMPONENTS if name in components and (name != "model" or reference is not None)
        )
        self._overrides = dict(overrides or {})
        policy = self.arithmetic.policy
        self._check_vocabulary()
        loaded = rounded(own, self.arithmetic.dtype)
        declared = Ops(dict.fromkeys(policy.artifacts, loaded), policy, threads=threads)
        self._sides = {
            "declared": _Side(DeclaredOps(declared, self.arithmetic.dtype)),
            "exact": _Side(ExactOps(own, threads=threads)),
        }
        if reference is not None:
            check_same_shape(reference, own)
            self._sides["reference"] = _Side(ExactOps(reference, threads=threads))
        options = trace.manifest.engine.get("options")
        fused = isinstance(options, Mapping) and bool(options.get("flash_attention"))
        self._noise = Noise(
            own,
            self.arithmetic,
            self.batch,
            fused_attention=fused,
            table_gelu=trace.manifest.engine.get("name") == _TABLE_GELU,
            threads=threads,
        )
        self._recorded: dict[tuple[int, str], Value] = {}
        self._inherited: dict[tuple[int, str], dict[str, Spread]] = {}
        self._ops = {(WHOLE_MODEL, op.tap): op for op in (embedding_op(self.config), *head_ops(self.config))}
        for layer in range(self.config.num_layers):
            self._ops.update({(layer, op.tap): op for op in layer_ops(self.config)})
        self._layer = 0

    def places(self, layers: Iterable[int] | None = None) -> list[Place]:
        """What can be replayed: everything that the trace recorded, in topological order.

        Args:
            layers: only these, of which -1 is the embedding and the head; None for all.
        """
        wanted = None if layers is None else set(layers)
        order = sorted(self._ops, key=lambda place: op_order(*place))
        return [
            (layer, tap, part)
            for layer, tap in order
            if (wanted is None or layer in wanted) and self._has(layer, tap)
            for part in PARTS.get(tap, ("",))
        ]

    def op(self, layer: int, tap: str, part: str = "") -> OpReplay:
        """Replay one op.

        Raises:
            InputError: the trace does not have it, or a recorded array has another width than the model's.
        """
        if (layer, tap) not in self._ops:
            raise ValueError(f"no op gives {tap!r} in layer {layer}")
        # What is not finite in a trace stays so, and is counted.
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            return self._replay(layer, tap, part)

    def _replay(self, layer: int, tap: str, part: str) -> OpReplay:
        self._forget(layer)
        recorded = self._take(layer, tap)
        sources = self._sources(layer, tap)
        identical = self.reference is not None and self._stores_same(layer, tap, part)
        model = "model" in self.components and not identical
        exact = model or "arithmetic" in self.components
        declared = self._compute("declared", layer, tap)
        found: dict[str, Any] = {"exact": None, "reference": None}
        if exact:
            found["exact"] = self._compute("exact", layer, tap)
        if model:
            found["reference"] = self._compute("reference", layer, tap)
        elif "model" in self.components:
            found["reference"] = found["exact"]
        predicted = self._predict(layer, tap, part, declared)
        if identical and "model" in predicted:
            predicted["model"] = 0.0 * predicted["model"]

        def cut(value: Any) -> Any:
            return None if value is None else self._cut(tap, part, value)

        return OpReplay(
            layer=layer,
            tap=tap,
            part=part,
            inputs={name: self._value("declared", *place) for name, place in sources.items()},
            recomputed=tuple(self._missing(layer, tap)),
            recorded=cut(recorded),
            declared=cut(declared),
            exact=cut(found["exact"]),
            reference=cut(found["reference"]),
            predicted=predicted,
            identical=identical,
            heads=self.config.num_heads,
        )

    def rows(self, layers: Iterable[int] | None = None, *, path: str = "") -> list[dict[str, Any]]:
        """Rows of the ``replay`` table (`driftscope.evidence.schemas.REPLAY`), one a prompt and component.

        Args:
            layers: as in `places`.
            path: what the table calls the trace; by default the name of its engine.
        """
        rows = []
        for place in self.places(layers):
            rows += op_rows(self.op(*place), self.trace, self.components, path or self.trace.name)
        return rows

    def _has(self, layer: int, tap: str) -> bool:
        return (layer, tap) in self._overrides or self.trace.has(layer, tap)

    def _sources(self, layer: int, tap: str) -> dict[str, tuple[int, str]]:
        """Where each input of an op is from."""
        found = {}
        for name in self._ops[layer, tap].inputs:
            place = (layer, name)
            if name == "layer_input":
                before = (self.config.num_layers if layer == WHOLE_MODEL else layer) - 1
                place = (WHOLE_MODEL, "embedding") if before < 0 else (before, "post_ffn_residual")
            found[name] = place
        return found

    def _missing(self, layer: int, tap: str) -> list[str]:
        """Taps that are recomputed for an op, in the order in which they are."""
        found: list[str] = []
        for name, place in self._sources(layer, tap).items():
            if not self._has(*place):
                found += [*self._missing(*place), name]
        return list(dict.fromkeys(found))

    def _take(self, layer: int, tap: str) -> Value:
        """A recorded tap."""
        key = (layer, tap)
        if key not in self._recorded:
            if key in self._overrides:
                value = self._overrides[key]
            else:
                value = self.trace.ragged(layer, tap) if tap in RAGGED else self.trace.tap(layer, tap)
            self._check_width(layer, self._ops[key], value)
            self._recorded[key] = value
        return self._recorded[key]

    def _value(self, side: str, layer: int, tap: str) -> Any:
        """A tap as an input: recorded, or recomputed on that side."""
        return self._take(layer, tap) if self._has(layer, tap) else self._compute(side, layer, tap)

    def _compute(self, side: str, layer: int, tap: str) -> Any:
        values = self._sides[side].values
        key = (layer, tap)
        if key not in values:
            inputs = {name: self._value(side, *place) for name, place in self._sources(layer, tap).items()}
            values[key] = self._sides[side].ops.evaluate(layer, tap, inputs, self.batch)
        return values[key]

    def _predict(self, layer: int, tap: str, part: str, declared: Value) -> dict[str, Spread]:
        sources = self._sources(layer, tap)
        inputs = {name: self._value("declared", *place) for name, place in sources.items()}
        inherited = {name: self._errors(*place) for name, place in sources.items() if not self._has(*place)}
        output = self._cut(tap, part, declared)
        return self._noise.predict(layer, tap, part, inputs, output, self.components, inherited=inherited)

    def _errors(self, layer: int, tap: str) -> dict[str, Spread]:
        """What a recomputed tap is expected to be off by."""
        key = (layer, tap)
        if key not in self._inherited:
            declared = self._compute("declared", layer, tap)
            found = [self._predict(layer, tap, part, declared) for part in PARTS.get(tap, ("",))]
            self._inherited[key] = {
                name: side_by_side([item[name] for item in found]) for name in self.components
            }
        return self._inherited[key]

    def _cut(self, tap: str, part: str, value: Any) -> Any:
        """A part of an output, or scores without those of keys to come."""
        if part:
            widths = [site_shape(self.config, name)[0] for name in PARTS[tap]]
            index = PARTS[tap].index(part)
            return np.ascontiguousarray(value[:, sum(widths[:index]) : sum(widths[: index + 1])])
        if tap == "attn_scores":
            return [np.where(_seen(array), array, 0).astype(array.dtype, copy=False) for array in value]
        return value

    def _stores_same(self, layer: int, tap: str, part: str) -> bool:
        """Whether both artifacts have the same bytes and settings for an op and what is recomputed for it."""
        assert self.reference is not None
        a, b = self.own, self.reference
        if any(getattr(a.config, name) != getattr(b.config, name) for name in _HYPERPARAMETERS.get(tap, ())):
            return False
        pairs = zip(self._tensors(a, layer, tap, part), self._tensors(b, layer, tap, part), strict=True)
        if not all(_same_bytes(a, b, x, y) for x, y in pairs):
            return False
        sources = self._sources(layer, tap).values()
        return all(self._has(*place) or self._stores_same(*place, "") for place in sources)

    def _tensors(self, artifact: Artifact, layer: int, tap: str, part: str) -> list[str]:
        """Names of the tensors that an op reads."""
        op = self._ops[layer, tap]
        if tap == "embedding":
            return [_EMBEDDING]
        if tap == "qkv_bias":
            sites = [part] if part else ["q", "k", "v"]
            names = [site_tensor(artifact.config, layer, site) for site in sites]
            return [name.removesuffix("weight") + "bias" for name in names if self.config.attention_bias]
        if "norms" in op.sites:
            names = [norm_tensor(artifact.config, layer, tap)]
        else:
            sites = [part] if part else [site for site in op.sites if site in MATMUL_SITES]
            names = [site_tensor(artifact.config, layer, site) for site in sites]
        return [*names, ROPE_FREQS] if tap.endswith("post_rope") else names

    def _forget(self, layer: int) -> None:
        """Drop what was kept of layers that are not near."""
        at = self._place_of(layer)
        if at == self._layer:
            return
        self._layer = at
        stores: list[dict[tuple[int, str], Any]] = [self._recorded, self._inherited]
        for store in (*stores, *(side.values for side in self._sides.values())):
            for key in [key for key in store if not 0 <= at - self._place_of(key[0]) <= 1]:
                del store[key]

    def _place_of(self, layer: int) -> int:
        return self.config.num_layers if layer == WHOLE_MODEL else layer

    def _check_width(self, layer: int, op: Op, value: Value) -> None:
        heads = self.config.num_heads
        for sequence, tokens in enumerate(self.batch.slices):
            array = value[sequence] if isinstance(value, list) else value
            length = tokens.stop - tokens.start
            width = heads * length if isinstance(value, list) else op.channels
            if array.shape[1] != width:
                raise InputError(
                    f"{self.trace.folder}: {op.tap} of layer {layer} has {array.shape[1]} channels; "
                    f"{self.own.path} has {width}"
                )

    def _check_vocabulary(self) -> None:
        if int(self.batch.ids.max()) >= self.config.vocab_size:
            raise InputError(
                f"{self.trace.folder}: token id {int(self.batch.ids.max())} is outside of the vocabulary of "
                f"{self.config.vocab_size} tokens of {self.own.path}"
            )


def op_rows(op: OpReplay, trace: Trace, components: Collection[str], path: str) -> list[dict[str, Any]]:
    """Rows of the ``replay`` table of one op, one a prompt and component."""
    rows = []
    for component in components:
        sides = op.sides(component)
        for sequence, tokens in enumerate(trace.batch.slices):
            identical = component == "model" and op.identical
            if sides is None and not identical:
                continue
            a, b = sides if sides is not None and not identical else (op.declared, op.declared)
            found = difference(a, b, sequence, tokens, op.heads)
            per_token, per_channel = op.predicted[component].of_sequence(sequence, tokens)
            total = float(np.sum(per_token))
            worst_token, position = _worst(found.measured.per_token, per_token)
            worst_channel, channel = _worst(found.measured.per_channel, per_channel)
            measured = found.measured.total
            rows.append(
                {
                    "path": path,
                    "prompt": trace.manifest.prompts[sequence][0],
                    "layer": op.layer,
                    "tap": op.tap,
                    "part": op.part,
                    "component": component,
                    "token_count": tokens.stop - tokens.start,
                    "count": found.count,
                    "nmse": measured / found.signal if found.signal > 0 else None,
                    "energy": measured,
                    "signal_energy": found.signal,
                    "predicted_energy": total,
                    "score": math.log10(measured / total) if measured > 0 and total > 0 else None,
                    "score_token": worst_token,
                    "worst_position": position,
                    "score_channel": worst_channel,
                    "worst_channel": channel,
                    "non_finite": found.non_finite,
                    "recomputed": "+".join(op.recomputed),
                }
            )
    return rows


def _worst(measured: F64, expected: F64) -> tuple[float | None, int]:
    """The largest logarithm of a ratio, and where; None and -1 where there is none."""
    usable = (measured > 0) & (expected > 0)
    if not np.any(usable):
        return None, -1
    ratio = np.divide(measured, expected, out=np.zeros_like(measured), where=usable)
    index = int(np.argmax(ratio))
    return math.log10(ratio[index]), index


def _seen(scores: NDArray[Any]) -> NDArray[np.bool_]:
    """Scores of keys that are not to come, ``bool[t, heads * t]``."""
    length = scores.shape[0]
    return np.tile(np.tri(length, dtype=bool), (1, scores.shape[1] // length))


def _same_bytes(a: Artifact, b: Artifact, name_a: str, name_b: str) -> bool:
    x, y = a.tensors.get(name_a), b.tensors.get(name_b)
    if x is None or y is None:
        return x is y
    if x.value_offset != y.value_offset:
        return False
    if (x.file, x.offset, x.dtype, x.shape) == (y.file, y.offset, y.dtype, y.shape):
        return True
    if (x.dtype, x.shape, x.rope_heads) != (y.dtype, y.shape, y.rope_heads):
        return False
    return np.array_equal(x.raw(), y.raw())
