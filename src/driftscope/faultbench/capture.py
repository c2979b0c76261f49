"""Faults of a recording: the right pass, one tap of which was taken at another point."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from driftscope.faultbench.edited import values_of
from driftscope.faultbench.injection import Injection, Site, from_the_start, outside
from driftscope.faultbench.trace_in_memory import MemoryTrace
from driftscope.faultbench.weights import no_bias
from driftscope.forward.architecture import norm_tensor, score_scale
from driftscope.forward.evaluate import Value

F32 = NDArray[np.float32]

Recorded = Callable[[MemoryTrace, Site, int], Value]


def elsewhere(tap: str, recorded: Recorded) -> Callable[[MemoryTrace, Site], MemoryTrace]:
    """A trace whose tap holds something else in every layer."""

    def change(trace: MemoryTrace, site: Site) -> MemoryTrace:
        layers = sorted(layer for layer, name in trace.values if name == tap)
        return trace.replaced({(layer, tap): recorded(trace, site, layer) for layer in layers})

    return change


def of(tap: str) -> Recorded:
    """What another tap of the layer holds."""
    return lambda trace, site, layer: trace.values[layer, tap]


def before_the_norm_weight(tap: str) -> Recorded:
    """A norm's output without its weight."""

    def recorded(trace: MemoryTrace, site: Site, layer: int) -> Value:
        name = norm_tensor(site.config, layer, tap)
        missing = site.config.norm_offset - site.artifact.tensors[name].value_offset
        weight = values_of(site.artifact, name) + np.float32(missing)
        return np.divide(trace.tap(layer, tap), weight, dtype=np.float32)

    return recorded


def before_rope(which: str) -> Recorded:
    """Q or k as it is before RoPE."""

    def recorded(trace: MemoryTrace, site: Site, layer: int) -> Value:
        config = site.config
        q = config.num_heads * config.head_dim
        k = q + config.num_kv_heads * config.head_dim
        bounds = {"q": slice(0, q), "k": slice(q, k)}
        return np.ascontiguousarray(trace.tap(layer, "qkv_bias")[:, bounds[which]])

    return recorded


def before_the_scale(trace: MemoryTrace, site: Site, layer: int) -> Value:
    """Scores that are not scaled."""
    gain = np.float32(1.0 / score_scale(site.config))
    return [part * gain for part in trace.ragged(layer, "attn_scores")]


def _no_head_norm(site: Site) -> str | None:
    return "q and k pass a norm before RoPE" if site.config.qk_norm else None


_P = "capture"
_CLASSES = ("capture-point",)

INJECTIONS = (
    Injection(
        "F20",
        "qkv-before-bias",
        _P,
        "q, k and v recorded before the bias",
        from_the_start("qkv_bias"),
        _CLASSES,
        unless=no_bias,
        capture=elsewhere("qkv_bias", of("qkv_matmul")),
    ),
    Injection(
        "F20",
        "attention-after-residual",
        _P,
        "output of the attention block recorded after the residual",
        from_the_start("attn_out"),
        _CLASSES,
        capture=elsewhere("attn_out", of("post_attn_residual")),
    ),
    Injection(
        "F20",
        "mlp-after-residual",
        _P,
        "output of the MLP recorded after the residual",
        from_the_start("ffn_out"),
        _CLASSES,
        capture=elsewhere("ffn_out", of("post_ffn_residual")),
    ),
    Injection(
        "F20",
        "residual-before-attention",
        _P,
        "residual recorded before the attention is added",
        from_the_start("post_attn_residual"),
        _CLASSES,
        regimes=("short",),
        capture=elsewhere("post_attn_residual", of("attn_out")),
    ),
    Injection(
        "F20",
        "norm-before-weight",
        _P,
        "norm before the MLP recorded before its weight",
        from_the_start("ffn_norm"),
        _CLASSES,
        capture=elsewhere("ffn_norm", before_the_norm_weight("ffn_norm")),
    ),
    Injection(
        "F20",
        "final-norm-before-weight",
        _P,
        "last norm recorded before its weight",
        outside("final_norm"),
        _CLASSES,
        regimes=("short",),
        capture=elsewhere("final_norm", before_the_norm_weight("final_norm")),
    ),
    Injection(
        "F20",
        "q-before-rope",
        _P,
        "q recorded before RoPE",
        from_the_start("q_post_rope"),
        _CLASSES,
        unless=_no_head_norm,
        capture=elsewhere("q_post_rope", before_rope("q")),
    ),
    Injection(
        "F20",
        "scores-before-scale",
        _P,
        "attention scores recorded before the scale",
        from_the_start("attn_scores"),
        _CLASSES,
        capture=elsewhere("attn_scores", before_the_scale),
    ),
    Injection(
        "F20",
        "gate-after-activation",
        _P,
        "gate recorded after the activation",
        from_the_start("ffn_gate"),
        _CLASSES,
        regimes=("short",),
        capture=elsewhere("ffn_gate", of("ffn_silu")),
    ),
)
"""Taps recorded at another point, in every layer; the computation is sound."""
