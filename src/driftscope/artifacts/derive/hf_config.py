"""config.json of a model, in the form that transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.artifacts.apr_config import HF_CONFIG
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.vocabulary import Vocabulary
from driftscope.errors import InputError

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def hf_config(artifact: Artifact, dtype: str, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The configuration of an artifact for a safetensors copy of it.

    An artifact that has a configuration of this form keeps it, without its quantization; that of another is
    written from its hyperparameters.

    Args:
        artifact: the source.
        dtype: format of the copy's tensors (``F32``, ``F16``, ``BF16``).
        vocabulary: names the special token ids, or None.

    Raises:
        InputError: an architecture that has no Hugging Face class here.
    """
    own = artifact.metadata if artifact.container == "safetensors" else artifact.metadata.get(HF_CONFIG)
    if isinstance(own, Mapping):
        config = {key: value for key, value in own.items() if key != "quantization_config"}
        config.pop("torch_dtype", None)
        return {**config, "dtype": _TORCH_DTYPES[dtype]}
    model = artifact.config
    if model.architecture not in _CLASSES:
        raise InputError(
            f"{artifact.path}: architecture {model.architecture!r} cannot be written as safetensors; "
            f"expected one of {', '.join(sorted(_CLASSES))}"
        )
    rope = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rope_theta}
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
        "hidden_act": "silu",
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "dtype": _TORCH_DTYPES[dtype],
    }
    if model.architecture == "llama":
        config |= {"attention_bias": model.attention_bias, "mlp_bias": False}
    if model.architecture == "qwen3":
        config["attention_bias"] = model.attention_bias
    if model.architecture == "mistral":
        config["sliding_window"] = model.sliding_window
    if model.architecture in ("qwen2", "qwen3"):
        config |= {
            "use_sliding_window": model.sliding_window is not None,
            "sliding_window": model.sliding_window,
        }
    if vocabulary is not None:
        for name, index in vocabulary.special.items():
            if name in ("bos_token", "eos_token", "pad_token"):
                config[f"{name}_id"] = index
    return config
