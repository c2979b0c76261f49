"""What a hypothesis is given, what it answers, and what an explanation is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.engines.trace import RAGGED
from driftscope.forward.architecture import tap_name
from driftscope.forward.arithmetic import Arithmetic, round_to
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import Value
from driftscope.forward.policy import Choice

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

CLASSES = (
    "row-permutation",
    "row-permutation-heads",
    "rope-pairing",
    "norm-offset",
    "bias-dropped",
    "head-tie",
    "missing-tensor",
    "gate-up-swapped",
    "transposed",
    "layer-skipped",
    "norm-eps",
    "scale-dropped",
    "zero-point",
    "rope-factors",
    "rope-precision",
    "rope-theta",
    "head-mapping",
    "soft-cap",
    "window",
    "capture-point",
    "score-precision",
    "score-scale",
    "activation-function",
    "output-scale",
    "f16-overflow",
    "row-count",
    "position-shift",
    "causal-mask",
    "swiglu-shift",
    "residual",
    "other-layer",
    "non-finite",
    "corrupt-block",
    "norm-mean",
    "rope-missing",
    "cross-match",
    "unexplained",
)
"""Every class that an explanation can have; `docs/reference/explanations.md` says what each means."""

LARGEST_VALUES = 1 << 22
"""Values of an op that are looked at: of a larger one some tokens are left out."""

SMALLEST_NOISE = 1e-14
"""Noise in units of the signal's energy below which no difference of two float32 results can be told."""


class SpreadLike(Protocol):
    """Predicted error energy of an op."""

    @property
    def per_token(self) -> F64:
        """``float64[n_tokens]``."""
        ...

    @property
    def per_channel(self) -> F64:
        """``float64[channels]``; of ragged taps one value a head."""
        ...


class Replayed(Protocol):
    """An op that was computed again from a trace's own inputs (`driftscope.analysis.replay.OpReplay`)."""

    @property
    def layer(self) -> int: ...
    @property
    def tap(self) -> str: ...
    @property
    def part(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Value]: ...
    @property
    def recomputed(self) -> Sequence[str]: ...
    @property
    def recorded(self) -> Any: ...
    @property
    def declared(self) -> Any: ...
    @property
    def exact(self) -> Any: ...
    @property
    def reference(self) -> Any: ...
    @property
    def predicted(self) -> Mapping[str, SpreadLike]: ...


class TraceLike(Protocol):
    """What is asked of a trace (`driftscope.engines.trace.Trace`)."""

    @property
    def batch(self) -> TokenBatch:
        """Its tokens."""
        ...

    def has(self, layer: int, tap: str) -> bool:
        """Whether a tap is there."""
        ...

    def tap(self, layer: int, tap: str) -> F32:
        """A tap of all tokens."""
        ...

    def ragged(self, layer: int, tap: str) -> list[F32]:
        """A ragged tap, sequence by sequence."""
        ...


@dataclass(frozen=True)
class Explanation:
    """One answer to what an op does wrong.

    Attributes:
        class_: one of `CLASSES`.
        statement: one sentence with its figures.
        residual_before: NMSE of the op as it was found.
        residual_after: NMSE that is left if the explanation holds.
        evidence: figures and names behind the statement, plain values.
    """

    class_: str
    statement: str
    residual_before: float
    residual_after: float
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``class`` for `class_`."""
        return {
            "class": self.class_,
            "statement": self.statement,
            "residual_before": self.residual_before,
            "residual_after": self.residual_after,
            "evidence": dict(self.evidence),
        }


@dataclass(frozen=True)
class Context:
    """Where an op comes from.

    Attributes:
        own: the artifact whose weights the engine ran.
        reference: the artifact that holds the truth, or None.
        trace: the trace.
        component: ``engine`` (the engine does not do what its own weights say) or ``model`` (its own
            artifact is not the reference).
        replayer: what gave the op, if anything is still to be asked of it.
        arithmetic: what the engine declares; None for that of the trace's manifest, float32 if it has none.
        rows: rows of the ``replay`` table, for what shows in other prompts.
        threads: number of threads; no answer depends on it.
    """

    own: Artifact
    reference: Artifact | None
    trace: TraceLike
    component: str = "engine"
    replayer: Any = None
    arithmetic: Arithmetic | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    threads: int = 1

    @property
    def config(self) -> ModelConfig:
        """Hyperparameters of `own`."""
        return self.own.config

    @property
    def declared(self) -> Arithmetic:
        """The arithmetic that is taken to hold."""
        manifest = getattr(self.trace, "manifest", None)
        found = (
            self.arithmetic
            or getattr(self.replayer, "arithmetic", None)
            or getattr(manifest, "arithmetic", None)
        )
        return found if isinstance(found, Arithmetic) else Arithmetic.of()


@dataclass(frozen=True)
class Candidate:
    """What a hypothesis says the op should then have given.

    Attributes:
        class_: one of `CLASSES`.
        what: what is wrong, to follow the name of the place.
        predicted: the op's output under the hypothesis, as float64 or float32, in the shape of
            `Case.target` (`Case.targets` of a ragged tap).
        complexity: how much was assumed: 0 for a fault without a free number, then about one for each that
            was fitted.
        evidence: figures and names.
        accepted: None to be judged by what is left; else the hypothesis has judged by other evidence.
        tokens: where `predicted` is of some tokens alone, which they are, as indices into those of the case.
        channels: where it is of some channels alone, which. It is then judged there.
    """

    class_: str
    what: str
    predicted: NDArray[Any] | Sequence[NDArray[Any]]
    complexity: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)
    accepted: bool | None = None
    tokens: I64 | None = None
    channels: I64 | None = None


@dataclass(frozen=True)
class Energies:
    """Energies over the values that a candidate speaks of.

    Attributes:
        signal: of what was expected.
        before: of the difference that was found.
        left: of what was found less what the candidate predicts.
        floor: of noise.
    """

    signal: float
    before: float
    left: float
    floor: float

    def nmse(self, energy: float) -> float:
        """An error energy over that of the signal."""
        return energy / self.signal if self.signal else float("inf") if energy else 0.0


_BY_SEQUENCE = ("attn_scores", "attn_softmax", "attention")


class Case:
    """A flagged op, as a hypothesis sees it: what was found, what was expected, and from which inputs.

    Of the component ``engine`` the recorded output is held against the declared arithmetic, with the engine's
    own weights; of ``model`` the exact output of its own weights against that of the reference. A hypothesis
    makes of the expected op, and of the weights that are taken to be right, what a fault would.

    Attributes:
        op: the op.
        context: where it comes from.
        artifact: the weights that are taken to be right.
        config: its hyperparameters.
        tokens: the tokens that are looked at, ascending indices into the batch.
        sequences: of an op that sees whole sequences those that are looked at.
        targets: what was found, one array, or one a sequence for a ragged tap.
        expected_values: what was expected, likewise.
        masks: which values count: those that are finite on both sides and, of scores, not in the future.
        signal: energy of what was expected there.
        before: energy of the difference.
        floor: energy of the difference that needs no explanation.
        memo: what hypotheses have computed and share.
    """

    def __init__(self, op: Replayed, context: Context) -> None:
        self.op, self.context = op, context
        self.memo: dict[str, Any] = {}
        engine = context.component == "engine"
        if engine:
            found, wanted, self.artifact = op.recorded, op.declared, context.own
        else:
            found, wanted = op.exact, op.reference
            self.artifact = context.reference or context.own
        self.config = self.artifact.config
        self.batch = context.trace.batch
        self.ragged = op.tap in RAGGED
        per_token = _error_per_token(found, wanted)
        self.sequences = tuple(range(self.batch.n_sequences))
        if op.tap in _BY_SEQUENCE:
            self.sequences = _chosen_sequences(self.batch, self.config.num_heads, per_token)
            slices = self.batch.slices
            self.tokens: I64 = np.concatenate(
                [np.arange(slices[s].start, slices[s].stop) for s in self.sequences]
            )
        else:
            self.tokens = _chosen_tokens(np.asarray(wanted).shape[1], per_token)
        self.targets = tuple(self._kept(found))
        self.expected_values = tuple(self._kept(wanted))
        self.masks = tuple(self._mask(a, b) for a, b in zip(self.targets, self.expected_values, strict=True))
        self.signal = _energy(
            np.where(mask, value, 0.0) for mask, value in zip(self.masks, self.expected_values, strict=True)
        )
        if self.signal == 0.0:
            self.signal = _energy(
                np.where(mask, value, 0.0) for mask, value in zip(self.masks, self.targets, strict=True)
            )
        self.before = self.error(self.expected_values)
        # What was recorded may be louder than what should have been, and is rounded as loud things are.
        found = _energy(np.where(m, t, 0.0) for m, t in zip(self.masks, self.targets, strict=True))
        self.floor = SMALLEST_NOISE * max(self.signal, found)
        spread = op.predicted.get(context.component)
        if spread is not None:
            kept = np.asarray(spread.per_token, np.float64)[self.tokens]
            self.floor = max(self.floor, float(np.nansum(kept)))

    @property
    def is_engine(self) -> bool:
        """Whether the engine is at fault, not the artifact."""
        return self.context.component == "engine"

    @property
    def place(self) -> str:
        """Name of the op, with its part."""
        name = tap_name(self.op.layer, self.op.tap)
        return f"{name}.{self.op.part}" if self.op.part else name

    @property
    def target(self) -> F64:
        """What was found, ``float64[tokens, channels]``."""
        return self.targets[0]

    @property
    def expected(self) -> F64:
        """What was expected, ``float64[tokens, channels]``."""
        return self.expected_values[0]

    @property
    def positions(self) -> I64:
        """Position of each of `tokens` in its sequence."""
        return self.batch.positions[self.tokens]

    @cached_property
    def residual(self) -> F64:
        """What was found less what was expected, zero where a value does not count."""
        return np.where(self.masks[0], self.target - self.expected, 0.0)

    def error(self, predicted: NDArray[Any] | Sequence[NDArray[Any]]) -> float:
        """Energy of what was found less a prediction; infinite where the prediction is not finite."""
        values = predicted if isinstance(predicted, list | tuple) else [predicted]
        total = 0.0
        with np.errstate(invalid="ignore", over="ignore"):
            for mask, target, value in zip(self.masks, self.targets, values, strict=True):
                difference = np.where(mask, target - value, 0.0)
                total += float(np.sum(difference * difference))
        return total if np.isfinite(total) else float("inf")

    def nmse(self, energy: float) -> float:
        """An error energy over that of the signal."""
        return Energies(self.signal, 0.0, 0.0, 0.0).nmse(energy)

    def energies(self, candidate: Candidate) -> Energies:
        """Energies over what a candidate speaks of."""
        tokens, channels = candidate.tokens, candidate.channels
        if tokens is None and channels is None:
            return Energies(self.signal, self.before, self.error(candidate.predicted), self.floor)
        here = np.ix_(
            np.arange(self.tokens.size) if tokens is None else tokens,
            np.arange(self.target.shape[1]) if channels is None else channels,
        )
        mask = self.masks[0][here]
        target, expected = self.target[here], self.expected[here]
        with np.errstate(invalid="ignore", over="ignore"):
            signal, before, left = (
                float(np.sum(np.where(mask, value, 0.0) ** 2))
                for value in (expected, target - expected, target - np.asarray(candidate.predicted))
            )
        floor = SMALLEST_NOISE * signal
        if self.signal_per_channel.sum() and channels is not None:
            share = float(self.floor_per_channel[channels].sum()) * mask.shape[0] / self.tokens.size
            floor = max(floor, share)
        elif tokens is not None:
            floor = max(floor, float(self.floor_per_token[tokens].sum()))
        return Energies(signal, before, left if np.isfinite(left) else float("inf"), floor)

    @cached_property
    def signal_per_channel(self) -> F64:
        """Energy of what was expected of each channel, ``float64[channels]``."""
        value = np.where(self.masks[0], self.expected, 0.0)
        return np.asarray(np.sum(value * value, axis=0))

    @cached_property
    def floor_per_channel(self) -> F64:
        """Noise energy of each channel over the tokens that are looked at."""
        least = SMALLEST_NOISE * self.signal_per_channel
        spread = self.op.predicted.get(self.context.component)
        if spread is None or np.size(spread.per_channel) != least.size:
            return least
        share = self.tokens.size / self.batch.n_tokens
        return np.maximum(least, share * np.nan_to_num(np.asarray(spread.per_channel, np.float64)))

    @cached_property
    def floor_per_token(self) -> F64:
        """Noise energy of each token that is looked at."""
        value = np.where(self.masks[0], self.expected, 0.0)
        least = SMALLEST_NOISE * np.sum(value * value, axis=1)
        spread = self.op.predicted.get(self.context.component)
        if spread is None or self.ragged:
            return least
        kept = np.asarray(spread.per_token, np.float64)[self.tokens]
        return np.maximum(least, np.nan_to_num(kept))

    def has(self, tap: str, layer: int | None = None) -> bool:
        """Whether a tap can be had: from the op's inputs or from the trace."""
        layer = self.op.layer if layer is None else layer
        return (layer == self.op.layer and tap in self.op.inputs) or self.context.trace.has(layer, tap)

    def value(self, tap: str, layer: int | None = None) -> F32:
        """A tap of `tokens`, ``float32[tokens, channels]``; the op's own inputs come first."""
        layer = self.op.layer if layer is None else layer
        if layer == self.op.layer and tap in self.op.inputs:
            found = self.op.inputs[tap]
            assert not isinstance(found, list)
        else:
            found = self.context.trace.tap(layer, tap)
        return np.ascontiguousarray(np.asarray(found, np.float32)[self.tokens])

    def ragged_value(self, tap: str) -> list[F32]:
        """A ragged tap of the op's layer, of `sequences`."""
        if tap in self.op.inputs:
            found = self.op.inputs[tap]
            assert isinstance(found, list)
        else:
            found = self.context.trace.ragged(self.op.layer, tap)
        return [np.asarray(found[s], np.float32) for s in self.sequences]

    def part(self, tap: str, site: str) -> F32:
        """The part ``q``, ``k`` or ``v`` of a tap that holds them side by side."""
        q = self.config.num_heads * self.config.head_dim
        kv = self.config.num_kv_heads * self.config.head_dim
        left, right = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[site]
        value = self.value(tap)
        # A replay of one part may give that part alone.
        return value if value.shape[1] == right - left else np.ascontiguousarray(value[:, left:right])

    def weight(self, name: str, rows: I64 | None = None, *, artifact: Artifact | None = None) -> F32:
        """A weight in canonical row order, as the op reads it, ``float32[rows, columns]``.

        Args:
            name: canonical name.
            rows: canonical rows, or None for all.
            artifact: whose; None for the one that is taken to be right.
        """
        from driftscope.kernels.dequantize import dequantize

        ref = (artifact or self.artifact).tensors[name]
        raw, order = ref.raw(), ref.row_order()
        if rows is not None:
            raw = raw[rows if order is None else order[rows]]
        elif order is not None:
            raw = raw[order]
        values = dequantize(np.ascontiguousarray(raw), ref.dtype, threads=self.context.threads)
        return round_to(values, self.dtype)

    def has_tensor(self, name: str, artifact: Artifact | None = None) -> bool:
        """Whether there is such a weight."""
        return name in (artifact or self.artifact).tensors

    def vector(self, name: str) -> F32:
        """A norm weight or a bias, ``float32[n]``."""
        return self.weight(name).reshape(-1)

    def norm_weight(self, name: str) -> F64:
        """What a norm multiplies by: its weight plus the model's offset, ``float64[n]``."""
        missing = self.config.norm_offset - self.artifact.tensors[name].value_offset
        return self.vector(name).astype(np.float64) + missing

    def activation(self, x: F32, name: str, site: str) -> F32:
        """An activation as the product with a weight of this artifact sees it: rounded, if the engine is."""
        from driftscope.kernels.activations import quantize_activation
        from driftscope.kernels.formats import format_of

        if not self.is_engine:
            return x
        choice: Choice = self.context.declared.policy.choice(self.op.layer, site)
        kind = choice.activation
        if kind is None:
            kind = (
                format_of(self.artifact.tensors[name].dtype).activation
                if choice.path == "int8-dot"
                else "none"
            )
        return x if kind == "none" else quantize_activation(x, kind).dequantize()

    @property
    def dtype(self) -> str:
        """What the engine rounds weights and outputs to; ``f32`` where the artifact is at fault."""
        return self.context.declared.dtype if self.is_engine else "f32"

    def output(self, y: F32) -> F32:
        """An output as the op gives it: rounded to the engine's dtype."""
        return round_to(y, self.dtype)

    def _kept(self, value: Any) -> list[F64]:
        if isinstance(value, list | tuple):
            return [np.asarray(value[s], np.float64) for s in self.sequences]
        return [np.asarray(value, np.float64)[self.tokens]]

    def _mask(self, target: F64, expected: F64) -> NDArray[np.bool_]:
        mask = np.isfinite(target) & np.isfinite(expected)
        if self.op.tap == "attn_scores":
            length = target.shape[0]
            past = np.tri(length, dtype=np.bool_)
            mask &= np.tile(past, target.shape[1] // length)
        return mask


def rounded(value: float) -> float:
    """A figure to four digits: what is left of a sum does not hang on the host's order of adding."""
    return float(f"{float(value):.4g}")


def figure(value: float) -> str:
    """A figure as it stands in a sentence."""
    return f"{float(value):.3g}"


def _energy(values: Any) -> float:
    return float(sum(float(np.sum(value * value)) for value in values))


def _error_per_token(found: Any, wanted: Any) -> F64:
    pairs = zip(found, wanted, strict=True) if isinstance(found, list | tuple) else [(found, wanted)]
    rows = []
    with np.errstate(invalid="ignore", over="ignore"):
        for a, b in pairs:
            difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
            error = np.sum(np.where(np.isfinite(difference), difference * difference, 0.0), axis=1)
            # A token with a value that is not finite is looked at first.
            rows.append(np.where(np.isfinite(np.asarray(a)).all(axis=1), error, np.inf))
    return np.concatenate(rows)


def _chosen_tokens(channels: int, errors: F64) -> I64:
    most = max(16, LARGEST_VALUES // max(1, channels))
    if errors.size <= most:
        return np.arange(errors.size)
    worst = np.argsort(-errors, kind="stable")[: most // 2]
    spread = np.linspace(0, errors.size - 1, most - worst.size).astype(np.int64)
    return np.unique(np.concatenate([worst, spread]))


def _chosen_sequences(batch: TokenBatch, heads: int, errors: F64) -> tuple[int, ...]:
    sizes = [heads * (part.stop - part.start) ** 2 for part in batch.slices]
    worst = [float(errors[part].sum()) for part in batch.slices]
    chosen: list[int] = []
    for s in sorted(range(len(sizes)), key=lambda s: (-worst[s], s)):
        if not chosen or sum(sizes[c] for c in chosen) + sizes[s] <= LARGEST_VALUES // 4:
            chosen.append(s)
    return tuple(sorted(chosen))
