"""Hyperparameters from Hugging Face's ``config.json``, and the checks that those of any container pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from driftscope.artifacts.model import ModelConfig
from driftscope.errors import InputError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# No model is near it; products of two counts below it stay exact in every arithmetic used here.
_MAX_COUNT = 2**31 - 1
MAX_LAYERS = 4096

# What transformers takes where config.json is silent (``configuration_<model_type>.py``).
_DEFAULT_EPS = 1e-6
_DEFAULT_THETA = 10000.0
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_WINDOW = {"mistral": 4096}

# Switches that change the forward pass in a way that is not implemented, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (0, 1),
    "quantization_config": (),
}


def config_from_hf(document: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a parsed ``config.json``.

    Keys of transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) are understood.

    Args:
        document: the parsed file.
        where: the file, for messages.

    Raises:
        InputError: an unknown architecture, a missing or nonsensical value, or a switch that would change
            the forward pass in a way that is not implemented.
    """
    architecture = document.get("model_type")
    if architecture not in SUPPORTED:
        raise unsupported_architecture(architecture, where, "model_type")
    for key, neutral in _NEUTRAL.items():
        value = document.get(key)
        if value is not None and value not in neutral:
            raise InputError(f"{where}: {key} is {_short(value)}, which is not supported")
    if document.get("attention_bias") and architecture != "qwen2":
        raise InputError(
            f"{where}: attention_bias is true; expected false for {architecture} "
            "(a bias on the attention output is not supported)"
        )
    hidden_size = count(document, "hidden_size", where)
    num_layers = count(document, "num_hidden_layers", where)
    num_heads = count(document, "num_attention_heads", where)
    head_dim = count(document, "head_dim", where, default=_DEFAULT_HEAD_DIM.get(architecture, 0))
    if not head_dim:
        if hidden_size % num_heads:
            raise InputError(
                f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    theta, scaling = _rope(document, where)
    return checked(
        ModelConfig(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_kv_heads(document, architecture, num_heads, where),
            head_dim=head_dim,
            intermediate_size=count(document, "intermediate_size", where),
            vocab_size=count(document, "vocab_size", where),
            context_length=count(document, "max_position_embeddings", where),
            rms_norm_eps=epsilon(document, "rms_norm_eps", where, default=_DEFAULT_EPS),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tie_word_embeddings=flag(document, "tie_word_embeddings", where),
            sliding_window=_sliding_window(document, architecture, num_layers, where),
        ),
        where,
    )


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
    if config.num_layers > MAX_LAYERS:
        raise InputError(f"{where}: {config.num_layers} layers; expected at most {MAX_LAYERS}")
    return config


def checked_rope_scaling(scaling: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """RoPE scaling under its ``rope_type``, without theta; None where it changes nothing.

    Raises:
        InputError: an unknown type, or a factor that is missing or nonsensical.
    """
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise InputError(f"{where}: RoPE parameters that differ between layers are not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(
            f"{where}: RoPE scaling {_short(kind)} is not supported; expected one of {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return None
    dropped = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    result = {key: value for key, value in scaling.items() if key not in dropped and value is not None}
    for key, value in result.items():
        if isinstance(value, bool) or key == "finetuned":
            continue
        result[key] = number(result, key, where)
        if result[key] < 0 or (key == "factor" and result[key] == 0):
            raise InputError(f"{where}: {key} of the RoPE scaling is {_short(value)}; expected more than 0")
        if isinstance(value, int):
            result[key] = value
    required = {
        "linear": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    for key in required[kind]:
        if key not in result:
            raise InputError(f"{where}: RoPE scaling {kind!r} lacks {key}")
    if kind == "llama3" and result["low_freq_factor"] >= result["high_freq_factor"]:
        raise InputError(f"{where}: low_freq_factor of the RoPE scaling is not below high_freq_factor")
    return {"rope_type": kind, **result}


def count(document: Mapping[str, Any], key: str, where: str, *, default: int | None = None) -> int:
    """A positive whole number.

    Args:
        document: where to look; null is as good as missing.
        key: what to look for.
        where: the file, for the message.
        default: for a missing key; None makes the key mandatory.
    """
    value = document.get(key)
    if value is None:
        if default is None:
            raise InputError(f"{where}: {key} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_COUNT:
        raise InputError(f"{where}: {key} is {_short(value)}; expected a positive whole number")
    return value


def number(document: Mapping[str, Any], key: str, where: str, *, default: float | None = None) -> float:
    """A finite number; arguments as those of `count`."""
    value = document.get(key)
    if value is None:
        if default is None:
            raise InputError(f"{where}: {key} is missing")
        return default
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise InputError(f"{where}: {key} is {_short(value)}; expected a finite number")


def epsilon(document: Mapping[str, Any], key: str, where: str, *, default: float | None = None) -> float:
    """A number from 0 to 1, without 1; arguments as those of `count`."""
    value = number(document, key, where, default=default)
    if not 0 <= value < 1:
        raise InputError(f"{where}: {key} is {value}; expected a number from 0 to 1")
    return value


def positive(document: Mapping[str, Any], key: str, where: str, *, default: float | None = None) -> float:
    """A number above 0; arguments as those of `count`."""
    value = number(document, key, where, default=default)
    if value <= 0:
        raise InputError(f"{where}: {key} is {value}; expected a positive number")
    return value


def flag(document: Mapping[str, Any], key: str, where: str, *, default: bool = False) -> bool:
    """True or false; arguments as those of `count`."""
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key} is {_short(value)}; expected true or false")
    return value


def unsupported_architecture(architecture: object, where: str, key: str) -> InputError:
    """The error for an architecture that has no forward pass here."""
    if architecture is None:
        return InputError(f"{where}: {key} is missing; expected one of {', '.join(SUPPORTED)}")
    return InputError(
        f"{where}: architecture {_short(architecture)} is not supported; "
        f"expected one of {', '.join(SUPPORTED)}"
    )


def _kv_heads(document: Mapping[str, Any], architecture: str, num_heads: int, where: str) -> int:
    """Key/value heads; null means one for each query head, and a missing key the architecture's default."""
    default = num_heads
    if "num_key_value_heads" not in document:
        default = _DEFAULT_KV_HEADS.get(architecture, num_heads)
    return count(document, "num_key_value_heads", where, default=default)


def _rope(document: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from the keys of transformers 5 or, where they are absent, of transformers 4."""
    scaling = document.get("rope_parameters")
    if scaling is None:
        scaling = document.get("rope_scaling")
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, Mapping):
        raise InputError(f"{where}: the RoPE scaling is {_short(scaling)}; expected an object")
    partial = scaling.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise InputError(f"{where}: partial_rotary_factor is {_short(partial)}, which is not supported")
    theta = positive(document, "rope_theta", where, default=_DEFAULT_THETA)
    return positive(scaling, "rope_theta", where, default=theta), checked_rope_scaling(scaling, where)


def _sliding_window(
    document: Mapping[str, Any], architecture: str, num_layers: int, where: str
) -> int | None:
    """Tokens that a query sees, or None; one window must serve all layers."""
    if architecture == "llama":
        return None
    if architecture == "mistral":
        if "sliding_window" in document and document["sliding_window"] is None:
            return None
        return count(document, "sliding_window", where, default=_DEFAULT_WINDOW["mistral"])
    if not flag(document, "use_sliding_window", where) or document.get("sliding_window") is None:
        return None
    window = count(document, "sliding_window", where)
    layer_types = document.get("layer_types")
    if layer_types is None:
        first = document.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise InputError(f"{where}: max_window_layers is {_short(first)}; expected a whole number")
        windowed = [layer >= first for layer in range(num_layers)]
    elif isinstance(layer_types, list) and len(layer_types) == num_layers:
        windowed = [kind == "sliding_attention" for kind in layer_types]
    else:
        raise InputError(f"{where}: layer_types is not a list of {num_layers} names")
    if any(windowed) and not all(windowed):
        raise InputError(
            f"{where}: a sliding window on {sum(windowed)} of {num_layers} layers is not supported; "
            "expected all or none"
        )
    return window if all(windowed) else None


def _short(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
