"""At which point each tap of a trace was captured: the standard one, or a neighbour that fits better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.arithmetic_guess import (
    Answer,
    answer_of,
    flat,
    log_nmse,
    recorded_inputs,
    some_prompts,
)
from driftscope.analysis.explanations.activation import FUNCTIONS, NAMES
from driftscope.artifacts.model import Artifact
from driftscope.engines.trace import Trace
from driftscope.forward.architecture import layer_ops, score_scale
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import DeclaredOps, Value
from driftscope.forward.ops import Ops
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.forward.rounded import rounded

F64 = NDArray[np.float64]

STANDARD = "standard"


def guess_capture_points(
    trace: Trace,
    artifact: Artifact,
    arithmetic: Arithmetic,
    layers: Sequence[int],
    *,
    threads: int = 1,
) -> dict[str, Answer]:
    """For each tap that has more than one plausible capture point, the one that fits.

    Args:
        trace: the trace.
        artifact: the weights that the engine ran.
        arithmetic: what it computes in.
        layers: the layers looked at.
        threads: the result does not depend on it.

    Returns:
        Tap to an answer, whose winner is ``standard`` or says what the tap holds instead.
    """
    policy = arithmetic.policy
    loaded = rounded(artifact, arithmetic.dtype)
    ops = DeclaredOps(Ops(dict.fromkeys(policy.artifacts, loaded), policy, threads=threads), arithmetic.dtype)
    wanted, batch = some_prompts(trace)
    logs: dict[str, dict[str, list[float]]] = {}
    for layer in layers:
        for tap, name, predicted, recorded in _points(
            ops, layer, recorded_inputs(trace, layer, wanted), batch
        ):
            logs.setdefault(tap, {}).setdefault(name, []).append(log_nmse(predicted, recorded))
    if trace.has(WHOLE_MODEL, "embedding"):
        rows = np.concatenate([np.arange(trace.batch.n_tokens)[trace.batch.slices[i]] for i in wanted])
        recorded = trace.tap(WHOLE_MODEL, "embedding")[rows].astype(np.float64).reshape(-1)
        value, factor = (
            flat(ops.evaluate(WHOLE_MODEL, "embedding", {}, batch)),
            artifact.config.embedding_scale,
        )
        other = ("times the root of its width", value * artifact.config.hidden_size**0.5)
        if factor != 1.0:
            other = ("before its factor", value / factor)
        for name, predicted in ((STANDARD, value), other):
            logs.setdefault("embedding", {}).setdefault(name, []).append(log_nmse(predicted, recorded))
    order = ["embedding", *(op.tap for op in layer_ops(artifact.config))]
    return {tap: answer_of(logs[tap]) for tap in order if tap in logs}


def _points(
    ops: DeclaredOps, layer: int, inputs: Mapping[str, Value], batch: TokenBatch
) -> Iterator[tuple[str, str, F64, F64]]:
    """Tap, capture point, what the tap then holds, and what it does hold."""
    config = ops.config
    for op in layer_ops(config):
        if op.tap not in inputs or not all(name in inputs for name in op.inputs):
            continue
        standard = ops.evaluate(layer, op.tap, {name: inputs[name] for name in op.inputs}, batch)
        found = {STANDARD: flat(standard), **_others(op.tap, standard, inputs, ops, layer)}
        if len(found) > 1:
            for name, predicted in found.items():
                yield op.tap, name, predicted, flat(inputs[op.tap])


def _others(
    tap: str, standard: Value, inputs: Mapping[str, Value], ops: DeclaredOps, layer: int
) -> dict[str, F64]:
    """The neighbours of a capture point, from its standard value."""
    config = ops.config

    def given(name: str) -> F64:
        return flat(inputs[name])

    value = flat(standard)
    scale = score_scale(config)
    match tap:
        case "post_attn_norm":
            return {"before the norm": given("attn_out")}
        case "post_ffn_norm":
            return {"before the norm": given("ffn_out")}
        case "attn_norm" | "ffn_norm":
            source = inputs["layer_input" if tap == "attn_norm" else "post_attn_residual"]
            x = np.asarray(source, np.float64)
            root = np.sqrt(np.square(x).mean(axis=1, keepdims=True) + config.rms_norm_eps)
            return {"before its weight": (x / root).reshape(-1), "the input of the norm": x.reshape(-1)}
        case "qkv_bias" if config.attention_bias:
            return {"before the bias": given("qkv_matmul")}
        case "qkv_matmul" if config.attention_bias:
            biased = ops.evaluate(layer, "qkv_bias", {"qkv_matmul": standard}, _no_batch())
            return {"after the bias": flat(biased)}
        case "q_post_rope":
            return {"before RoPE": _part(inputs, "q", config), "times the scale": value * scale}
        case "k_post_rope":
            return {"before RoPE": _part(inputs, "k", config)}
        case "attn_scores":
            if cap := config.attention_softcap:
                bare = cap * np.arctanh(np.clip(value / cap, -1 + 1e-15, 1 - 1e-15))
                return {"before the cap": bare, "neither scaled nor capped": bare / scale}
            return {"not scaled": value / scale}
        case "attn_out" if "layer_input" in inputs:
            return {"after the residual": value + given("layer_input")}
        case "post_attn_residual":
            return {"before the residual": given("post_attn_norm" if config.post_norms else "attn_out")}
        case "ffn_gate":
            return {"after the activation": FUNCTIONS[NAMES[config.activation]](value)}
        case "ffn_silu":
            return {"before the activation": given("ffn_gate")}
        case "ffn_out" if "post_attn_residual" in inputs:
            return {"after the residual": value + given("post_attn_residual")}
        case "post_ffn_residual":
            return {"before the residual": given("post_ffn_norm" if config.post_norms else "ffn_out")}
    return {}


def _part(inputs: Mapping[str, Value], site: str, config: Any) -> F64:
    rows = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    begin, end = (0, rows) if site == "q" else (rows, rows + kv)
    value = inputs["qkv_bias"]
    assert not isinstance(value, list)
    return flat(np.ascontiguousarray(value[:, begin:end]))


def _no_batch() -> TokenBatch:
    """For an op that reads no positions."""
    return TokenBatch.of([[0]])
