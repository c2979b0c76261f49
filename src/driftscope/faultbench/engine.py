"""Faults of an engine: passes over the right model that do one op wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.faultbench.edited import values_of
from driftscope.faultbench.injection import (
    Injection,
    Site,
    Spot,
    from_the_start,
    outside,
    within,
)
from driftscope.faultbench.weights import no_bias, no_group, not_square, stored_as, tensor
from driftscope.forward.architecture import score_scale, site_shape, site_tensor
from driftscope.forward.arithmetic import round_to
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.forward.taps import TapConsumer
from driftscope.kernels.forward import to_f16
from driftscope.kernels.matmul import matmul_f32

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

POSITIONS_BEHIND = 5
SCORE_CAP, LOGIT_CAP = 5.0, 10.0


class FaultyPass(ForwardPass):
    """A pass that is wrong in one layer, or in all of them.

    Attributes:
        site: the model.
        everywhere: whether every layer has the fault, or only the site's.
        batch: the tokens that are being run.
    """

    def __init__(self, site: Site, *, everywhere: bool = False, threads: int = 1) -> None:
        role = site.arithmetic.policy.base.artifact
        super().__init__({role: site.artifact}, site.arithmetic.policy, threads=threads)
        self.site = site
        self.everywhere = everywhere
        self.batch: TokenBatch

    def embed(self, batch: TokenBatch, tap: TapConsumer | None = None) -> F32:
        self.batch = batch
        return super().embed(batch, tap)

    def hit(self, layer: int) -> bool:
        """Whether the fault is in a layer."""
        return self.everywhere or layer == self.site.layer

    def _of_heads(self, layer: int, site: str, y: F32) -> F32:
        """What RoPE turns: q or k after the norm of each head, where there is one."""
        return self._norm(y, layer, f"{site}_post_rope", self.config.head_dim) if self.config.qk_norm else y


class StepwisePass(FaultyPass):
    """A pass whose attention goes through its own scores, softmax and weighted sum.

    Sound, it gives the bits of the fused one but for the sign of zeros.
    """

    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        if not self.hit(layer):
            return super().attend(layer, q, k, v, batch)
        rows = []
        for tokens in batch.slices:
            weights = self.softmax(layer, self.scores(layer, q[tokens], k[tokens]))
            rows.append(self.weigh(layer, weights, v[tokens]))
        return np.concatenate(rows)

    def _bare_scores(self, layer: int, q: F32, k: F32) -> F32:
        """Scores of one sequence, scaled, before a cap."""
        found: F32 = self.kernels.attention_scores(
            q,
            k,
            n_heads=self.config.num_heads,
            n_kv_heads=self.config.num_kv_heads,
            kv_type=self.policy.kv_type,
            scale=score_scale(self.config),
        )
        return found

    def _capped(self, scores: F32) -> F32:
        """Scores under the model's own cap."""
        cap = self.config.attention_softcap
        return capped(scores, cap) if cap else scores


class InterleavedPairs(FaultyPass):
    """RoPE turns neighbouring channels instead of the two halves."""

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        if not self.hit(layer):
            return super().turned(layer, site, y, batch)
        return self._turn(layer, self._of_heads(layer, site, y), batch, interleaved=True)


class OtherPositions(FaultyPass):
    """RoPE at other positions than the tokens'."""

    def __init__(self, site: Site, sites: str, moved: Callable[[I64], NDArray[Any]]) -> None:
        super().__init__(site, everywhere=True)
        self.sites, self.moved = sites, moved

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        if site not in self.sites:
            return super().turned(layer, site, y, batch)
        positions = self.moved(batch.positions).astype(np.int64)
        return self._turn(layer, self._of_heads(layer, site, y), batch, positions=positions)


class NoBias(FaultyPass):
    """The biases of q, k and v are not added."""

    def biased(self, layer: int, site: str, y: F32) -> F32:
        return y if self.hit(layer) else super().biased(layer, site, y)


class Transposed(FaultyPass):
    """A weight is read column by column: the bytes of W, taken for its transpose's."""

    def __init__(self, site: Site, which: str) -> None:
        super().__init__(site)
        self.which = which

    def project(self, layer: int, site: str, x: F32) -> F32:
        if site != self.which or (layer != WHOLE_MODEL and not self.hit(layer)):
            return super().project(layer, site, x)
        values = values_of(self.site.artifact, site_tensor(self.config, layer, site))
        rows, columns = site_shape(self.config, site)
        return matmul_f32(self._rounded(layer, site, x), values.reshape(columns, rows).T.copy())

    def _rounded(self, layer: int, site: str, x: F32) -> F32:
        choice = self.policy.choice(layer, site)
        name = site_tensor(self.config, layer, site)
        fmt = self._weights[choice.artifact].activation_format(name, choice)
        if fmt == "none":
            return x
        rounded: F32 = self.kernels.quantize_activation(x, fmt).dequantize()
        return rounded


class SkippedLayer(FaultyPass):
    """One layer is not run, and leaves no taps."""

    def run_layers(self, hidden: F32, batch: TokenBatch, layers: Any, tap: TapConsumer | None = None) -> F32:
        run = [layer for layer in layers if layer != self.site.layer]
        return super().run_layers(hidden, batch, run, tap)


class TiledHeads(StepwisePass):
    """Query head h reads key head h modulo their number, instead of h over the group's size."""

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        if not self.hit(layer):
            return super().scores(layer, q, k)
        order, back = self._orders()
        heads = self.config.num_heads
        moved = q.reshape(q.shape[0], heads, -1)[:, order].reshape(q.shape)
        found = super().scores(layer, moved, k)
        return np.ascontiguousarray(found.reshape(q.shape[0], heads, -1)[:, back].reshape(found.shape))

    def weigh(self, layer: int, weights: F32, v: F32) -> F32:
        if not self.hit(layer):
            return super().weigh(layer, weights, v)
        order, back = self._orders()
        heads, length = self.config.num_heads, v.shape[0]
        moved = weights.reshape(length, heads, length)[:, order].reshape(weights.shape)
        found = super().weigh(layer, moved, v)
        return np.ascontiguousarray(found.reshape(length, heads, -1)[:, back].reshape(found.shape))

    def _orders(self) -> tuple[I64, I64]:
        """Heads sorted by the key head that they are given, and the inverse."""
        order = np.argsort(np.arange(self.config.num_heads) % self.config.num_kv_heads, kind="stable")
        return order, np.argsort(order, kind="stable")


class OtherScores(StepwisePass):
    """Attention scores put through a function before the mask, and before the model's own cap."""

    def __init__(self, site: Site, change: Callable[[F32], F32], *, everywhere: bool = True) -> None:
        super().__init__(site, everywhere=everywhere)
        self.change = change

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        if not self.hit(layer):
            return super().scores(layer, q, k)
        return self._capped(self.change(self._bare_scores(layer, q, k)))


class HalfScores(StepwisePass):
    """Attention scores summed in float16, channel by channel."""

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        if not self.hit(layer):
            return super().scores(layer, q, k)
        heads, groups, length = self.config.num_heads, self.config.num_kv_heads, q.shape[0]
        queries = q.reshape(length, heads, -1).astype(np.float16)
        keys = np.repeat(k.reshape(length, groups, -1), heads // groups, axis=1).astype(np.float16)
        total = np.zeros((length, heads, length), dtype=np.float16)
        for channel in range(queries.shape[2]):
            total += queries[:, :, channel, None] * keys[:, :, channel].T[None]
        scaled = total.astype(np.float32) * np.float32(score_scale(self.config))
        return self._capped(scaled.reshape(length, -1))


class OtherMask(StepwisePass):
    """Each query sees so many keys that come after it."""

    ahead = 1

    def softmax(self, layer: int, scores: F32) -> F32:
        if not self.hit(layer):
            return super().softmax(layer, scores)
        length, window = scores.shape[0], self.config.window_of(layer)
        query, key = np.indices((length, length))
        seen = key <= query + self.ahead
        if window:
            seen &= key > query - window
        values = scores.reshape(length, self.config.num_heads, length).astype(np.float64)
        values = np.where(seen[:, None], values, -np.inf)
        weights = np.exp(values - values.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        return weights.astype(np.float32).reshape(scores.shape)


class OtherActivation(FaultyPass):
    """Another function than SiLU."""

    def __init__(self, site: Site, function: Callable[[F32], F32]) -> None:
        super().__init__(site, everywhere=True)
        self.function = function

    def activated(self, layer: int, gate: F32) -> F32:
        return self.function(gate)


class ScaledOutput(FaultyPass):
    """The output of one op times a constant, as a multiplier of other architectures does it."""

    def __init__(self, site: Site, tap: str, factor: float) -> None:
        super().__init__(site, everywhere=True)
        self.tap, self.factor = tap, np.float32(factor)

    def embedding(self, batch: TokenBatch) -> F32:
        found = super().embedding(batch)
        return found * self.factor if self.tap == "embedding" else found

    def project(self, layer: int, site: str, x: F32) -> F32:
        found = super().project(layer, site, x)
        return (
            found * self.factor if (self.tap, site) in (("attn_out", "o"), ("lm_head", "lm_head")) else found
        )


class CappedLogits(FaultyPass):
    """Logits under a soft cap that the model does not have."""

    def logits(self, x: F32) -> F32:
        return capped(super().logits(x), LOGIT_CAP)


class HalfDown(FaultyPass):
    """``down_proj`` multiplied in float16: inputs, products and sums."""

    def project(self, layer: int, site: str, x: F32) -> F32:
        if site != "down" or not self.hit(layer):
            return super().project(layer, site, x)
        values = values_of(self.site.artifact, tensor(layer, "down"))
        with np.errstate(over="ignore", invalid="ignore"):
            return to_f16(matmul_f32(to_f16(x), to_f16(values)))


class HalfBlockSum(FaultyPass):
    """``down_proj`` as an integer product with q8_1, whose float16 sum of a block overflows."""

    def project(self, layer: int, site: str, x: F32) -> F32:
        if site != "down" or not self.hit(layer):
            return super().project(layer, site, x)
        name = tensor(layer, "down")
        ref = self.site.artifact.tensors[name]
        found: F32 = self.kernels.matmul_quantized(x, ref.raw(), ref.dtype, activation="q8_1")
        return found


class FewRows(FaultyPass):
    """``down_proj`` leaves the last block of channels out of its sums where there are two or three rows."""

    def project(self, layer: int, site: str, x: F32) -> F32:
        found = super().project(layer, site, x)
        if site != "down":
            return found
        short = x.copy()
        for tokens in self.batch.slices:
            if tokens.stop - tokens.start in (2, 3):
                short[tokens, -32:] = 0.0
        rows = np.flatnonzero((short != x).any(axis=1))
        if rows.size:
            found = found.copy()
            found[rows] = super().project(layer, site, short[rows])
        return found


class ShiftedGate(FaultyPass):
    """The activated gate of each channel times the value of the next one."""

    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        if not self.hit(layer):
            return super().gated(layer, activated, up)
        return super().gated(layer, activated, np.roll(up, -1, axis=1))


class LastBits(FaultyPass):
    """No fault: a last bit of the residual stream is up, down or as it was, by seeded chance."""

    def add(self, layer: int, tap: str, residual: F32, x: F32) -> F32:
        total = super().add(layer, tap, residual, x)
        random = np.random.Generator(np.random.Philox([layer, len(tap)]))
        steps = random.integers(-1, 2, size=total.shape).astype(np.float32)
        return total * (np.float32(1) + steps * np.finfo(np.float32).eps)


class OtherResidual(FaultyPass):
    """The residual stream is added so many times."""

    def __init__(self, site: Site, tap: str, times: int) -> None:
        super().__init__(site)
        self.tap, self.times = tap, np.float32(times)

    def add(self, layer: int, tap: str, residual: F32, x: F32) -> F32:
        if tap != self.tap or not self.hit(layer):
            return super().add(layer, tap, residual, x)
        return super().add(layer, tap, residual * self.times, x)


def rounded_to_bf16(positions: I64) -> NDArray[Any]:
    """Positions as bf16 holds them: exact up to 256."""
    return round_to(positions.astype(np.float32), "bf16")


def capped(x: F32, cap: float) -> F32:
    """``cap * tanh(x / cap)``."""
    return (cap * np.tanh(x.astype(np.float64) / cap)).astype(np.float32)


def gelu_erf(x: F32) -> F32:
    """``x * Phi(x)`` with the normal distribution's own function."""
    from scipy.special import ndtr

    wide = x.astype(np.float64)
    return (wide * ndtr(wide)).astype(np.float32)


def quick_gelu(x: F32) -> F32:
    """``x * sigmoid(1.702 x)``."""
    wide = x.astype(np.float64)
    return (wide / (1.0 + np.exp(-1.702 * wide))).astype(np.float32)


def silu(x: F32) -> F32:
    """``x * sigmoid(x)``."""
    from driftscope.kernels.forward import silu as of_the_pass

    return of_the_pass(x)


def gelu_tanh(x: F32) -> F32:
    """GELU by its tanh formula."""
    from driftscope.kernels.forward import gelu

    return gelu(x)


def scaled_scores(power: float) -> Callable[[Site], ForwardPass]:
    """Scores whose scale is the model's to another power."""
    return lambda site: OtherScores(site, lambda x: x * np.float32(score_scale(site.config) ** (power - 1.0)))


def doubled_scores(site: Site) -> ForwardPass:
    """Scores twice as large."""
    return OtherScores(site, lambda x: x * np.float32(2))


def capped_scores(site: Site) -> ForwardPass:
    """Scores under a soft cap that the model does not have."""
    return OtherScores(site, lambda x: capped(x, SCORE_CAP))


def not_q4_1(site: Site) -> str | None:
    """Why the sum of a q8_1 block is not formed."""
    return stored_as("down", ("Q4_1", "Q5_1"))(site)


def caps_scores(site: Site) -> str | None:
    """Why scores cannot be capped."""
    return "the model has a cap of its own" if site.config.attention_softcap else None


def caps_logits(site: Site) -> str | None:
    """Why logits cannot be capped."""
    return "the model has a cap of its own" if site.config.logit_softcap else None


def is_gelu(site: Site) -> str | None:
    """Why GELU is no fault."""
    return "it is the model's own function" if site.config.activation == "gelu_tanh" else None


def next_norm(site: Site) -> Spot:
    """What reads the output of the site's layer."""
    if site.layer == site.config.num_layers - 1:
        return Spot(WHOLE_MODEL, "final_norm")
    return Spot(site.layer + 1, "attn_norm")


def last_layer_not_run(site: Site) -> ForwardPass:
    """A pass without the last layer."""
    return SkippedLayer(_at(site, site.config.num_layers - 1))


def after_the_last(site: Site) -> Spot:
    """What reads the output of the last layer."""
    return Spot(WHOLE_MODEL, "final_norm")


def _at(site: Site, layer: int) -> Site:
    return Site(site.artifact, site.teacher, site.arithmetic, layer)


_E = "engine"
# A constant factor of an output may be one of its weight: no trace can tell.
_SCALED = ("output-scale", "scale-dropped")

INJECTIONS = (
    Injection(
        "F03",
        "interleaved-everywhere",
        _E,
        "RoPE turns neighbouring channels in every layer",
        from_the_start("q_post_rope"),
        ("rope-pairing",),
        engine=lambda site: InterleavedPairs(site, everywhere=True),
    ),
    Injection(
        "F03",
        "interleaved-in-a-layer",
        _E,
        "RoPE turns neighbouring channels in one layer",
        within("q_post_rope"),
        ("rope-pairing",),
        engine=InterleavedPairs,
        regimes=("short",),
    ),
    Injection(
        "F05",
        "bias-not-added",
        _E,
        "the biases of q, k and v are not added",
        from_the_start("qkv_bias", "q"),
        ("bias-dropped",),
        unless=no_bias,
        engine=lambda site: NoBias(site, everywhere=True),
    ),
    Injection(
        "F09",
        "o-read-transposed",
        _E,
        "o_proj read column by column",
        within("attn_out"),
        ("transposed",),
        engine=lambda site: Transposed(site, "o"),
    ),
    Injection(
        "F09",
        "q-read-transposed",
        _E,
        "q_proj read column by column",
        within("qkv_matmul", "q"),
        ("transposed",),
        engine=lambda site: Transposed(site, "q"),
        unless=not_square("q"),
    ),
    Injection(
        "F10",
        "last-layer",
        _E,
        "the last layer is not run",
        after_the_last,
        ("layer-skipped",),
        engine=last_layer_not_run,
    ),
    Injection(
        "F10",
        "a-layer",
        _E,
        "a layer is not run",
        next_norm,
        ("layer-skipped",),
        engine=SkippedLayer,
        regimes=("short",),
    ),
    Injection(
        "F15",
        "bf16-positions",
        _E,
        "positions rounded to bf16 before the angle",
        from_the_start("q_post_rope"),
        ("rope-precision",),
        engine=lambda site: OtherPositions(site, "qk", rounded_to_bf16),
    ),
    Injection(
        "F17",
        "tiled",
        _E,
        "query heads take the key heads in turn instead of in groups",
        within("attn_scores"),
        ("head-mapping",),
        unless=no_group,
        engine=TiledHeads,
    ),
    Injection(
        "F18",
        "scores-capped",
        _E,
        f"attention scores under a soft cap of {SCORE_CAP:g}",
        from_the_start("attn_scores"),
        ("soft-cap",),
        unless=caps_scores,
        engine=capped_scores,
    ),
    Injection(
        "F18",
        "logits-capped",
        _E,
        f"logits under a soft cap of {LOGIT_CAP:g}",
        outside("lm_head"),
        ("soft-cap",),
        unless=caps_logits,
        engine=CappedLogits,
        regimes=("short",),
    ),
    Injection(
        "F21",
        "half-scores",
        _E,
        "attention scores summed in float16",
        within("attn_scores"),
        ("score-precision",),
        engine=HalfScores,
    ),
    Injection(
        "F22",
        "scores-doubled",
        _E,
        "attention scores twice as large",
        from_the_start("attn_scores"),
        ("score-scale",),
        engine=doubled_scores,
    ),
    Injection(
        "F22",
        "scale-squared",
        _E,
        "the scale of the attention scores squared",
        from_the_start("attn_scores"),
        ("score-scale",),
        engine=scaled_scores(2.0),
        regimes=("short",),
    ),
    Injection(
        "F22",
        "scale-missing",
        _E,
        "attention scores not scaled",
        from_the_start("attn_scores"),
        ("score-scale",),
        engine=scaled_scores(0.0),
        regimes=("short",),
    ),
    Injection(
        "F23",
        "gelu-tanh",
        _E,
        "GELU (tanh) in SiLU's place",
        from_the_start("ffn_silu"),
        ("activation-function",),
        unless=is_gelu,
        engine=lambda site: OtherActivation(site, gelu_tanh),
    ),
    Injection(
        "F23",
        "gelu-erf",
        _E,
        "GELU (erf) in SiLU's place",
        from_the_start("ffn_silu"),
        ("activation-function",),
        engine=lambda site: OtherActivation(site, gelu_erf),
        regimes=("short",),
    ),
    Injection(
        "F23",
        "quick-gelu",
        _E,
        "x sigmoid(1.702 x) in SiLU's place",
        from_the_start("ffn_silu"),
        ("activation-function",),
        engine=lambda site: OtherActivation(site, quick_gelu),
        regimes=("short",),
    ),
    Injection(
        "F24",
        "embedding-multiplied",
        _E,
        "embedding times the root of hidden_size",
        outside("embedding"),
        _SCALED,
        engine=lambda site: ScaledOutput(site, "embedding", site.config.hidden_size**0.5),
        regimes=("short",),
    ),
    Injection(
        "F24",
        "attention-output-multiplied",
        _E,
        "output of the attention block times 0.22",
        from_the_start("attn_out"),
        _SCALED,
        engine=lambda site: ScaledOutput(site, "attn_out", 0.22),
    ),
    Injection(
        "F24",
        "logits-multiplied",
        _E,
        "logits times 0.125",
        outside("lm_head"),
        _SCALED,
        engine=lambda site: ScaledOutput(site, "lm_head", 0.125),
    ),
    Injection(
        "F25",
        "half-down",
        _E,
        "down_proj of one layer in float16, with inputs beyond 65504",
        within("ffn_out"),
        ("f16-overflow",),
        engine=HalfDown,
        models=("qwen2-massive",),
    ),
    Injection(
        "F26",
        "half-block-sum",
        _E,
        "the float16 sum of a q8_1 block overflows in down_proj of one layer",
        within("ffn_out"),
        ("f16-overflow",),
        unless=not_q4_1,
        engine=HalfBlockSum,
        models=("qwen2-massive",),
    ),
    Injection(
        "F27",
        "two-or-three-rows",
        _E,
        "down_proj leaves 32 channels out where there are 2 or 3 rows",
        from_the_start("ffn_out"),
        ("row-count",),
        engine=FewRows,
    ),
    Injection(
        "F28",
        "keys-five-late",
        _E,
        "keys turned as if they stood five positions later",
        from_the_start("k_post_rope"),
        ("position-shift",),
        engine=lambda site: OtherPositions(site, "k", lambda p: p + POSITIONS_BEHIND),
    ),
    Injection(
        "F29",
        "one-key-ahead",
        _E,
        "each query sees one key that comes after it",
        from_the_start("attn_softmax"),
        ("causal-mask",),
        engine=lambda site: OtherMask(site, everywhere=True),
    ),
    Injection(
        "F30",
        "head-read-transposed",
        _E,
        "the LM head read column by column",
        outside("lm_head"),
        ("transposed",),
        engine=lambda site: Transposed(site, "lm_head"),
    ),
    Injection(
        "F31",
        "shifted-by-one",
        _E,
        "the gate of each channel times the value of the next",
        within("ffn_swiglu"),
        ("swiglu-shift",),
        engine=ShiftedGate,
    ),
    Injection(
        "F32",
        "added-twice",
        _E,
        "the residual stream added twice after the attention",
        within("post_attn_residual"),
        ("residual",),
        engine=lambda site: OtherResidual(site, "post_attn_residual", 2),
    ),
    Injection(
        "F32",
        "not-added",
        _E,
        "the residual stream not added after the MLP",
        within("post_ffn_residual"),
        ("residual",),
        engine=lambda site: OtherResidual(site, "post_ffn_residual", 0),
    ),
)
"""What an engine can do wrongly with the right model."""
