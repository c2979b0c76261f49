"""The order in which a forward pass makes its tensors, for sorting evidence and naming an op."""

from __future__ import annotations

import re
from collections.abc import Iterable

from driftscope.evidence.taps import LAYER_TAPS, WHOLE_TAPS

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

_BEHIND_THE_BLOCKS = {
    "post_attention_layernorm.weight": "post_attn_norm",
    "pre_feedforward_layernorm.weight": "ffn_norm",
    "post_feedforward_layernorm.weight": "post_ffn_norm",
}
"""Norms of layers that have one behind the attention and the MLP too: Gemma gives one name another op."""

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
        place = WHOLE_TAPS.index(tap) if tap in WHOLE_TAPS else len(WHOLE_TAPS)
        return (stage, 0, place, tap)
    place = LAYER_TAPS.index(tap) if tap in LAYER_TAPS else len(LAYER_TAPS)
    return (1, layer, place, tap)


def has_post_norms(tensors: Iterable[str]) -> bool:
    """Whether a model has norms behind the attention and the MLP, by the names of its tensors."""
    return any(name.endswith(".pre_feedforward_layernorm.weight") for name in tensors)


def op_of_tensor(tensor: str, *, post_norms: bool = False) -> tuple[int, str]:
    """Return the layer and the op that first uses a tensor, by its Hugging Face name.

    A tensor of the whole model has layer -1; one that is not known is its own op.

    Args:
        tensor: its name.
        post_norms: of a model with norms behind the attention and the MLP (`has_post_norms`).
    """
    match = _LAYER_TENSOR.fullmatch(tensor)
    if match:
        ops = {**_LAYER_TENSOR_OPS, **(_BEHIND_THE_BLOCKS if post_norms else {})}
        return int(match[1]), ops.get(match[2], match[2])
    return -1, _MODEL_TENSOR_OPS.get(tensor, tensor)


def tensor_order(tensor: str, *, post_norms: bool = False) -> tuple[int, int, int, str]:
    """Return a sort key that puts tensors in the order in which the forward pass uses them.

    Args:
        tensor: its name.
        post_norms: as in `op_of_tensor`.
    """
    layer, op = op_of_tensor(tensor, post_norms=post_norms)
    return (*tap_order(layer, op)[:3], tensor)


def site_order(site: str) -> tuple[int, str]:
    """Return a sort key that puts matmul sites in topological order, unknown ones last."""
    return (SITES.index(site) if site in SITES else len(SITES), site)


def pair_order(pair: str) -> tuple[int, str]:
    """Return a sort key that puts the single mechanisms before both together, unknown pairs last."""
    return (PAIRS.index(pair) if pair in PAIRS else len(PAIRS), pair)
