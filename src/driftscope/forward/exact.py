"""The ops of a model in float64: what an artifact's weights and hyperparameters say, without any rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.forward.architecture import norm_tensor, score_scale, site_shape, site_tensor
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.forward.rotary import Rotations, rotary_dim
from driftscope.forward.weights import Weights
from driftscope.kernels import float64

F64 = NDArray[np.float64]

ExactValue: TypeAlias = "F64 | list[F64]"
"""A tap in float64, shaped as `driftscope.forward.evaluate.Value`."""

_EMBEDDING = "model.embed_tokens.weight"


class ExactOps:
    """An evaluator (`driftscope.forward.evaluate.Evaluator`) in float64. Inputs may be float32 or float64.

    Attributes:
        config: the artifact's hyperparameters.
    """

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        """Prepare the ops.

        Args:
            artifact: gives weights and hyperparameters.
            threads: number of threads; the result does not depend on it.

        Raises:
            InputError: the rotary scaling is not implemented.
        """
        self.config = artifact.config
        self._artifact = artifact
        self._weights = Weights(artifact)
        self._threads = threads
        half = rotary_dim(self.config) // 2
        factors = self._weights.vector(ROPE_FREQS, half) if ROPE_FREQS in artifact.tensors else None
        self._rotations = Rotations(self.config, factors, exact=True)

    def evaluate(self, layer: int, tap: str, inputs: Mapping[str, Any], batch: TokenBatch) -> ExactValue:
        """Run one op; see `driftscope.forward.evaluate.Evaluator`.

        Raises:
            ValueError: no such op.
        """
        match tap:
            case "qkv_matmul" | "qkv_bias":
                parts = [self.part(layer, tap, site, inputs) for site in ("q", "k", "v")]
                return np.concatenate(parts, axis=1)
            case "embedding":
                shape = (self.config.vocab_size, self.config.hidden_size)
                rows = self._weights.rows(_EMBEDDING, shape, batch.ids).astype(np.float64)
                return rows * self.config.embedding_scale
            case "attn_norm":
                return self._norm(inputs["layer_input"], layer, tap)
            case "q_post_rope" | "k_post_rope":
                return self._turned(layer, tap[0], self._slice(inputs["qkv_bias"], tap[0]), batch)
            case "attn_scores" | "attn_softmax" | "attention":
                return self._attention(layer, tap, inputs, batch)
            case "attn_out":
                return self._project(layer, "o", inputs["attention"])
            case "post_attn_norm":
                return self._norm(inputs["attn_out"], layer, tap)
            case "post_attn_residual":
                attended = "post_attn_norm" if self.config.post_norms else "attn_out"
                return _sum(inputs["layer_input"], inputs[attended])
            case "ffn_norm":
                return self._norm(inputs["post_attn_residual"], layer, tap)
            case "ffn_gate" | "ffn_up":
                return self._project(layer, tap.removeprefix("ffn_"), inputs["ffn_norm"])
            case "ffn_silu":
                gelu = self.config.activation == "gelu_tanh"
                return (float64.gelu if gelu else float64.silu)(inputs["ffn_gate"])
            case "ffn_swiglu":
                return np.multiply(inputs["ffn_silu"], inputs["ffn_up"], dtype=np.float64)
            case "ffn_out":
                return self._project(layer, "down", inputs["ffn_swiglu"])
            case "post_ffn_norm":
                return self._norm(inputs["ffn_out"], layer, tap)
            case "post_ffn_residual":
                moved = "post_ffn_norm" if self.config.post_norms else "ffn_out"
                return _sum(inputs["post_attn_residual"], inputs[moved])
            case "final_norm":
                return self._norm(inputs["layer_input"], layer, tap)
            case "lm_head":
                logits = self._project(WHOLE_MODEL, "lm_head", inputs["final_norm"])
                cap = self.config.logit_softcap
                return float64.capped(logits, cap) if cap else logits
        raise ValueError(f"tap {tap!r}; expected one of driftscope.forward.architecture")

    def part(self, layer: int, tap: str, site: str, inputs: Mapping[str, Any]) -> F64:
        """One of q, k, v of ``qkv_matmul`` or ``qkv_bias``."""
        if tap == "qkv_matmul":
            return self._project(layer, site, inputs["attn_norm"])
        found: F64 = np.asarray(self._slice(inputs["qkv_matmul"], site), np.float64)
        if self.config.attention_bias:
            name = site_tensor(self.config, layer, site).removesuffix("weight") + "bias"
            found = found + self._weights.vector(name, site_shape(self.config, site)[0]).astype(np.float64)
        return found

    def _project(self, layer: int, site: str, x: Any) -> F64:
        ref = self._weights.tensor(site_tensor(self.config, layer, site), site_shape(self.config, site))
        raw, order = ref.raw(), ref.row_order()
        raw = raw if order is None else raw[order]
        return float64.matmul_stored(x, raw, ref.dtype, threads=self._threads)

    def _norm(self, x: Any, layer: int, tap: str, channels: int | None = None) -> F64:
        name = norm_tensor(self.config, layer, tap)
        weight = self._weights.vector(name, channels or self.config.hidden_size).astype(np.float64)
        weight = weight + (self.config.norm_offset - self._artifact.tensors[name].value_offset)
        return float64.rms_norm(x, weight, self.config.rms_norm_eps)

    def _turned(self, layer: int, site: str, y: Any, batch: TokenBatch) -> F64:
        if self.config.qk_norm:
            y = self._norm(y, layer, f"{site}_post_rope", self.config.head_dim)
        tables = self._rotations.tables(layer, batch, float64.rope_tables)
        return float64.rope(y, *tables, head_dim=self.config.head_dim)

    def _attention(self, layer: int, tap: str, inputs: Mapping[str, Any], batch: TokenBatch) -> ExactValue:
        heads = {"n_heads": self.config.num_heads, "n_kv_heads": self.config.num_kv_heads}
        found: list[F64]
        if tap == "attn_scores" or (tap == "attention" and "attn_softmax" not in inputs):
            q, k = inputs["q_post_rope"], inputs["k_post_rope"]
            scale, cap = score_scale(self.config), self.config.attention_softcap
            found = [
                float64.scores(
                    q[tokens], k[tokens], scale=scale, soft_cap=cap, threads=self._threads, **heads
                )
                for tokens in batch.slices
            ]
            if tap == "attn_scores":
                return found
            found = self._softmax(layer, found)
        elif tap == "attn_softmax":
            return self._softmax(layer, inputs["attn_scores"])
        else:
            found = inputs["attn_softmax"]
        v = self._slice(inputs["qkv_bias"], "v")
        rows = [
            float64.weigh(weights, v[tokens], threads=self._threads, **heads)
            for weights, tokens in zip(found, batch.slices, strict=True)
        ]
        return np.concatenate(rows)

    def _softmax(self, layer: int, scores: Sequence[Any]) -> list[F64]:
        window = self.config.window_of(layer)
        heads = self.config.num_heads
        return [float64.softmax(part, n_heads=heads, window=window, threads=self._threads) for part in scores]

    def _slice(self, qkv: Any, site: str) -> Any:
        q, kv = (site_shape(self.config, name)[0] for name in ("q", "k"))
        left, right = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[site]
        return qkv[:, left:right]


def _sum(a: Any, b: Any) -> F64:
    return np.add(a, b, dtype=np.float64)
