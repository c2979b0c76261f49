"""One op of a model, run on given inputs: the step of a replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import ModelConfig
from driftscope.forward.arithmetic import round_to
from driftscope.forward.batch import TokenBatch
from driftscope.forward.ops import Ops

F32 = NDArray[np.float32]

Value: TypeAlias = "F32 | list[F32]"
"""A tap: ``float32[n_tokens, channels]``; of the ragged taps one ``float32[t, heads * t]`` a sequence."""


class Evaluator(Protocol):
    """Runs single ops."""

    config: ModelConfig

    def evaluate(self, layer: int, tap: str, inputs: Mapping[str, Value], batch: TokenBatch) -> Value:
        """Run one op.

        Args:
            layer: its layer, -1 for the whole model's.
            tap: name of its output (`driftscope.forward.architecture.layer_ops`).
            inputs: the op's inputs by tap name; ``layer_input`` is the residual stream before the layer or
                before the final norm. Inputs beyond what the op reads are ignored.
            batch: the tokens.
        """
        ...


class DeclaredOps:
    """An evaluator in the arithmetic of a policy, on the host: the very kernels of the forward pass.

    Attributes:
        ops: the ops.
        dtype: every output is rounded to it (`driftscope.forward.arithmetic`).
    """

    def __init__(self, ops: Ops, dtype: str = "f32") -> None:
        self.ops = ops
        self.dtype = dtype
        self.config = ops.config

    def evaluate(self, layer: int, tap: str, inputs: Mapping[str, Value], batch: TokenBatch) -> Value:
        """Run one op; see `Evaluator`."""
        found = evaluate(self.ops, layer, tap, inputs, batch)
        if isinstance(found, list):
            return [round_to(part, self.dtype) for part in found]
        return round_to(found, self.dtype)


def evaluate(ops: Ops, layer: int, tap: str, inputs: Mapping[str, Value], batch: TokenBatch) -> Value:
    """Run one op of `ops` on the CPU; arguments as in `Evaluator.evaluate`.

    ``attention`` is computed from ``q_post_rope``, ``k_post_rope`` and ``qkv_bias`` where ``attn_softmax`` is
    not among the inputs.

    Raises:
        ValueError: no such op.
    """
    config = ops.config
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bounds = {
        "q": (0, q_rows),
        "k": (q_rows, q_rows + kv_rows),
        "v": (q_rows + kv_rows, q_rows + 2 * kv_rows),
    }

    def given(name: str) -> F32:
        value = inputs[name]
        assert not isinstance(value, list)
        return value

    def part(name: str, site: str) -> F32:
        left, right = bounds[site]
        return np.ascontiguousarray(given(name)[:, left:right])

    match tap:
        case "embedding":
            return ops.embedding(batch)
        case "attn_norm":
            return ops.attn_norm(layer, given("layer_input"))
        case "qkv_matmul":
            x = given("attn_norm")
            return np.concatenate([ops.project(layer, site, x) for site in ("q", "k", "v")], axis=1)
        case "qkv_bias":
            parts = [ops.biased(layer, site, part("qkv_matmul", site)) for site in ("q", "k", "v")]
            return np.concatenate(parts, axis=1)
        case "q_post_rope" | "k_post_rope":
            return ops.turned(layer, tap[0], part("qkv_bias", tap[0]), batch)
        case "attn_scores":
            q, k = given("q_post_rope"), given("k_post_rope")
            return [ops.scores(layer, q[tokens], k[tokens]) for tokens in batch.slices]
        case "attn_softmax":
            return [ops.softmax(layer, scores) for scores in inputs["attn_scores"]]
        case "attention" if "attn_softmax" in inputs:
            v = part("qkv_bias", "v")
            weights = inputs["attn_softmax"]
            rows = [
                ops.weigh(layer, part, v[tokens]) for part, tokens in zip(weights, batch.slices, strict=True)
            ]
            return np.concatenate(rows)
        case "attention":
            v = part("qkv_bias", "v")
            return ops.attend(layer, given("q_post_rope"), given("k_post_rope"), v, batch)
        case "attn_out":
            return ops.project(layer, "o", given("attention"))
        case "post_attn_norm":
            return ops.post_attn_norm(layer, given("attn_out"))
        case "post_attn_residual":
            attended = "post_attn_norm" if config.post_norms else "attn_out"
            return ops.add(layer, tap, given("layer_input"), given(attended))
        case "ffn_norm":
            return ops.ffn_norm(layer, given("post_attn_residual"))
        case "ffn_gate" | "ffn_up":
            return ops.project(layer, tap.removeprefix("ffn_"), given("ffn_norm"))
        case "ffn_silu":
            return ops.activated(layer, given("ffn_gate"))
        case "ffn_swiglu":
            return ops.gated(layer, given("ffn_silu"), given("ffn_up"))
        case "ffn_out":
            return ops.project(layer, "down", given("ffn_swiglu"))
        case "post_ffn_norm":
            return ops.post_ffn_norm(layer, given("ffn_out"))
        case "post_ffn_residual":
            moved = "post_ffn_norm" if config.post_norms else "ffn_out"
            return ops.add(layer, tap, given("post_attn_residual"), given(moved))
        case "final_norm":
            return ops.final_norm(given("layer_input"))
        case "lm_head":
            return ops.logits(given("final_norm"))
    raise ValueError(f"tap {tap!r}; expected one of driftscope.forward.architecture")
