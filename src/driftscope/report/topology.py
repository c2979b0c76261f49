"""The order in which a forward pass makes its tensors, for sorting evidence and naming an op."""

from __future__ import annotations

import re

LAYER_TAPS = (
    "attn_norm",
    "qkv_matmul",
    "qkv_bias",
    "q_post_rope",
    "k_post_rope",
    "attn_scores",
    "attn_softmax",
    "attention",
    "attn_out",
    "post_attn_residual",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_silu",
    "ffn_swiglu",
    "ffn_out",
    "post_ffn_residual",
)
"""Taps of one layer, in topological order."""

MODEL_TAPS = ("embedding", "final_norm", "lm_head")
"""Taps of the whole model (layer -1), in topological order."""

SITES = ("embed", "norms", "q", "k", "v", "o", "gate", "up", "down", "lm_head")
"""Everything that reads weights; the matmul sites in topological order."""

PAIRS = ("teacher.f32|candidate.f32", "candidate.f32|candidate.int8-dot", "teacher.f32|candidate.int8-dot")
"""Pairs of paths: the weights alone, the arithmetic alone, both together."""

_LAYER_TENSOR_OPS = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "qkv_matmul",
    "self_attn.k_proj.weight": "qkv_matmul",
    "self_attn.v_proj.weight": "qkv_matmul",
    "self_attn.q_proj.bias": "qkv_bias",
    "self_attn.k_proj.bias": "qkv_bias",
    "self_attn.v_proj.bias": "qkv_bias",
    "self_attn.q_norm.weight": "q_post_rope",
    "self_attn.k_norm.weight": "k_post_rope",
    "self_attn.o_proj.weight": "attn_out",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_out",
}

_MODEL_TENSOR_OPS = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}

_LAYER_TENSOR = re.compile(r"model\.layers\.(\d{1,6})\.(.+)")


def tap_order(layer: int, tap: str) -> tuple[int, int, int, str]:
    """Return a sort key that puts taps in topological order; an unknown tap comes last in its layer.

    Args:
        layer: layer number, -1 for a tap of the whole model.
        tap: tap name without the ``layers.N.`` prefix.
    """
    if layer < 0:
        stage = 0 if tap == "embedding" else 2
        place = MODEL_TAPS.index(tap) if tap in MODEL_TAPS else len(MODEL_TAPS)
        return (stage, 0, place, tap)
    place = LAYER_TAPS.index(tap) if tap in LAYER_TAPS else len(LAYER_TAPS)
    return (1, layer, place, tap)


def op_of_tensor(tensor: str) -> tuple[int, str]:
    """Return the layer and the op that first uses a tensor, by its Hugging Face name.

    A tensor of the whole model has layer -1; one that is not known is its own op.
    """
    match = _LAYER_TENSOR.fullmatch(tensor)
    if match:
        return int(match[1]), _LAYER_TENSOR_OPS.get(match[2], match[2])
    return -1, _MODEL_TENSOR_OPS.get(tensor, tensor)


def tensor_order(tensor: str) -> tuple[int, int, int, str]:
    """Return a sort key that puts tensors in the order in which the forward pass uses them."""
    layer, op = op_of_tensor(tensor)
    return (*tap_order(layer, op)[:3], tensor)


def site_order(site: str) -> tuple[int, str]:
    """Return a sort key that puts matmul sites in topological order, unknown ones last."""
    return (SITES.index(site) if site in SITES else len(SITES), site)


def pair_order(pair: str) -> tuple[int, str]:
    """Return a sort key that puts the single mechanisms before both together, unknown pairs last."""
    return (PAIRS.index(pair) if pair in PAIRS else len(PAIRS), pair)
