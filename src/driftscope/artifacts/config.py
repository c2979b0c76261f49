"""Hyperparameters from Hugging Face's ``config.json``, and the checks that those of any container pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.rope_config import rope_from_hf
from driftscope.artifacts.scaled import check_quantization
from driftscope.artifacts.values import count, epsilon, flag, positive, short
from driftscope.artifacts.windows import windows_from_hf
from driftscope.errors import InputError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
MAX_LAYERS = 4096

# A model of text and images, of which the text part is read.
_WITH_IMAGES = {"gemma3": "gemma3_text"}

# What transformers takes where config.json is silent (``configuration_<model_type>.py``). Sizes have
# defaults here only where published files leave them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "phi3": {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}
_DEFAULT_EPS = 1e-6

# Switches that change the forward pass in a way that is not implemented, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "pretraining_tp": (0, 1),
    "use_bidirectional_attention": (False,),
}
_NEUTRAL_OF_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
# Gemma's files may have a ``hidden_act`` too, which transformers does not read.
_NEUTRAL_OF_GELU: dict[str, tuple[Any, ...]] = {"hidden_activation": ("gelu_pytorch_tanh",)}


def config_from_hf(document: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a parsed ``config.json``.

    Keys of transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) are understood.
    Of a model of text and images, the text part is read (``text_config``).

    Args:
        document: the parsed file.
        where: the file, for messages.

    Raises:
        InputError: an unknown architecture, a missing or nonsensical value, or a switch that would change
            the forward pass in a way that is not implemented.
    """
    document = text_part(document, where)
    architecture = document.get("model_type")
    if architecture not in SUPPORTED:
        raise unsupported_architecture(architecture, where, "model_type")
    document = _DEFAULTS[architecture] | dict(document)
    is_gemma = architecture.startswith("gemma")
    for key, neutral in (_NEUTRAL | (_NEUTRAL_OF_GELU if is_gemma else _NEUTRAL_OF_SILU)).items():
        value = document.get(key)
        if value is not None and value not in neutral:
            raise InputError(f"{where}: {key} is {short(value)}, which is not supported")
    if document.get("quantization_config") is not None:
        check_quantization(document["quantization_config"], where)
    if document.get("attention_bias") and architecture != "qwen2":
        raise InputError(
            f"{where}: attention_bias is true; expected false for {architecture} "
            "(a bias on the attention output is not supported)"
        )
    hidden_size = count(document, "hidden_size", where)
    num_layers = checked_layers(count(document, "num_hidden_layers", where), where)
    num_heads = count(document, "num_attention_heads", where)
    head_dim = count(document, "head_dim", where, default=0)
    if not head_dim:
        if hidden_size % num_heads:
            raise InputError(
                f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    window, sliding_layers = windows_from_hf(document, architecture, num_layers, where)
    rope = rope_from_hf(
        document, architecture, head_dim=head_dim, has_local_layers=window is not None, where=where
    )
    return checked(
        ModelConfig(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            # Null means one for each query head.
            num_kv_heads=count(document, "num_key_value_heads", where, default=num_heads),
            head_dim=head_dim,
            intermediate_size=count(document, "intermediate_size", where),
            vocab_size=count(document, "vocab_size", where),
            context_length=count(document, "max_position_embeddings", where),
            rms_norm_eps=epsilon(document, "rms_norm_eps", where, default=_DEFAULT_EPS),
            attention_bias=architecture == "qwen2",
            qk_norm=has_qk_norm(architecture),
            tie_word_embeddings=flag(document, "tie_word_embeddings", where),
            sliding_window=window,
            sliding_layers=sliding_layers,
            **asdict(rope),
            **(_gemma_switches(document, architecture, head_dim, where) if is_gemma else {}),
        ),
        where,
    )


def text_part(document: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The configuration of the text model: the file itself, or its ``text_config``.

    Raises:
        InputError: a model of text and images without a ``text_config``.
    """
    architecture = document.get("model_type")
    if not isinstance(architecture, str) or architecture not in _WITH_IMAGES:
        return document
    text = document.get("text_config")
    if not isinstance(text, Mapping):
        raise InputError(f"{where}: text_config is {short(text)}; expected an object in {architecture}")
    outer = ("quantization_config", "tie_word_embeddings")
    kept = {key: document[key] for key in outer if key in document}
    return {**text, **kept, "model_type": _WITH_IMAGES[architecture]}


def has_qk_norm(architecture: str) -> bool:
    """Whether queries and keys have norms of their own."""
    return architecture in ("qwen3", "gemma3_text")


def gemma_constants(hidden_size: int) -> dict[str, Any]:
    """The switches that all of Gemma 2 and 3 share."""
    return {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": float(hidden_size) ** 0.5,
    }


def checked(config: ModelConfig, where: str) -> ModelConfig:
    """Return `config` if its values fit together.

    Raises:
        InputError: names the first that does not, in Hugging Face's terms.
    """
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"{where}: {config.num_heads} attention heads do not share {config.num_kv_heads} "
            "key/value heads evenly"
        )
    if config.head_dim % 2:
        raise InputError(f"{where}: head_dim is {config.head_dim}; RoPE needs an even number")
    rotary_dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= config.head_dim:
        raise InputError(
            f"{where}: RoPE turns {rotary_dim} channels of a head; expected an even number up to "
            f"{config.head_dim}"
        )
    return config


def checked_layers(num_layers: int, where: str) -> int:
    """Return a number of layers that lists may be made of.

    Raises:
        InputError: there are too many.
    """
    if num_layers > MAX_LAYERS:
        raise InputError(f"{where}: {num_layers} layers; expected at most {MAX_LAYERS}")
    return num_layers


def unsupported_architecture(architecture: object, where: str, key: str) -> InputError:
    """The error for an architecture that has no forward pass here."""
    if architecture is None:
        return InputError(f"{where}: {key} is missing; expected one of {', '.join(SUPPORTED)}")
    return InputError(
        f"{where}: architecture {short(architecture)} is not supported; "
        f"expected one of {', '.join(SUPPORTED)}"
    )


def _gemma_switches(
    document: Mapping[str, Any], architecture: str, head_dim: int, where: str
) -> dict[str, Any]:
    """The fields of `ModelConfig` that only Gemma 2 and 3 set."""
    attention_cap = _cap(document, "attn_logit_softcapping", where)
    if attention_cap is not None and architecture != "gemma2":
        raise InputError(
            f"{where}: attn_logit_softcapping is {attention_cap}, which is not supported in {architecture}"
        )
    scalar = positive(document, "query_pre_attn_scalar", where)
    return gemma_constants(count(document, "hidden_size", where)) | {
        "attention_scale": None if scalar == head_dim else scalar**-0.5,
        "attention_softcap": attention_cap,
        "logit_softcap": _cap(document, "final_logit_softcapping", where),
    }


def _cap(document: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if document.get(key) is None else positive(document, key, where)
