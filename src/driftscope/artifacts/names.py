"""Canonical tensor names, which are Hugging Face's, and the names of the same tensors in files.

The pairs are those of llama.cpp's ``gguf-py/gguf/tensor_mapping.py`` for the supported architectures. A
canonical name is that of one matrix: where a file holds several in one (q, k and v; gate and up), its name
stands for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Hugging Face's model_type to GGUF's general.architecture; Mistral models are stored as "llama".
GGUF_ARCHITECTURES: dict[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}

# Divisors of the rotary frequencies: Llama 3's, and LongRoPE's for long and for short texts. Hugging Face
# has them in config.json and no tensor for them, so that GGUF's names serve as the canonical ones.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"

_BEFORE_LAYERS = {"model.embed_tokens.weight": "token_embd.weight"}
_AFTER_LAYERS = {"model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
COMPUTED = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
_ATTENTION = {
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
}
_MLP = {
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
# In the order in which a forward pass reads them.
_PRE_NORMS = _ATTENTION | {"post_attention_layernorm.weight": "ffn_norm.weight"} | _MLP
_PRE_AND_POST_NORMS = (
    _ATTENTION
    | {
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    }
    | _MLP
    | {"post_feedforward_layernorm.weight": "post_ffw_norm.weight"}
)
# Gate and up have no names of their own; q, k and v may be apart or not.
_FUSED_MLP = _ATTENTION | {
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_IN_LAYER: dict[str, Mapping[str, str]] = {
    "llama": _PRE_NORMS,
    "qwen2": _PRE_NORMS,
    "qwen3": _PRE_NORMS,
    "gemma2": _PRE_AND_POST_NORMS,
    "gemma3": _PRE_AND_POST_NORMS,
    "phi3": _FUSED_MLP,
}
_ROPE_TENSORS: dict[str, tuple[str, ...]] = {
    "llama": (ROPE_FREQS,),
    "qwen2": (ROPE_FREQS,),
    "qwen3": (ROPE_FREQS,),
    "phi3": (ROPE_LONG, ROPE_SHORT),
}

# Stored name to the canonical names of its parts, in the order of their rows.
_QKV = tuple(f"self_attn.{site}_proj.weight" for site in "qkv")
_QKV_BIAS = tuple(f"self_attn.{site}_proj.bias" for site in "qkv")
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_FUSED_IN_HF = {
    "self_attn.qkv_proj.weight": _QKV,
    "self_attn.qkv_proj.bias": _QKV_BIAS,
    "mlp.gate_up_proj.weight": _GATE_UP,
}
_FUSED_IN_GGUF = {"attn_qkv.weight": _QKV, "attn_qkv.bias": _QKV_BIAS}
_FUSED_IN_PHI3 = _FUSED_IN_GGUF | {"ffn_up.weight": _GATE_UP}

# What a file of an architecture holds in one matrix when it is written here.
_WRITTEN_FUSED_IN_GGUF: dict[str, Mapping[str, tuple[str, ...]]] = {"phi3": _FUSED_IN_PHI3}
_WRITTEN_FUSED_IN_HF: dict[str, Mapping[str, tuple[str, ...]]] = {"phi3": _FUSED_IN_HF}

# What stands before the name of a tensor of the text model, in a model of text and images as transformers
# writes it, and as it holds it in memory.
_TEXT_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}
_OF_IMAGES = tuple(
    f"{prefix}{module}." for prefix in ("", "model.") for module in ("vision_tower", "multi_modal_projector")
)

_OUTSIDE = _BEFORE_LAYERS | _AFTER_LAYERS
_OUTSIDE_BACK = {stored: name for name, stored in _OUTSIDE.items()}
_BACK = {
    architecture: {stored: name for name, stored in table.items()}
    for architecture, table in _IN_LAYER.items()
}
_RANK_IN_LAYER = {name: rank for rank, name in enumerate(_PRE_AND_POST_NORMS)}
_RANK_AFTER = {name: rank for rank, name in enumerate((*_AFTER_LAYERS, *COMPUTED))}

# No leading zeros, so that every tensor has one name; ASCII digits only, and few enough for any model.
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_HF_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)", re.DOTALL)
_GGUF_LAYER = re.compile(rf"blk\.{_NUMBER}\.(.+)", re.DOTALL)


def is_canonical(name: str) -> bool:
    """Whether a name is one that a model of some architecture here can have."""
    if name in _OUTSIDE or name in COMPUTED:
        return True
    match = _HF_LAYER.fullmatch(name)
    return match is not None and match[2] in _RANK_IN_LAYER


def to_gguf(name: str, architecture: str) -> str | None:
    """GGUF's name of a canonical name, or None where it has no tensor of its own.

    Args:
        name: canonical.
        architecture: GGUF's ``general.architecture``.
    """
    if name in _ROPE_TENSORS.get(architecture, ()):
        return name
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _HF_LAYER.fullmatch(name)
    suffix = _IN_LAYER.get(architecture, {}).get(match[2]) if match else None
    return f"blk.{match[1]}.{suffix}" if match and suffix else None


def from_gguf(stored_name: str, architecture: str) -> str | None:
    """Canonical name of a GGUF name, or None where it stands for none or for several."""
    parts = gguf_parts(stored_name, architecture)
    return parts[0] if len(parts) == 1 else None


def gguf_parts(stored_name: str, architecture: str) -> tuple[str, ...]:
    """Canonical names of what a GGUF tensor holds, in the order of its rows; empty where it has none.

    Args:
        stored_name: the name in the file.
        architecture: GGUF's ``general.architecture``.
    """
    if stored_name in _ROPE_TENSORS.get(architecture, ()):
        return (stored_name,)
    if stored_name in _OUTSIDE_BACK:
        return (_OUTSIDE_BACK[stored_name],)
    match = _GGUF_LAYER.fullmatch(stored_name)
    if match is None or architecture not in _BACK:
        return ()
    fused = (_FUSED_IN_PHI3 if architecture == "phi3" else _FUSED_IN_GGUF).get(match[2])
    alone = _BACK[architecture].get(match[2])
    suffixes = fused or ((alone,) if alone else ())
    return tuple(f"model.layers.{match[1]}.{suffix}" for suffix in suffixes)


def hf_parts(stored_name: str) -> tuple[str, ...]:
    """Canonical names of what a tensor in a Hugging Face file holds, in the order of its rows.

    The prefix of the text model in a model of text and images is left out.
    """
    prefix = next((prefix for prefix in _TEXT_PREFIXES if stored_name.startswith(prefix)), None)
    name = stored_name if prefix is None else _TEXT_PREFIXES[prefix] + stored_name.removeprefix(prefix)
    match = _HF_LAYER.fullmatch(name)
    if match and match[2] in _FUSED_IN_HF:
        return tuple(f"model.layers.{match[1]}.{suffix}" for suffix in _FUSED_IN_HF[match[2]])
    return (name,) if is_canonical(name) else ()


def gguf_layout(names: Iterable[str], architecture: str) -> dict[str, tuple[str, ...]]:
    """GGUF names of a model's tensors to the canonical names of what each holds, in the order of its rows.

    Args:
        names: canonical, of a whole model, in canonical order.
        architecture: GGUF's ``general.architecture``.

    Raises:
        KeyError: a name that GGUF has none for.
    """
    fused = _WRITTEN_FUSED_IN_GGUF.get(architecture, {})
    layout: dict[str, tuple[str, ...]] = {}
    for name in names:
        held = _fused_with(name, fused, "blk")
        if held is None:
            stored = to_gguf(name, architecture)
            if stored is None:
                raise KeyError(name)
            held = (stored, (name,))
        layout.setdefault(*held)
    return layout


def hf_layout(names: Iterable[str], architecture: str) -> dict[str, tuple[str, ...]]:
    """Hugging Face's names of a model's tensors to the canonical names of what each holds.

    Args:
        names: canonical, of a whole model, in canonical order.
        architecture: Hugging Face's ``model_type``.
    """
    fused = _WRITTEN_FUSED_IN_HF.get(architecture, {})
    layout: dict[str, tuple[str, ...]] = {}
    for name in names:
        layout.setdefault(*(_fused_with(name, fused, "model.layers") or (name, (name,))))
    return layout


def _fused_with(
    name: str, fused: Mapping[str, tuple[str, ...]], prefix: str
) -> tuple[str, tuple[str, ...]] | None:
    """The fused tensor that a tensor is a part of, and all of its parts; None where it stands alone."""
    match = _HF_LAYER.fullmatch(name)
    stored = next((stored for stored, parts in fused.items() if match and match[2] in parts), None)
    if match is None or stored is None:
        return None
    parts = tuple(f"model.layers.{match[1]}.{suffix}" for suffix in fused[stored])
    return f"{prefix}.{match[1]}.{stored}", parts


def is_of_images(stored_name: str) -> bool:
    """Whether a tensor belongs to the part of a model that sees images, which a text model does not have."""
    return stored_name.startswith(_OF_IMAGES)


def layer_of(name: str) -> int | None:
    """Layer number in a canonical name, or None for a tensor outside of the layers."""
    match = _HF_LAYER.fullmatch(name)
    return int(match[1]) if match else None


def suffix_of(name: str) -> str:
    """A canonical name without its layer: ``self_attn.q_proj.weight``, or the whole of ``lm_head.weight``."""
    match = _HF_LAYER.fullmatch(name)
    return match[2] if match else name


def canonical_order(name: str) -> tuple[int, int, int, str]:
    """Sort key of a canonical name: embedding, layers in order, final norm, head, the rest by name."""
    match = _HF_LAYER.fullmatch(name)
    if match:
        return (1, int(match[1]), _RANK_IN_LAYER.get(match[2], len(_RANK_IN_LAYER)), name)
    if name in _BEFORE_LAYERS:
        return (0, 0, 0, name)
    return (2, 0, _RANK_AFTER.get(name, len(_RANK_AFTER)), name)
