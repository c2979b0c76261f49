"""How large an op's error may be expected to be: the yardstick that a replay measures with.

Everything here is an expectation of an error's energy (a sum of squares), from three sources.

Rounding. A value that is rounded to a significand of unit roundoff ``u`` (2^-24 for float32, 2^-11 for
float16, 2^-8 for bfloat16) is off by half a step at most, evenly (Widrow and Kollár, "Quantization Noise",
2008, chapter 12): ``step^2 / 12`` with ``step = 2 u 2^e``. Over significands that are spread evenly in the
logarithm, the energy of the error is ``2 ln 2 / 9 = 0.154`` times ``u^2`` times that of the values: `ROUND`.

Sums. A sum of K terms one after another is rounded K times, each time at the size that it has by then.
Terms of random signs make it a random walk that ends at the sum y: the expected energy after i of K steps is
``(i / K)^2 y^2 + (i / K) (1 - i / K) P`` with P the sum of the terms' squares (a Brownian bridge), so that
the roundings of the whole sum have the energy ``ROUND u^2 K (y^2 / 3 + P / 6)``; the statistical counterpart
of the bounds of Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019.

Quantization. An activation in a block of step d is off by ``d^2 / 12`` in the mean, a weight by what
`driftscope.kernels.expected_error` says. An error of energy ``e[t, k]`` in a factor of a product leaves
``sum over k of e[t, k] w[j, k]^2`` in output j of token t. The sums over all outputs of a token, and over all
tokens of an output, need the weight's column sums and its rows weighted alone
(`driftscope.kernels.weight_energy`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.artifacts.tensor import TensorRef
from driftscope.forward.architecture import norm_tensor, site_shape, site_tensor
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.rotary import Rotations, rotary_dim
from driftscope.forward.weights import Weights
from driftscope.kernels import float64
from driftscope.kernels.activations import QuantizedActivation, quantize_activation
from driftscope.kernels.formats import format_of
from driftscope.kernels.weight_energy import cell_energy_of_rows, weight_energy

F64 = NDArray[np.float64]

Tap: TypeAlias = "NDArray[Any] | list[NDArray[Any]]"
"""A tap as in `driftscope.forward.evaluate.Value`, in any float type."""

ROUND = 2.0 * math.log(2.0) / 9.0
"""Energy of rounding errors in units of ``u^2`` times the energy of the values."""

UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Unit roundoff of a type."""

COMPONENTS = ("engine", "arithmetic", "model")

_CAP_ROUNDINGS = 4
"""Roundings of a quotient, a hyperbolic tangent and a product, the tangent's to two of its steps."""

_LEAST = 1e-6
"""Part of the mean that each token and channel is expected to have at least."""

_ONE_FLIP = 0.02
"""Part of an activation's quantization error that few flips of it may come to."""

_NORMS = ("attn_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm", "final_norm")

_ENGINE_ROUNDINGS = {**dict.fromkeys(_NORMS, 4), "ffn_silu": 4}
"""Roundings an output of an op without a sum, in all; 1 where it is not listed."""

_NARROW_ROUNDINGS = {
    **dict.fromkeys(_NORMS, 2),
    "q_post_rope": 4,
    "k_post_rope": 4,
    "attn_scores": 2,
}
"""Roundings to a narrow dtype by which an engine may be off from one at the end of the op; 1 where it is not
listed. transformers rounds before the norm's weight, and scores before they are scaled; it rounds cosine,
sine and both products of RoPE, and each of the three steps of a cap."""

_SITES = {"attn_out": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_out": "down", "lm_head": "lm_head"}
_MATMUL_INPUT = {
    "qkv_matmul": "attn_norm",
    "attn_out": "attention",
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
    "ffn_out": "ffn_swiglu",
    "lm_head": "final_norm",
}


@dataclass(frozen=True)
class Spread:
    """An error's energy, summed two ways.

    Attributes:
        per_token: ``float64[n_tokens]``.
        per_channel: ``float64[channels]``; of ragged taps one number a head.
        by_sequence: ``float64[n_sequences, channels]``, `per_channel` of each sequence; None where it is
            taken to be divided as the tokens' energies are.
    """

    per_token: F64
    per_channel: F64
    by_sequence: F64 | None = None

    @classmethod
    def of(cls, per_token: F64, by_sequence: F64) -> Spread:
        """From the tokens' energies and the channels' of every sequence."""
        return cls(per_token, np.sum(by_sequence, axis=0), by_sequence)

    @classmethod
    def of_values(cls, energies: F64, batch: TokenBatch) -> Spread:
        """From the energies of single values, ``float64[n_tokens, channels]``."""
        return cls.of(np.sum(energies, axis=1), _grouped(energies, batch))

    @property
    def total(self) -> float:
        """The energy of all."""
        return float(np.sum(self.per_token))

    def __add__(self, other: Spread) -> Spread:
        both = None
        if self.by_sequence is not None and other.by_sequence is not None:
            both = self.by_sequence + other.by_sequence
        return Spread(self.per_token + other.per_token, self.per_channel + other.per_channel, both)

    def __mul__(self, factor: float) -> Spread:
        rows = None if self.by_sequence is None else self.by_sequence * factor
        return Spread(self.per_token * factor, self.per_channel * factor, rows)

    __rmul__ = __mul__

    def of_sequence(self, sequence: int, tokens: slice) -> tuple[F64, F64]:
        """Energies of the tokens and of the channels of one sequence."""
        per_token = self.per_token[tokens]
        if self.by_sequence is not None:
            return per_token, self.by_sequence[sequence]
        share = float(np.sum(per_token)) / self.total if self.total > 0 else 0.0
        return per_token, self.per_channel * share


def side_by_side(parts: Sequence[Spread]) -> Spread:
    """The spread of a tap that is put together from parts with all tokens and some channels each."""
    rows = [part.by_sequence for part in parts if part.by_sequence is not None]
    per_token = np.sum(np.stack([part.per_token for part in parts]), axis=0)
    if len(rows) < len(parts):
        return Spread(per_token, np.concatenate([part.per_channel for part in parts]))
    return Spread.of(per_token, np.concatenate(rows, axis=1))


def energy_of(value: Tap, batch: TokenBatch, *, heads: int = 1) -> Spread:
    """Energy of the finite values of a tap.

    Args:
        value: a tap; what is not finite counts as zero.
        batch: its tokens.
        heads: of a ragged tap, the number of heads.
    """
    if isinstance(value, list):
        each = [np.sum(_squares(part).reshape(part.shape[0], heads, -1), axis=2) for part in value]
        return Spread.of_values(np.concatenate(each), batch)
    return Spread.of_values(_squares(value), batch)


def _grouped(values: F64, batch: TokenBatch) -> F64:
    """Sums over the tokens of each sequence."""
    return np.stack([np.sum(values[tokens], axis=0) for tokens in batch.slices])


def _squares(values: NDArray[Any]) -> F64:
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(values.astype(np.float64))
    return np.where(np.isfinite(squares), squares, 0.0)


class Noise:
    """Predicts the errors of single ops."""

    def __init__(
        self,
        own: Artifact,
        arithmetic: Arithmetic,
        batch: TokenBatch,
        *,
        fused_attention: bool = False,
        table_gelu: bool = False,
        threads: int = 1,
    ) -> None:
        """Prepare.

        Args:
            own: the artifact that the trace was made with.
            arithmetic: the declared arithmetic.
            batch: the tokens.
            fused_attention: the engine sums attention block by block in a type as narrow as its values
                (llama.cpp's flash attention over a float16 cache).
            table_gelu: the engine looks GELU up by a float16, and has a float16 of it (llama.cpp).
            threads: number of threads; the result does not depend on it.
        """
        self._own = own
        self._config = own.config
        self._weights = Weights(own)
        self._arithmetic = arithmetic
        self._policy = arithmetic.policy
        self._batch = batch
        self._fused = fused_attention
        self._table_gelu = table_gelu
        self._threads = threads
        self._roundoff = UNIT["f32"] ** 2 * ROUND
        half = rotary_dim(own.config) // 2
        factors = self._weights.vector(ROPE_FREQS, half) if ROPE_FREQS in own.tensors else None
        self._rotations = Rotations(own.config, factors, exact=True)

    def predict(
        self,
        layer: int,
        tap: str,
        part: str,
        inputs: Mapping[str, Tap],
        output: Tap,
        components: Collection[str] = COMPONENTS,
        *,
        inherited: Mapping[str, Mapping[str, Spread]] = {},
    ) -> dict[str, Spread]:
        """Expected error energies of one op, by component.

        Args:
            layer: its layer, -1 for the whole model's.
            tap: its output.
            part: ``q``, ``k`` or ``v`` of a tap that has parts, else empty.
            inputs: by tap name, as the op used them.
            output: what it gave.
            components: which of `COMPONENTS` to predict.
            inherited: of inputs that were not recorded but recomputed, the errors that they are expected to
                have themselves.
        """
        energy = energy_of(output, self._batch, heads=self._config.num_heads)
        site = part if tap == "qkv_matmul" else _SITES.get(tap)
        if site:
            source = _MATMUL_INPUT[tap]
            lost = inherited.get(source, {}).get("engine")
            found = self._product(layer, site, inputs[source], energy, components, lost)
            if tap == "lm_head" and self._config.logit_softcap:
                found = {name: self._capped(spread, output, energy) for name, spread in found.items()}
        elif tap == "attn_scores":
            found = self._scores(inputs["q_post_rope"], inputs["k_post_rope"], output, energy)
        elif tap == "attn_softmax":
            found = self._softmax(inputs["attn_scores"], output)
        elif tap == "attention":
            values = self._slice(inputs["qkv_bias"], "v")
            of_weights = inherited.get("attn_softmax", {})
            found = self._weighted(inputs["attn_softmax"], values, output, energy, of_weights)
        else:
            found = self._elementwise(layer, tap, part, inputs, output, energy)
        unit = UNIT[self._arithmetic.dtype]
        if self._arithmetic.dtype != "f32":
            flips = _flips(found["engine"], energy, unit)
            rounding = ROUND * unit**2 * energy
            caps = {"attn_scores": self._config.attention_softcap, "lm_head": self._config.logit_softcap}
            roundings = _NARROW_ROUNDINGS.get(tap, 1) + (3 if caps.get(tap) else 0)
            found["engine"] = found["engine"] + flips + roundings * rounding
            found["arithmetic"] = found["arithmetic"] + rounding
        chosen = {name: found[name] for name in components}
        for name, spread in chosen.items():
            for source, errors in inherited.items():
                if name in errors and tap == "qkv_bias":
                    spread = spread + self._of_part(errors[name], part)
                elif name in errors and tap.endswith("residual"):
                    spread = spread + errors[name]
                elif name in errors and source != "attn_softmax":
                    spread = spread + self._passed_on(tap, source, errors[name], inputs, energy)
            chosen[name] = _at_least(spread)
        return chosen

    def _product(
        self,
        layer: int,
        site: str,
        x: Tap,
        energy: Spread,
        components: Collection[str],
        errors: Spread | None,
    ) -> dict[str, Spread]:
        """A product with a weight; `errors` are those of an activation that was recomputed."""
        assert not isinstance(x, list)
        choice = self._policy.choice(layer, site)
        ref = self._weights.tensor(site_tensor(self._config, layer, site), site_shape(self._config, site))
        fmt = self._weights.activation_format(ref.name, choice)
        step = _activation_errors(x, fmt)
        squares = _squares(x)
        factors = np.concatenate([_grouped(squares, self._batch), _grouped(step, self._batch)])
        count = self._batch.n_sequences
        layout = format_of(ref.dtype)
        blocks = choice.path == "int8-dot" and layout.is_integer and fmt.startswith(("q8", "apr"))
        shifts = _sub_block_energies(x, layout.sub_block) if blocks else None
        sums = weight_energy(
            *(_canonical(ref), ref.dtype, factors),
            cells="model" in components,
            shifts=None if shifts is None else _grouped(shifts, self._batch),
            threads=self._threads,
        )
        terms = Spread.of(_dot(squares, sums.columns), sums.rows[:count])
        parts, additions = terms, x.shape[1]
        if blocks:
            # Sums inside a block are exact integers.
            additions //= 32 if fmt.startswith(("q8_0", "q8_1")) else 256
        if shifts is not None:
            # Quants that are not negative and what is taken off again are summed apart: two sums of the
            # size of what is taken off.
            parts = terms + 2.0 * Spread.of(_dot(shifts, sums.shift_columns), sums.shift_rows)
        own = self._sum(additions, parts, energy) + self._roundoff * (2.0 if blocks else 1.0) * parts
        # Two sums in different orders: each is off by as much.
        engine = 2.0 * own
        quantized = Spread.of(_dot(step, sums.columns), sums.rows[count:])
        arithmetic = own + quantized
        if errors is not None:
            # An error d takes a quant to the next one with probability |d| / step, and is then a step.
            relative = _ratio(errors.per_token, np.sum(squares, axis=1))
            flips = math.sqrt(24 / math.pi) * np.sqrt(relative[:, None] * squares * step)
            engine = engine + self._shaped(_dot(flips, sums.columns), quantized)
            # Where they are few, one makes all: it is twelve times a value's mean error.
            engine = engine + _ONE_FLIP * quantized
        if ref.dtype.lower() != self._arithmetic.dtype and self._arithmetic.dtype != "f32":
            # Weights that are not stored in the dtype are rounded to it.
            arithmetic = arithmetic + ROUND * UNIT[self._arithmetic.dtype] ** 2 * terms
        stored = Spread.of(_dot(squares, sums.cell_columns), sums.cell_rows[:count])
        return {"engine": engine, "arithmetic": arithmetic, "model": stored + self._roundoff * terms}

    def _sum(self, additions: float, terms: Spread, energy: Spread) -> Spread:
        """Roundings of sums of random terms; see the module's description."""
        return self._roundoff * (additions * ((1 / 3) * energy + (1 / 6) * terms) + energy)

    def _capped(self, spread: Spread, logits: Tap, energy: Spread) -> Spread:
        """An error before a cap, behind it: less where the cap is near; and the roundings of the cap."""
        assert not isinstance(logits, list)
        assert spread.by_sequence is not None
        slopes = _cap_slopes(logits, self._config.logit_softcap)
        rows = _grouped(slopes, self._batch) / np.diff(self._batch.boundaries)[:, None]
        passed = Spread.of(spread.per_token * np.mean(slopes, axis=1), spread.by_sequence * rows)
        return passed + _CAP_ROUNDINGS * self._roundoff * energy

    def _scores(self, q: Tap, k: Tap, output: Tap, energy: Spread) -> dict[str, Spread]:
        assert not isinstance(q, list)
        assert not isinstance(k, list)
        heads, width = self._config.num_heads, self._config.head_dim
        group = heads // self._config.num_kv_heads
        q2 = _squares(q).reshape(q.shape[0], heads, width)
        k2 = np.repeat(_squares(k).reshape(k.shape[0], -1, width), group, axis=1)
        sums = np.concatenate([np.cumsum(k2[tokens], axis=0) for tokens in self._batch.slices])
        scale = self._config.attention_scale
        products = np.sum(q2 * sums, axis=2)
        terms = products / width if scale is None else products * scale**2
        cap = self._config.attention_softcap
        if cap:
            terms = terms * np.concatenate([_mean_slopes(part, heads, cap) for part in output])
        terms_of = Spread.of_values(terms, self._batch)
        engine = self._sum(width, terms_of, energy) + self._roundoff * terms_of
        if cap:
            engine = engine + _CAP_ROUNDINGS * self._roundoff * energy
        arithmetic = engine
        if self._policy.kv_type == "f16":
            arithmetic = engine + 2 * ROUND * UNIT["f16"] ** 2 * terms_of
        return {"engine": engine, "arithmetic": arithmetic, "model": engine}

    def _softmax(self, scores: Tap, output: Tap) -> dict[str, Spread]:
        """An exponential's relative error is its argument's absolute one: the score, less the largest."""
        heads = self._config.num_heads

        def weighed(part: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
            length = part.shape[0]
            s = part.astype(np.float64).reshape(length, heads, length)
            p = weights.astype(np.float64).reshape(length, heads, length)
            seen = p > 0
            with np.errstate(invalid="ignore", over="ignore"):
                largest = np.max(np.where(seen, s, -np.inf), axis=2, keepdims=True)
                size = np.where(seen, np.square(s - largest) + np.square(s), 0.0)
                return np.asarray(p * np.sqrt(3.0 + size)).reshape(length, -1)

        parts = [weighed(a, b) for a, b in zip(scores, output, strict=True)]
        engine = self._roundoff * energy_of(parts, self._batch, heads=heads)
        return {"engine": engine, "arithmetic": engine, "model": engine}

    def _weighted(
        self,
        weights: Tap,
        v: NDArray[Any],
        output: Tap,
        energy: Spread,
        errors: Mapping[str, Spread],
    ) -> dict[str, Spread]:
        """A weighted sum of values; `errors` are those of weights that were recomputed, by component."""
        assert not isinstance(output, list)
        heads, width = self._config.num_heads, self._config.head_dim
        group = heads // self._config.num_kv_heads
        v2 = np.repeat(_squares(v).reshape(v.shape[0], -1, width), group, axis=1)
        rows = []
        for part, tokens in zip(weights, self._batch.slices, strict=True):
            length = part.shape[0]
            p2 = _squares(part).reshape(length, heads, length)
            out = np.empty((length, heads, width))
            for head in range(heads):
                # Terms of an output: each value's square times its weight's.
                out[:, head] = float64.matmul(p2[:, head], np.ascontiguousarray(v2[tokens, head].T))
            rows.append(out.reshape(length, heads * width))
        terms = np.concatenate(rows)
        additions = (self._batch.positions + 1).astype(np.float64)[:, None]
        terms_of = Spread.of_values(terms, self._batch)
        sums = Spread.of_values((_squares(output) / 3 + terms / 6) * additions, self._batch)
        engine = self._roundoff * (sums + energy + terms_of)
        arithmetic = engine
        if self._policy.kv_type == "f16":
            arithmetic = engine + 2 * ROUND * UNIT["f16"] ** 2 * terms_of
            if self._fused:
                engine = engine + ROUND * UNIT["f16"] ** 2 * (sums + energy)
        found = {"engine": engine, "arithmetic": arithmetic, "model": engine}
        own = energy_of(weights, self._batch, heads=heads)
        for name, spread in errors.items():
            relative = self._by_head(spread, own)
            if name == "engine" and self._policy.kv_type == "f16":
                # A weight that changes by a last bit may round to the other neighbour in float16.
                relative = relative + np.sqrt(relative) * 2 * UNIT["f16"]
            passed = terms * np.repeat(relative, width, axis=1)
            found[name] = found[name] + Spread.of_values(passed, self._batch)
        return found

    def _by_head(self, errors: Spread, energy: Spread) -> F64:
        """Errors as parts of an energy, ``float64[n_tokens, heads]``: as each token's, as each head's."""
        relative = _ratio(errors.per_token, energy.per_token)[:, None]
        if errors.by_sequence is None or energy.by_sequence is None:
            return np.repeat(relative, self._config.num_heads, axis=1)
        heads = _ratio(errors.by_sequence, energy.by_sequence)
        pooled = _ratio(np.sum(errors.by_sequence, axis=1), np.sum(energy.by_sequence, axis=1))
        shape = _ratio(heads, np.broadcast_to(pooled[:, None], heads.shape))
        counts = np.diff(self._batch.boundaries)
        return np.asarray(relative * np.repeat(shape, counts, axis=0))

    def _elementwise(
        self, layer: int, tap: str, part: str, inputs: Mapping[str, Tap], output: Tap, energy: Spread
    ) -> dict[str, Spread]:
        """Ops without a long sum: roundings of their outputs."""
        engine = self._roundoff * _ENGINE_ROUNDINGS.get(tap, 1) * energy
        model = engine
        if tap in ("q_post_rope", "k_post_rope"):
            # What is rounded before the two of a pair are mixed lies in both.
            # What is turned is as large as what it becomes.
            before = output if self._config.post_norms else self._slice(inputs["qkv_bias"], tap[0])
            engine = self._roundoff * 3 * self._of_pairs(energy) + self._turns(layer, before)
            if self._config.qk_norm:
                engine = engine + 4 * self._roundoff * energy
            name = norm_tensor(self._config, layer, tap)
            stored = self._of_vector(name, energy, self._config.qk_norm)
            # Weights that an offset is added to lie about zero: what storing them leaves differs by decades
            # from channel to channel, and the turn mixes it.
            model = engine + (self._of_pairs(stored) if self._config.norm_offset else stored)
        elif tap in _NORMS:
            model = engine + self._of_vector(norm_tensor(self._config, layer, tap), energy)
        elif tap == "ffn_silu" and self._config.activation == "gelu_tanh":
            lost = self._gelu(inputs["ffn_gate"], output)
            return {"engine": engine + lost, "arithmetic": engine, "model": engine}
        elif tap == "qkv_bias" and self._config.attention_bias:
            name = site_tensor(self._config, layer, part).removesuffix("weight") + "bias"
            ref = self._own.tensors[name]
            cells = cell_energy_of_rows(ref.raw(), ref.dtype).reshape(-1)
            wide = np.broadcast_to(cells, (self._batch.n_tokens, cells.size))
            model = engine + Spread.of_values(wide, self._batch)
        elif tap == "embedding":
            ref = self._own.tensors["model.embed_tokens.weight"]
            cells = cell_energy_of_rows(np.ascontiguousarray(ref.raw()[self._batch.ids]), ref.dtype)
            model = engine + Spread.of_values(cells * self._config.embedding_scale**2, self._batch)
            if self._config.embedding_scale != 1:
                engine, model = engine + self._roundoff * energy, model + self._roundoff * energy
        return {"engine": engine, "arithmetic": engine, "model": model}

    def _gelu(self, gate: Tap, output: Tap) -> Spread:
        """What GELU loses beyond the roundings of its result.

        ``1 + tanh(u)`` cancels where u is far below zero: what is left is off by a rounding of 1, times half
        of the argument. A table adds the roundings of argument and result to its type.
        """
        assert not isinstance(gate, list)
        assert not isinstance(output, list)
        x2, y2 = _squares(gate), _squares(output)
        found = self._roundoff * x2 / 2
        if self._table_gelu:
            # The slope is 1.13 at most.
            slope = np.minimum(1.3, np.divide(y2, x2, out=np.ones_like(x2), where=x2 > 0) + 0.3 * (x2 < 9))
            found = found + ROUND * UNIT["f16"] ** 2 * (y2 + slope * x2)
        return Spread.of_values(found, self._batch)

    def _shaped(self, per_token: F64, like: Spread) -> Spread:
        """Energies of tokens, divided over the channels as another's are."""
        assert like.by_sequence is not None
        totals = _grouped(per_token[:, None], self._batch)
        return Spread.of(
            per_token, like.by_sequence * _ratio(totals, np.sum(like.by_sequence, axis=1, keepdims=True))
        )

    def _of_pairs(self, energy: Spread) -> Spread:
        """Half of the energy of a pair for each of its two channels; that of channels that stay, as it is."""
        assert energy.by_sequence is not None
        rows = energy.by_sequence
        mean, rest = self._mean_of_pairs(rows)
        return Spread.of(energy.per_token, np.concatenate([mean, mean, rest], axis=2).reshape(rows.shape))

    def _mean_of_pairs(self, rows: F64) -> tuple[F64, F64]:
        """Means of the two channels of each pair that turns, and the channels that do not, head by head."""
        half = rotary_dim(self._config) // 2
        heads = rows.reshape(rows.shape[0], -1, self._config.head_dim)
        pairs = heads[:, :, : 2 * half].reshape(*heads.shape[:2], 2, half)
        return np.mean(pairs, axis=2), heads[:, :, 2 * half :]

    def _of_vector(self, name: str, energy: Spread, present: bool = True) -> Spread:
        """What storing a norm's weights leaves: the relative error of each, or their mean over heads."""
        if not present:
            return 0.0 * energy
        ref = self._own.tensors[name]
        cells = cell_energy_of_rows(ref.raw(), ref.dtype).reshape(-1)
        values = np.square(self._weights.norm(name, cells.size).astype(np.float64))
        relative = np.divide(cells, values, out=np.zeros_like(cells), where=values > 0)
        assert energy.by_sequence is not None
        rows = energy.by_sequence * np.resize(relative, energy.per_channel.size)
        share = float(np.sum(rows)) / max(energy.total, 1e-300)
        return Spread.of(energy.per_token * share, rows)

    def _turns(self, layer: int, turned: Tap) -> Spread:
        """What the roundings of an angle leave.

        They are those of the frequency and of the product and, in engines that multiply their way from pair
        to pair, i times that of the ratio at pair i.
        """
        assert not isinstance(turned, list)
        frequencies = self._rotations.of_tokens(layer, self._batch)
        pairs = np.arange(frequencies.shape[1], dtype=np.float64)
        # An angle beyond a turn is wrong by a turn at most.
        angle = self._batch.positions[:, None] * frequencies
        error = np.minimum(np.square(angle) * self._roundoff * (2 + pairs + pairs * pairs), 2.0)
        mean, rest = self._mean_of_pairs(_squares(turned))
        each = mean * error[:, None, :]
        energies = np.concatenate([each, each, np.zeros_like(rest)], axis=2)
        return Spread.of_values(energies.reshape(turned.shape), self._batch)

    def _slice(self, qkv: Tap, site: str) -> NDArray[Any]:
        assert not isinstance(qkv, list)
        q, kv = (site_shape(self._config, name)[0] for name in ("q", "k"))
        left, right = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[site]
        return np.ascontiguousarray(qkv[:, left:right])

    def _of_part(self, errors: Spread, part: str) -> Spread:
        """The errors of q, k or v, of those of the three side by side."""
        assert errors.by_sequence is not None
        rows = self._slice(errors.by_sequence, part)
        totals = _ratio(np.sum(rows, axis=1), np.sum(errors.by_sequence, axis=1))
        return Spread.of(errors.per_token * np.repeat(totals, np.diff(self._batch.boundaries)), rows)

    def _passed_on(
        self, tap: str, source: str, errors: Spread, inputs: Mapping[str, Tap], energy: Spread
    ) -> Spread:
        """An error of an input, in the output: as large a part of it, token by token."""
        heads = self._config.num_heads
        relative = _ratio(errors.per_token, energy_of(inputs[source], self._batch, heads=heads).per_token)
        if tap == "attn_softmax":
            # Absolute errors of scores are relative ones of their exponentials.
            counts = heads * (self._batch.positions + 1).astype(np.float64)
            relative = errors.per_token / counts
        return self._shaped(energy.per_token * relative, energy)


def _cap_slopes(capped: NDArray[Any], cap: float | None) -> F64:
    """Squared slopes of a soft cap at what it gave."""
    assert cap
    return np.square(1.0 - np.minimum(_squares(capped) / cap**2, 1.0))


def _mean_slopes(scores: NDArray[Any], heads: int, cap: float) -> F64:
    """Mean squared slopes of a soft cap over the keys that a query may see, ``float64[t, heads]``."""
    length = scores.shape[0]
    slopes = _cap_slopes(scores, cap).reshape(length, heads, length)
    seen = np.tri(length)[:, None, :]
    return np.asarray(np.sum(slopes * seen, axis=2) / np.sum(seen, axis=2))


def _canonical(ref: TensorRef) -> NDArray[np.uint8]:
    raw, order = ref.raw(), ref.row_order()
    return raw if order is None else raw[order]


def _sub_block_energies(x: NDArray[Any], sub_block: int) -> F64:
    """Squared sums of the values of each sub-block."""
    return _squares(np.sum(x.astype(np.float64).reshape(x.shape[0], -1, sub_block), axis=2))


def _dot(rows: F64, columns: F64) -> F64:
    return np.asarray(np.sum(rows * columns, axis=1))


def _ratio(a: F64, b: F64) -> F64:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _at_least(spread: Spread) -> Spread:
    """No token and no channel is expected to be free of errors where others are not."""
    assert spread.by_sequence is not None
    means = np.mean(spread.by_sequence, axis=1, keepdims=True)
    return Spread.of(
        spread.per_token + _LEAST * np.mean(spread.per_token), spread.by_sequence + _LEAST * means
    )


def _flips(noise: Spread, energy: Spread, unit: float) -> Spread:
    """Energy of values that a small error takes to the other neighbour when they are rounded.

    An error d of a value of step s flips it with probability ``|d| / s``, and is then s: ``E|d| s``, with
    ``E|d| = sqrt(2 / pi) sigma`` of a Gaussian d, and s the roundoff's step at the value's size.
    """
    factor = math.sqrt(2 / math.pi) * math.sqrt(12 * ROUND) * unit

    def flipped(errors: F64, values: F64) -> F64:
        return np.asarray(factor * np.sqrt(errors * values))

    assert noise.by_sequence is not None
    assert energy.by_sequence is not None
    return Spread.of(
        flipped(noise.per_token, energy.per_token), flipped(noise.by_sequence, energy.by_sequence)
    )


def _activation_errors(x: NDArray[Any], fmt: str) -> F64:
    """Mean square error of each value of an activation that is rounded to a format, ``float64[n, k]``."""
    if fmt == "none":
        return np.zeros(x.shape)
    squares = _squares(x)
    if fmt in ("f16", "bf16"):
        return ROUND * UNIT[fmt] ** 2 * squares
    quantized = quantize_activation(np.asarray(x, np.float32), fmt)
    assert isinstance(quantized, QuantizedActivation)
    steps = _squares(quantized.d) / 12.0
    errors = np.repeat(steps, quantized.block_size, axis=1)
    if quantized.block_size == 32:
        # Its scale is rounded to float16 after it was used.
        errors = errors + ROUND * UNIT["f16"] ** 2 * squares
    return errors
