"""Hyperparameters of an .apr file: from its metadata, and where that is silent from the tensors' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.artifacts.config import SUPPORTED, config_from_hf, unsupported_architecture
from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.names import GGUF_ARCHITECTURES, layer_of
from driftscope.artifacts.values import count, number, short, shortest
from driftscope.errors import InputError

# An extra key of the metadata: the model's whole config.json. Written here, and read first: the keys of the
# format have no room for a sliding window, a RoPE scaling or a soft cap.
HF_CONFIG = "huggingface_config"

ROPE_NORM, ROPE_NEOX = 0, 2

# Key of the format to its name in config.json.
KEYS: dict[str, str] = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "head_dim": "head_dim",
}
_NUMBERS = ("rope_theta", "rms_norm_eps")

# Extra keys that mean what they mean in config.json.
_EXTRA = (
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "hidden_act",
    "hidden_activation",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "rope_local_base_freq",
    "sliding_window_pattern",
)

# transformers gives these a window where config.json does not deny it; here no key means none.
_WINDOW_BY_DEFAULT = ("mistral", "phi3")

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = Mapping[str, tuple[int, ...]]


def architecture_of(metadata: Mapping[str, Any], where: str) -> str:
    """Hugging Face's ``model_type``, from the first key that names an architecture known here.

    Writers put it into ``hf_model_type``, ``architecture`` or ``model_type``, by Hugging Face's or by GGUF's
    name, in upper or lower case.

    Raises:
        InputError: none of them does.
    """
    document = metadata.get(HF_CONFIG)
    keys = [metadata.get(key) for key in ("hf_model_type", "architecture", "model_type")]
    if isinstance(document, Mapping):
        keys.insert(0, document.get("model_type"))
    named = [value for value in keys if isinstance(value, str) and value]
    by_gguf = {gguf: name for name, gguf in reversed(GGUF_ARCHITECTURES.items())}
    for value in named:
        name = value.lower().removesuffix("forcausallm")
        if name in SUPPORTED:
            return name
        if name in by_gguf:
            return by_gguf[name]
    raise unsupported_architecture(named[0] if named else None, where, "architecture")


def rows_are_interleaved(metadata: Mapping[str, Any], where: str) -> bool | None:
    """Whether the rows of a head lie in neighbouring pairs (``rope_type`` 0); None where no key says so.

    Raises:
        InputError: a ``rope_type`` that is neither 0 (NORM) nor 2 (NEOX).
    """
    kind = metadata.get("rope_type")
    if kind is None:
        return None
    if isinstance(kind, bool) or kind not in (ROPE_NORM, ROPE_NEOX):
        raise InputError(f"{where}: rope_type is {short(kind)}; expected 0 (NORM) or 2 (NEOX)")
    return bool(kind == ROPE_NORM)


def config_from_apr(
    metadata: Mapping[str, Any], shapes: Shapes, where: str, *, tied: bool | None = None
) -> ModelConfig:
    """Read the hyperparameters of an .apr file.

    Args:
        metadata: the JSON object.
        shapes: canonical name to shape.
        where: the file, for messages.
        tied: whether the head is the embedding; by default where there is no head.

    Raises:
        InputError: an unknown architecture, a value that is nonsensical, or missing and not to be told from
            the shapes, or keys that contradict the model's ``config.json`` in the same file.
    """
    architecture = architecture_of(metadata, where)
    own = metadata.get(HF_CONFIG)
    if own is not None:
        if not isinstance(own, Mapping):
            raise InputError(f"{where}: {HF_CONFIG} is {short(own)}; expected an object")
        config = config_from_hf(own, f"{where}: {HF_CONFIG}")
        _check_agreement(metadata, config, where)
        return config
    document: dict[str, Any] = {key: metadata[key] for key in _EXTRA if metadata.get(key) is not None}
    document |= {
        "model_type": architecture,
        "tie_word_embeddings": _HEAD not in shapes if tied is None else tied,
    }
    document |= {name: value for key, name in KEYS.items() if (value := _stated(metadata, key, where))}
    document |= {key: value for key, value in _sizes(document, shapes).items() if key not in document}
    # transformers has defaults for some of these; a file without them has lost its own.
    missing = [key for key, name in KEYS.items() if name not in document]
    if missing:
        raise InputError(f"{where}: {missing[0]} is missing, and the shapes of the tensors do not tell it")
    if architecture in _WINDOW_BY_DEFAULT:
        document.setdefault("sliding_window", None)
    return config_from_hf(document, where)


def _stated(metadata: Mapping[str, Any], key: str, where: str) -> int | float | None:
    """The value of a key of the format, or of its name in config.json; f32 as the shortest decimal."""
    name = key if metadata.get(key) is not None else KEYS[key]
    if metadata.get(name) is None:
        return None
    if key in _NUMBERS:
        return shortest(number(metadata, name, where))
    return count(metadata, name, where)


def _sizes(document: Mapping[str, Any], shapes: Shapes) -> dict[str, int]:
    """Hyperparameters that the shapes leave no doubt about, by their names in config.json."""
    found: dict[str, int] = {}
    embedding = shapes.get(_EMBEDDING, ())
    if len(embedding) == 2:
        found |= {"vocab_size": embedding[0], "hidden_size": embedding[1]}
    layers = [layer for name in shapes if (layer := layer_of(name)) is not None]
    if layers:
        found["num_hidden_layers"] = 1 + max(layers)
    gate = shapes.get("model.layers.0.mlp.gate_proj.weight", ())
    if len(gate) == 2:
        found["intermediate_size"] = gate[0]
    head_dim = document.get("head_dim")
    norm = shapes.get("model.layers.0.self_attn.q_norm.weight", ())
    if not head_dim and len(norm) == 1:
        head_dim = norm[0]
    q, k = (shapes.get(f"model.layers.0.self_attn.{site}_proj.weight", ()) for site in "qk")
    heads = document.get("num_attention_heads")
    if not head_dim and heads and len(q) == 2 and q[0] % heads == 0:
        head_dim = q[0] // heads
    if head_dim:
        found["head_dim"] = head_dim
        for key, shape in (("num_attention_heads", q), ("num_key_value_heads", k)):
            if len(shape) == 2 and shape[0] % head_dim == 0:
                found[key] = shape[0] // head_dim
    return {key: value for key, value in found.items() if value}


def _check_agreement(metadata: Mapping[str, Any], config: ModelConfig, where: str) -> None:
    """The keys of the format say nothing else than the model's own config.json."""
    fields = {
        key: getattr(config, "context_length" if key == "max_position_embeddings" else key) for key in KEYS
    }
    for key, expected in fields.items():
        found = _stated(metadata, key, where)
        if found is not None and found != shortest(expected):
            raise InputError(f"{where}: {key} is {found}, but {HF_CONFIG} says {expected}")
