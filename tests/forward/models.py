"""Small random models, written by transformers itself; between them every switch of the architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}

# Phi-3's own are beyond a small vocabulary.
_PHI3_TOKENS = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 1}

SWITCHES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3-scaling": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear-scaling": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-yarn": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.5,
            "beta_fast": 6.0,
        },
    },
    "mistral-window": {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 11,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_size": 112,
    },
    "qwen2-yarn": {
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_size": 224,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2-window": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 0,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3-windows": {
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 13,
        "attn_logit_softcapping": 8.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma3-capped": {
        "model_type": "gemma3_text",
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 10,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "final_logit_softcapping": 4.0,
    },
    "phi3": {
        "model_type": "phi3",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "sliding_window": 17,
        **_PHI3_TOKENS,
    },
    "phi3-partial": {
        "model_type": "phi3",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        **_PHI3_TOKENS,
    },
    "phi3-longrope": {
        "model_type": "phi3",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.25, 1.3],
            "long_factor": [1.1, 1.5, 2.0, 3.0, 5.0, 8.0],
        },
        **_PHI3_TOKENS,
    },
}
"""Name to the configuration of a model; 33 tokens are beyond every window and LongRoPE's training."""

AS_GGUF: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3-capped": {"query_pre_attn_scalar": 16},
}
"""Changes by which a model can be a GGUF file: llama.cpp scales Gemma's scores by the head size alone."""


def write_model(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random float32 model and return its folder.

    Weights are larger than transformers' own initialization, so that attention is not flat and every op
    matters to the logits; norms and biases are not left at one and zero.
    """
    config = transformers.AutoConfig.for_model(**{**_SHAPE, **SWITCHES[name], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("norm.weight"):
                parameter.copy_(centre + 0.2 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in key:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    return folder
