"""Canonical tensor names, which are Hugging Face's, and GGUF's names for the same tensors.

The pairs are those of llama.cpp's ``gguf-py/gguf/tensor_mapping.py`` for the supported architectures.
"""

from __future__ import annotations

import re

# Hugging Face's model_type to GGUF's general.architecture; Mistral models are stored as "llama".
GGUF_ARCHITECTURES: dict[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

# GGUF architectures whose q and k rows llama.cpp's converter stores interleaved within a head.
INTERLEAVED_ARCHITECTURES: frozenset[str] = frozenset({"llama"})

# Llama 3's divisors of the rotary frequencies. Hugging Face computes them from config.json and has no
# tensor for them, so that GGUF's name serves as the canonical one.
ROPE_FREQS = "rope_freqs.weight"

_BEFORE_LAYERS = {"model.embed_tokens.weight": "token_embd.weight"}
_AFTER_LAYERS = {
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    ROPE_FREQS: ROPE_FREQS,
}
# In the order in which a forward pass reads them.
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}

_OUTSIDE = _BEFORE_LAYERS | _AFTER_LAYERS
_OUTSIDE_BACK = {stored: name for name, stored in _OUTSIDE.items()}
_IN_LAYER_BACK = {stored: name for name, stored in _IN_LAYER.items()}
_RANK_IN_LAYER = {name: rank for rank, name in enumerate(_IN_LAYER)}
_RANK_AFTER = {name: rank for rank, name in enumerate(_AFTER_LAYERS)}

# No leading zeros, so that every tensor has one name; ASCII digits only, and few enough for any model.
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_HF_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)", re.DOTALL)
_GGUF_LAYER = re.compile(rf"blk\.{_NUMBER}\.(.+)", re.DOTALL)


def is_canonical(name: str) -> bool:
    """Whether a name is one that a model here can have."""
    return to_gguf(name) is not None


def to_gguf(name: str) -> str | None:
    """GGUF's name of a canonical name, or None where there is none."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _HF_LAYER.fullmatch(name)
    suffix = _IN_LAYER.get(match[2]) if match else None
    return f"blk.{match[1]}.{suffix}" if match and suffix else None


def from_gguf(stored_name: str) -> str | None:
    """Canonical name of a GGUF name, or None where there is none."""
    if stored_name in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[stored_name]
    match = _GGUF_LAYER.fullmatch(stored_name)
    suffix = _IN_LAYER_BACK.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{suffix}" if match and suffix else None


def layer_of(name: str) -> int | None:
    """Layer number in a canonical name, or None for a tensor outside of the layers."""
    match = _HF_LAYER.fullmatch(name)
    return int(match[1]) if match else None


def canonical_order(name: str) -> tuple[int, int, int, str]:
    """Sort key of a canonical name: embedding, layers in order, final norm, head, the rest by name."""
    match = _HF_LAYER.fullmatch(name)
    if match:
        return (1, int(match[1]), _RANK_IN_LAYER.get(match[2], len(_RANK_IN_LAYER)), name)
    if name in _BEFORE_LAYERS:
        return (0, 0, 0, name)
    return (2, 0, _RANK_AFTER.get(name, len(_RANK_AFTER)), name)
