"""Engines that are right and yet not ours to the last bit: the noise that floors are calibrated on.

An engine that somebody else wrote sums in another order, fuses products with sums, has another exponential,
or multiplies by a reciprocal. `CleanEngine` does such things, in float32 and always in the same way, so that
a calibration needs no engine installed and gives the same bytes every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.forward.architecture import norm_tensor, score_scale, site_shape, site_tensor
from driftscope.forward.arithmetic import Arithmetic, round_to
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL, Choice
from driftscope.forward.rotary import rotary_dim, turns_locally
from driftscope.forward.weights import Weights
from driftscope.kernels.activations import quantize_activation
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import format_of
from driftscope.kernels.forward import rope_tables
from driftscope.kernels.matmul import matmul_quantized

F32 = NDArray[np.float32]

_CHUNK = 1 << 21
"""Products that are held at once."""


def sum_of_products(x: F32, w: F32, order: str) -> F32:
    """``x @ w.T`` in float32 in a given order.

    Args:
        x: ``float32[n, k]``.
        w: ``float32[rows, k]``.
        order: a key of `ORDERS`.

    Returns:
        ``float32[n, rows]``.
    """
    step = max(1, _CHUNK // max(1, w.size))
    parts = [ORDERS[order](x[i : i + step, None, :], w[None, :, :]) for i in range(0, x.shape[0], step)]
    return np.concatenate(parts) if parts else np.zeros((0, w.shape[0]), np.float32)


def _running(a: F32, b: F32) -> F32:
    """One product after the other, each rounded, each added."""
    total = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], np.float32)
    for i in range(a.shape[-1]):
        total += a[..., i] * b[..., i]
    return total


def _reversed(a: F32, b: F32) -> F32:
    """From the last product to the first."""
    return _running(a[..., ::-1], b[..., ::-1])


def _fused(a: F32, b: F32) -> F32:
    """Products that are not rounded before they are added (FMA)."""
    total = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], np.float32)
    for i in range(a.shape[-1]):
        # A product of two float32 is exact in float64, so one rounding is left, to a hair's breadth.
        total = (total + a[..., i].astype(np.float64) * b[..., i]).astype(np.float32)
    return total


def _pairwise(a: F32, b: F32) -> F32:
    """Neighbours, then neighbours of sums, and so on."""
    return _tree(a * b)


def _tree(terms: F32) -> F32:
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def _lanes(width: int, *, fused: bool) -> Callable[[F32, F32], F32]:
    """As many running sums as a vector register has lanes, added at the end."""

    def work(a: F32, b: F32) -> F32:
        total = np.zeros((*np.broadcast_shapes(a.shape, b.shape)[:-1], width), np.float32)
        for i in range(0, a.shape[-1], width):
            x, y = a[..., i : i + width], b[..., i : i + width]
            lanes = slice(0, x.shape[-1])
            if fused:
                total[..., lanes] = total[..., lanes] + x.astype(np.float64) * y
            else:
                total[..., lanes] += x * y
        return _tree(total)

    return work


def _blocks(a: F32, b: F32) -> F32:
    """Blocks of 64, each summed better than float32 can hold, then one after the other."""
    total = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], np.float32)
    for i in range(0, a.shape[-1], 64):
        exact = (a[..., i : i + 64].astype(np.float64) * b[..., i : i + 64]).sum(axis=-1)
        total += exact.astype(np.float32)
    return total


ORDERS: Mapping[str, Callable[[F32, F32], F32]] = {
    "running": _running,
    "reversed": _reversed,
    "fused": _fused,
    "pairwise": _pairwise,
    "lanes-8": _lanes(8, fused=False),
    "fused-lanes-8": _lanes(8, fused=True),
    "lanes-16": _lanes(16, fused=False),
    "fused-lanes-32": _lanes(32, fused=True),
    "blocks": _blocks,
}
"""Orders in which engines sum products."""


@dataclass(frozen=True)
class Habits:
    """What an engine does in its own way.

    Attributes:
        order: of sums, a key of `ORDERS`.
        blockwise: integer products are summed block by block, as they come; else weights and rounded
            activations are turned to float32 and multiplied there. Formats with a minimum of their own keep
            the sum of a block's activations apart, so they are always summed by blocks.
        own_exponential: exp as a float32 polynomial; else that of float64, rounded.
        reciprocal: multiplies by a reciprocal instead of dividing.
        powers: rotary frequencies as powers by repeated multiplication, as ggml forms them.
        online: attention divides by the sum of weights at the end, as flash attention does; not where
            weights are rounded before they are used.
        scale_first: the query is scaled before it meets the keys.
    """

    order: str = "running"
    blockwise: bool = True
    own_exponential: bool = False
    reciprocal: bool = False
    powers: bool = False
    online: bool = False
    scale_first: bool = False


class CleanEngine(ForwardPass):
    """A pass that does what the architecture says, by other habits than ours."""

    def __init__(self, artifact: Artifact, arithmetic: Arithmetic, habits: Habits, *, seed: int = 0) -> None:
        """Prepare the pass.

        Args:
            artifact: the model.
            arithmetic: what it computes in; weights must be stored in its dtype where that is not ``f32``.
            habits: what it does in its own way.
            seed: of the roundings that decoding an embedding row may add.
        """
        super().__init__({arithmetic.policy.base.artifact: artifact}, arithmetic.policy)
        self._artifact = artifact
        self._dtype = arithmetic.dtype
        self._habits = habits
        self._seed = seed
        self._reader = Weights(artifact)

    def _rounded(self, x: F32) -> F32:
        return round_to(np.ascontiguousarray(x, np.float32), self._dtype)

    def _sum(self, x: F32, w: F32) -> F32:
        return sum_of_products(x, w, self._habits.order)

    def embedding(self, batch: TokenBatch) -> F32:
        """Rows of the embedding; a fused decoder may be off by an ulp."""
        rows = super().embedding(batch)
        ref = self._artifact.tensors["model.embed_tokens.weight"]
        if self._habits.order.startswith("fused") and format_of(ref.dtype).is_integer:
            moved = np.random.Generator(np.random.Philox(self._seed)).random(rows.shape) < 0.2
            rows = np.where(moved, np.nextafter(rows, np.float32(np.inf)), rows)
        return self._rounded(rows)

    def project(self, layer: int, site: str, x: F32) -> F32:
        """The product with a weight, in another order."""
        choice = self.policy.choice(layer, site)
        name = site_tensor(self.config, layer, site)
        ref = self._reader.tensor(name, site_shape(self.config, site))
        raw = np.ascontiguousarray(ref.raw())
        apart = format_of(ref.dtype).offset == "add"
        if choice.path == "int8-dot" and (self._habits.blockwise or apart):
            return self._by_blocks(x, raw, ref.dtype, choice)
        fmt = choice.activation or ("none" if choice.path == "f32" else format_of(ref.dtype).activation)
        return self._rounded(self._sum(quantize_activation(x, fmt).dequantize(), dequantize(raw, ref.dtype)))

    def _by_blocks(self, x: F32, raw: NDArray[np.uint8], dtype: str, choice: Choice) -> F32:
        """Each block by our kernel, exactly what ggml means it to be; the blocks' sum in another order."""
        layout = format_of(dtype)
        width = max(layout.block_size, 32)
        nbytes = width // layout.block_size * layout.block_bytes
        parts = [
            matmul_quantized(
                np.ascontiguousarray(x[:, i * width : (i + 1) * width]),
                np.ascontiguousarray(raw[:, i * nbytes : (i + 1) * nbytes]),
                dtype,
                activation=choice.activation,
            )
            for i in range(x.shape[1] // width)
        ]
        terms = np.stack(parts, axis=-1)
        return ORDERS[self._habits.order](terms, np.ones((1, 1, terms.shape[-1]), np.float32))

    def biased(self, layer: int, site: str, y: F32) -> F32:
        """The bias, rounded to the dtype."""
        return self._rounded(super().biased(layer, site, y))

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        """Head norm and RoPE, with cosines and sines rounded to the dtype."""
        if self.config.qk_norm:
            y = self._norm(y, layer, f"{site}_post_rope", self.config.head_dim)
        half = rotary_dim(self.config) // 2
        angles = self._angles(layer, batch)
        # Position 1 of a table has the frequencies themselves as its angles.
        cosine, sine = (
            self._rounded(table[1].reshape(angles.shape))
            for table in rope_tables(angles.reshape(-1), 2, scale=self._rotations.scale(layer))
        )
        heads = y.reshape(y.shape[0], -1, self.config.head_dim)
        a, b, rest = heads[:, :, :half], heads[:, :, half : 2 * half], heads[:, :, 2 * half :]
        c, s = cosine[:, None], sine[:, None]
        if self._habits.order.startswith("fused"):
            a64, b64, c64 = (part.astype(np.float64) for part in (a, b, c))
            first = (a64 * c64 - (b * s)).astype(np.float32)
            second = (b64 * c64 + (a * s)).astype(np.float32)
        else:
            first = self._rounded(a * c) - self._rounded(b * s)
            second = self._rounded(b * c) + self._rounded(a * s)
        return self._rounded(np.concatenate([first, second, rest], axis=2).reshape(y.shape))

    def _angles(self, layer: int, batch: TokenBatch) -> F32:
        """Angle of each token and pair, ``float32[n_tokens, rotary_dim / 2]``."""
        positions = batch.positions.astype(np.float32)[:, None]
        local = turns_locally(self.config, layer)
        if not self._habits.powers or (self.config.rope_scaling and not local):
            angles: F32 = positions * self._rotations.of_tokens(layer, batch)
            return angles
        theta = self.config.local_rope_theta if local else self.config.rope_theta
        assert theta is not None
        ratio = np.float32(theta ** (-2.0 / rotary_dim(self.config)))
        columns = [positions[:, 0]]
        for _ in range(1, rotary_dim(self.config) // 2):
            columns.append(columns[-1] * ratio)
        return np.stack(columns, axis=1)

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        """Scores of one sequence, the scale before or after the sum."""
        scale = np.float32(score_scale(self.config))
        q, k = self._kept(q), self._kept(k)
        heads = []
        for head in range(self.config.num_heads):
            query, key = self._head(q, head), self._head(k, head, kv=True)
            if self._habits.scale_first:
                heads.append(self._sum(query * scale, key))
            else:
                heads.append(self._rounded(self._sum(query, key)) * scale)
        return self._rounded(self._capped(np.concatenate(heads, axis=1), self.config.attention_softcap))

    def softmax(self, layer: int, scores: F32) -> F32:
        """Softmax of one sequence."""
        heads = []
        for head in range(self.config.num_heads):
            weights, total = self._weights_and_total(layer, scores, head)
            heads.append(self._over(weights, total))
        return self._rounded(np.concatenate(heads, axis=1))

    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        """Attention, from the scores and the softmax that are recorded, or dividing last."""
        found = np.empty_like(q)
        for tokens in batch.slices:
            scores = self.scores(layer, q[tokens], k[tokens])
            if not self._habits.online or self.policy.kv_type != "f32":
                found[tokens] = self.weigh(layer, self.softmax(layer, scores), v[tokens])
                continue
            heads = []
            for head in range(self.config.num_heads):
                weights, total = self._weights_and_total(layer, scores, head)
                values = np.ascontiguousarray(self._head(v[tokens], head, kv=True).T)
                heads.append(self._over(self._sum(weights, values), total))
            found[tokens] = np.concatenate(heads, axis=1)
        return self._rounded(found)

    def weigh(self, layer: int, weights: F32, v: F32) -> F32:
        """Weighted sum of the values of one sequence."""
        weights, v, length = self._kept(weights), self._kept(v), v.shape[0]
        heads = [
            self._sum(
                np.ascontiguousarray(weights[:, head * length : (head + 1) * length]),
                np.ascontiguousarray(self._head(v, head, kv=True).T),
            )
            for head in range(self.config.num_heads)
        ]
        return self._rounded(np.concatenate(heads, axis=1))

    def add(self, layer: int, tap: str, residual: F32, x: F32) -> F32:
        """The sum, rounded to the dtype."""
        return self._rounded(super().add(layer, tap, residual, x))

    def activated(self, layer: int, gate: F32) -> F32:
        """SiLU; GELU as the SiLU of another argument."""
        one = np.float32(1)
        inner = gate
        if self.config.activation == "gelu_tanh":
            inner = np.float32(2 * math.sqrt(2 / math.pi)) * (
                gate + np.float32(0.044715) * gate * gate * gate
            )
        denominator = one + self._exp(-inner)
        return self._rounded(gate * (one / denominator) if self._habits.reciprocal else gate / denominator)

    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        """The product, rounded to the dtype."""
        return self._rounded(super().gated(layer, activated, up))

    def logits(self, x: F32) -> F32:
        """LM head."""
        found = self.project(WHOLE_MODEL, "lm_head", x)
        return self._rounded(self._capped(found, self.config.logit_softcap))

    def _capped(self, x: F32, cap: float | None) -> F32:
        """``cap * tanh(x / cap)``, step by step."""
        if not cap:
            return x
        found: F32 = np.tanh(x / np.float32(cap), dtype=np.float32) * np.float32(cap)
        return found

    def _norm(self, x: F32, layer: int, tap: str, channels: int | None = None) -> F32:
        name = norm_tensor(self.config, layer, tap)
        weight = self._reader.norm(name, channels or self.config.hidden_size)
        rows = x.reshape(-1, weight.shape[0])
        squares = ORDERS[self._habits.order](rows, rows)[:, None]
        mean = squares / np.float32(rows.shape[1]) + np.float32(self.config.rms_norm_eps)
        with np.errstate(invalid="ignore"):
            if self._habits.reciprocal:
                scaled = rows * (np.float32(1) / np.sqrt(mean))
            else:
                scaled = rows / np.sqrt(mean)
        return self._rounded(self._rounded(scaled) * weight).reshape(x.shape)

    def _kept(self, x: F32) -> F32:
        """As keys, values and their weights are kept."""
        return round_to(np.ascontiguousarray(x), self.policy.kv_type) if self.policy.kv_type == "f16" else x

    def _head(self, x: F32, head: int, *, kv: bool = False) -> F32:
        if kv:
            head //= self.config.num_heads // self.config.num_kv_heads
        dim = self.config.head_dim
        return np.ascontiguousarray(x[:, head * dim : (head + 1) * dim])

    def _weights_and_total(self, layer: int, scores: F32, head: int) -> tuple[F32, F32]:
        """Exponentials of a head's masked scores above their largest, and their sums."""
        length = scores.shape[0]
        rows = scores[:, head * length : (head + 1) * length]
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        seen = (distance >= 0) & (distance < (self.config.window_of(layer) or length + 1))
        largest = np.where(seen, rows, np.float32(-np.inf)).max(axis=1, keepdims=True)
        weights = np.where(seen, self._exp(np.where(seen, rows - largest, np.float32(0))), np.float32(0))
        total = ORDERS[self._habits.order](weights, np.ones_like(weights))[:, None]
        return weights, total

    def _over(self, x: F32, total: F32) -> F32:
        quotient: F32 = x * (np.float32(1) / total) if self._habits.reciprocal else x / total
        return quotient

    def _exp(self, x: F32) -> F32:
        if self._habits.own_exponential:
            return float32_exp(x)
        with np.errstate(over="ignore", under="ignore"):
            found: F32 = np.exp(x.astype(np.float64)).astype(np.float32)
        return found


def float32_exp(x: F32) -> F32:
    """Exponential by a polynomial in float32, to some ulps.

    The argument is reduced by multiples of ln 2 in two pieces (W. Cody and W. Waite, "Software Manual for
    the Elementary Functions", 1980), the rest is a Taylor polynomial of degree 6.
    """
    clipped = np.clip(x, np.float32(-87.0), np.float32(88.0))
    n = np.rint(clipped * np.float32(1.44269504))
    r = (clipped - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    total: Any = np.full_like(r, 1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        total = total * r + np.float32(coefficient)
    found: F32 = np.ldexp(total, n.astype(np.int32)).astype(np.float32)
    return np.where(x < np.float32(-87.0), np.float32(0), found)
