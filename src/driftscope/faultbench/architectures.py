"""Faults that only some architectures can have: of Gemma's norms, caps and windows, of Phi-3's fused rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from driftscope.artifacts.model import Artifact
from driftscope.faultbench.edited import rows_of, with_rows
from driftscope.faultbench.engine import OtherActivation, silu
from driftscope.faultbench.hyperparameters import changed, multiplied
from driftscope.faultbench.injection import Injection, Site, Spot, from_the_start, outside, within
from driftscope.faultbench.weights import norm_moved, tensor

GEMMA = ("gemma2", "gemma3")


def fused_by_groups(site: Site) -> Artifact:
    """Rows of q, k and v read as if the fused matrix held them group by group, one key head a group."""
    names = [tensor(site.layer, which) for which in "qkv"]
    rows = [rows_of(site.artifact, name) for name in names]
    fused = np.concatenate(rows)
    groups = fused.reshape(site.config.num_kv_heads, -1, site.config.head_dim, fused.shape[1])
    parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
    found = (np.ascontiguousarray(part).reshape(-1, fused.shape[1]) for part in parts)
    return with_rows(site.artifact, dict(zip(names, found, strict=True)))


def keys_and_values_exchanged(site: Site) -> Artifact:
    """The fused matrix read as q, v, k."""
    k, v = tensor(site.layer, "k"), tensor(site.layer, "v")
    return with_rows(site.artifact, {k: rows_of(site.artifact, v), v: rows_of(site.artifact, k)})


def first_without_a_window(tap: str) -> Callable[[Site], Spot]:
    """The op of the first layer that sees everything."""
    return lambda site: Spot(
        next(layer for layer in range(site.config.num_layers) if site.config.window_of(layer) is None), tap
    )


_W, _C, _E = "weights", "configuration", "engine"

INJECTIONS = (
    Injection(
        "F03",
        "whole-head",
        _C,
        "RoPE turns all channels of a head instead of half of them",
        from_the_start("q_post_rope"),
        ("rope-pairing",),
        artifact=changed(rotary_dim=None),
        models=("phi3",),
    ),
    Injection(
        "F02",
        "fused-by-groups",
        _W,
        "rows of the fused q, k and v split as if they lay group by group",
        within("qkv_matmul", "q"),
        ("row-permutation-heads", "cross-match"),
        artifact=fused_by_groups,
        models=("phi3",),
    ),
    Injection(
        "F33",
        "fused-k-and-v-exchanged",
        _W,
        "the fused matrix split as q, v, k",
        within("qkv_matmul", "k"),
        ("other-layer", "cross-match"),
        artifact=keys_and_values_exchanged,
        models=("phi3",),
    ),
    Injection(
        "F04",
        "offset-missing",
        _C,
        "norms multiply by w instead of 1 + w",
        from_the_start("attn_norm"),
        ("norm-offset",),
        artifact=changed(norm_offset=0.0),
        models=GEMMA,
    ),
    Injection(
        "F04",
        "offset-twice",
        _C,
        "norms multiply by 2 + w instead of 1 + w",
        from_the_start("attn_norm"),
        ("norm-offset",),
        artifact=changed(norm_offset=2.0),
        models=GEMMA,
    ),
    Injection(
        "F04",
        "norm-of-attention-plus-one",
        _W,
        "one added to the weight of the norm behind the attention",
        within("post_attn_norm"),
        ("norm-offset",),
        artifact=norm_moved("post_attn_norm", 1.0),
        models=GEMMA,
    ),
    Injection(
        "F16",
        "local-theta-times-ten",
        _C,
        "theta of the layers with a window ten times too large",
        from_the_start("q_post_rope"),
        ("rope-theta",),
        artifact=multiplied("local_rope_theta", 10.0),
        models=("gemma3",),
    ),
    Injection(
        "F16",
        "one-theta",
        _C,
        "layers with a window turn like the others",
        from_the_start("q_post_rope"),
        ("rope-theta", "rope-factors"),
        artifact=changed(local_rope_theta=None),
        models=("gemma3",),
    ),
    Injection(
        "F18",
        "score-cap-dropped",
        _C,
        "attention scores without their cap",
        from_the_start("attn_scores"),
        ("soft-cap",),
        artifact=changed(attention_softcap=None),
        models=("gemma2",),
    ),
    Injection(
        "F18",
        "score-cap-doubled",
        _C,
        "attention scores under twice their cap",
        from_the_start("attn_scores"),
        ("soft-cap",),
        artifact=multiplied("attention_softcap", 2.0),
        models=("gemma2",),
    ),
    Injection(
        "F18",
        "logit-cap-dropped",
        _C,
        "logits without their cap",
        outside("lm_head"),
        ("soft-cap",),
        artifact=changed(logit_softcap=None),
        models=("gemma2",),
    ),
    Injection(
        "F18",
        "logit-cap-doubled",
        _C,
        "logits under twice their cap",
        outside("lm_head"),
        ("soft-cap",),
        artifact=multiplied("logit_softcap", 2.0),
        models=("gemma2",),
    ),
    Injection(
        "F19",
        "window-everywhere",
        _C,
        "every layer with the window that only some have",
        first_without_a_window("attn_softmax"),
        ("window",),
        artifact=changed(sliding_layers=None),
        models=("gemma2",),
    ),
    Injection(
        "F23",
        "silu",
        _E,
        "SiLU in GELU's place",
        from_the_start("ffn_silu"),
        ("activation-function",),
        engine=lambda site: OtherActivation(site, silu),
        models=GEMMA,
    ),
    Injection(
        "F24",
        "embedding-not-multiplied",
        _C,
        "embedding without its factor, the root of hidden_size",
        outside("embedding"),
        ("output-scale", "scale-dropped"),
        artifact=changed(embedding_scale=1.0),
        models=GEMMA,
    ),
)
"""What `models` lets through; no other model has such a row."""
