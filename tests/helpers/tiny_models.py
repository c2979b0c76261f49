"""Small models with seeded random weights, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_CLASSES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
ARCHITECTURES = tuple(_CLASSES)
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
# Windows are shorter than any prompt of a test, and on some layers only where an architecture can do that.
_MIXED_LAYERS = {"num_hidden_layers": 3, "sliding_window": 5}
_SIZES_OF: dict[str, dict[str, Any]] = {
    "gemma2": _MIXED_LAYERS | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": _MIXED_LAYERS
    | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    # LongRoPE that changes from one list to the other after 48 tokens, on 12 of the 16 channels of a head.
    "phi3": {
        "original_max_position_embeddings": 48,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.6],
            "long_factor": [1.1, 1.5, 2.0, 3.0, 4.5, 6.0],
        },
    },
}


def save_tiny_model(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "40KB",
    **options: Any,
) -> PreTrainedModel:
    """Write a model folder as transformers writes it, and return the model.

    Norm weights and biases are random as well; transformers would start them at one and zero, where
    their loss goes unseen. Gemma's norms, which are used plus one, are random around zero.

    Args:
        folder: where to put it.
        architecture: Hugging Face's ``model_type``.
        seed: of the weights.
        dtype: of the weights.
        max_shard_size: the default gives several shards.
        options: hyperparameters that differ from the small defaults.
    """
    config_class, model_class = _CLASSES[architecture]
    sizes = _SIZES | _SIZES_OF.get(architecture, {}) | options
    if architecture.startswith("gemma"):
        # llama.cpp knows no other factor of the scores.
        sizes = {"query_pre_attn_scalar": sizes["head_dim"]} | sizes
    norm_center = 0.0 if architecture.startswith("gemma") else 1.0
    model = model_class(config_class(**sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(norm_center + 0.2 * noise if "norm" in name else 0.1 * noise)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def canonical_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Canonical name to values: fused matrices in their parts, a tied head left out."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_rows = config.num_key_value_heads * head_dim
    parts = {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": config.num_attention_heads * head_dim,
            "self_attn.k_proj": kv_rows,
            "self_attn.v_proj": kv_rows,
        },
        "mlp.gate_up_proj": {
            "mlp.gate_proj": config.intermediate_size,
            "mlp.up_proj": config.intermediate_size,
        },
    }
    state = {}
    for name, values in model.state_dict().items():
        fused = next((key for key in parts if f".{key}." in name), None)
        if fused is not None:
            pieces = torch.split(values, list(parts[fused].values()))
            state |= {name.replace(fused, part): x for part, x in zip(parts[fused], pieces, strict=True)}
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            state[name] = values
    return state
