"""config.json of a model, in the form that transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.artifacts.apr.config import HF_CONFIG
from driftscope.artifacts.config import text_part
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.tokenizers.vocabulary import Vocabulary
from driftscope.errors import InputError

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_SPECIAL = ("bos_token", "eos_token", "pad_token")
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def hf_config(artifact: Artifact, dtype: str, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The configuration of an artifact for a safetensors copy of it.

    An artifact that has a configuration of this form keeps it, or the text part of it, without its
    quantization; that of another is written from its hyperparameters.

    Args:
        artifact: the source.
        dtype: format of the copy's tensors (``F32``, ``F16``, ``BF16``).
        vocabulary: names the special token ids, or None.

    Raises:
        InputError: an architecture that has no Hugging Face class here.
    """
    own = artifact.metadata if artifact.container == "safetensors" else artifact.metadata.get(HF_CONFIG)
    if isinstance(own, Mapping):
        text = text_part(own, str(artifact.path))
        config = {key: value for key, value in text.items() if key != "quantization_config"}
        config.pop("torch_dtype", None)
        if text is not own:
            config["architectures"] = [_CLASSES[artifact.config.architecture]]
        return {**config, "dtype": _TORCH_DTYPES[dtype]}
    model = artifact.config
    if model.architecture not in _CLASSES:
        raise InputError(
            f"{artifact.path}: architecture {model.architecture!r} cannot be written as safetensors; "
            f"expected one of {', '.join(sorted(_CLASSES))}"
        )
    config = {
        "architectures": [_CLASSES[model.architecture]],
        "model_type": model.architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": _rope_parameters(model),
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "dtype": _TORCH_DTYPES[dtype],
        **_switches(model),
    }
    if model.architecture not in ("llama", "mistral", "qwen2", "qwen3"):
        # transformers has numbers of its own for these, which may lie outside of the vocabulary.
        config |= {f"{name}_id": None for name in _SPECIAL}
    if vocabulary is not None:
        for name, index in vocabulary.special.items():
            if name in _SPECIAL:
                config[f"{name}_id"] = index
    return config


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """RoPE in the form of transformers 5, which for Gemma 3 has one object for each kind of layer."""
    rope = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rope_theta}
    if model.architecture == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": model.local_rope_theta or model.rope_theta}
        return {"full_attention": rope, "sliding_attention": local}
    if model.rotary_dim is not None:
        rope["partial_rotary_factor"] = model.rotary_dim / model.head_dim
    return rope


def _switches(model: ModelConfig) -> dict[str, Any]:
    """The keys that not all architectures have."""
    window: dict[str, Any] = {"sliding_window": model.sliding_window}
    layer_types = {
        "layer_types": [
            "full_attention" if model.window_of(layer) is None else "sliding_attention"
            for layer in range(model.num_layers)
        ]
    }
    if model.architecture.startswith("gemma"):
        scale = model.attention_scale
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "query_pre_attn_scalar": model.head_dim if scale is None else round(scale**-2),
            "attn_logit_softcapping": model.attention_softcap,
            "final_logit_softcapping": model.logit_softcap,
            # transformers wants a number even where no layer has a window.
            "sliding_window": model.sliding_window or model.context_length,
            **layer_types,
        }
    switches: dict[str, Any] = {"hidden_act": "silu"}
    if model.architecture == "llama":
        return switches | {"attention_bias": model.attention_bias, "mlp_bias": False}
    if model.architecture in ("mistral", "phi3"):
        switches |= window
    if model.architecture == "phi3" and model.rope_scaling is not None:
        # Outside of the scaling, where transformers looks first.
        length = model.rope_scaling["original_max_position_embeddings"]
        switches["original_max_position_embeddings"] = length
    if model.architecture == "qwen3":
        switches["attention_bias"] = model.attention_bias
    if model.architecture in ("qwen2", "qwen3"):
        switches |= {"use_sliding_window": model.sliding_window is not None, **window}
        if model.sliding_window is not None:
            switches |= layer_types
    return switches
