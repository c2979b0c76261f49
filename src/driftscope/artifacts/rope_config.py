"""RoPE's parameters in Hugging Face's ``config.json``, of transformers 4 and of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from driftscope.artifacts.values import count, number, positive, short, shortest
from driftscope.artifacts.yarn import longrope_attention_factor
from driftscope.errors import InputError

ROPE_TYPES = ("default", "linear", "llama3", "longrope", "yarn")

_DEFAULT_THETA = 10000.0
_DEFAULT_GLOBAL_THETA = 1e6

_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_MIN_F32, _MAX_F32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_LISTS = ("short_factor", "long_factor")
# Held by other fields of `ModelConfig`.
_ELSEWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# What Phi-3's first files call LongRoPE.
_PHI3_ALIASES = ("su", "yarn")


@dataclass(frozen=True)
class Rope:
    """The fields of `ModelConfig` of the same names."""

    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    local_rope_theta: float | None = None
    rotary_dim: int | None = None


def rope_from_hf(
    document: Mapping[str, Any], architecture: str, *, head_dim: int, has_local_layers: bool, where: str
) -> Rope:
    """Read theta, the scaling, and the number of channels that turn.

    Args:
        document: the parsed file, or the text part of one.
        architecture: Hugging Face's ``model_type``.
        head_dim: channels of a head.
        has_local_layers: whether a layer has a sliding window.
        where: the file, for messages.

    Raises:
        InputError: a value is missing or makes no sense, or the kind of RoPE is not implemented.
    """
    if architecture == "gemma3_text":
        return _of_two_kinds_of_layers(document, has_local_layers, where)
    scaling = dict(_object(document, "rope_parameters", where) or _object(document, "rope_scaling", where))
    theta = positive(document, "rope_theta", where, default=_DEFAULT_THETA)
    theta = positive(scaling, "rope_theta", where, default=theta)
    if architecture == "phi3":
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in _PHI3_ALIASES:
            scaling["rope_type"] = "longrope"
        elif kind not in (None, "default", "longrope"):
            raise InputError(
                f"{where}: RoPE scaling {short(kind)} is not supported in phi3; expected longrope"
            )
    rotary = _rotary_dim(document, scaling, architecture, head_dim, where)
    if scaling.get("rope_type", scaling.get("type")) == "longrope":
        scaling = _longrope(document, scaling, rotary, where)
    return Rope(theta, checked_rope_scaling(scaling, where), None, None if rotary == head_dim else rotary)


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
            f"{where}: RoPE scaling {short(kind)} is not supported; expected one of {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return None
    result = {key: value for key, value in scaling.items() if key not in _ELSEWHERE and value is not None}
    for key, value in result.items():
        if isinstance(value, bool) or key == "finetuned":
            continue
        if key in _LISTS:
            result[key] = _positive_list(result, key, where)
            continue
        result[key] = number(result, key, where)
        if result[key] < 0 or (key == "factor" and result[key] == 0):
            raise InputError(f"{where}: {key} of the RoPE scaling is {short(value)}; expected more than 0")
        if isinstance(value, int):
            result[key] = value
    for key in _REQUIRED[kind]:
        if key not in result:
            raise InputError(f"{where}: RoPE scaling {kind!r} lacks {key}")
    if kind == "llama3" and result["low_freq_factor"] >= result["high_freq_factor"]:
        raise InputError(f"{where}: low_freq_factor of the RoPE scaling is not below high_freq_factor")
    return {"rope_type": kind, **result}


def _object(document: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A mapping, empty where the key is missing or null."""
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: the RoPE scaling is {short(value)}; expected an object")
    return value


def _of_two_kinds_of_layers(document: Mapping[str, Any], has_local_layers: bool, where: str) -> Rope:
    """Gemma 3's: one theta for the layers with a window, another and a scaling for those without."""
    parameters = _object(document, "rope_parameters", where)
    if parameters and not parameters.keys() <= {"full_attention", "sliding_attention"}:
        raise InputError(
            f"{where}: rope_parameters is {short(dict(parameters))}; "
            "expected one object for full_attention and one for sliding_attention"
        )
    full = _object(parameters, "full_attention", where) or _object(document, "rope_scaling", where)
    sliding = _object(parameters, "sliding_attention", where)
    theta = positive(document, "rope_theta", where, default=_DEFAULT_GLOBAL_THETA)
    local = positive(document, "rope_local_base_freq", where, default=_DEFAULT_THETA)
    if checked_rope_scaling(sliding, where) is not None:
        raise InputError(f"{where}: a RoPE scaling of the layers with a sliding window is not supported")
    for part in (full, sliding):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise InputError(
                f"{where}: partial_rotary_factor is {short(part['partial_rotary_factor'])}, "
                "which is not supported in gemma3_text"
            )
    return Rope(
        rope_theta=positive(full, "rope_theta", where, default=theta),
        rope_scaling=checked_rope_scaling(full, where),
        local_rope_theta=positive(sliding, "rope_theta", where, default=local) if has_local_layers else None,
    )


def _rotary_dim(
    document: Mapping[str, Any], scaling: Mapping[str, Any], architecture: str, head_dim: int, where: str
) -> int:
    """Channels of a head that turn; only Phi-3 has fewer than all."""
    holder = scaling if scaling.get("partial_rotary_factor") is not None else document
    share = positive(holder, "partial_rotary_factor", where, default=1.0)
    if share != 1 and architecture != "phi3":
        raise InputError(
            f"{where}: partial_rotary_factor is {short(holder['partial_rotary_factor'])}, "
            f"which is not supported in {architecture}"
        )
    if share > 1:
        raise InputError(f"{where}: partial_rotary_factor is {share}; expected at most 1")
    return int(head_dim * share)


def _longrope(
    document: Mapping[str, Any], scaling: Mapping[str, Any], rotary_dim: int, where: str
) -> dict[str, Any]:
    """LongRoPE's parameters with all that transformers derives from other keys."""
    result = dict(scaling)
    # A length outside of the scaling goes first, as in transformers.
    length = document.get("original_max_position_embeddings", result.get("original_max_position_embeddings"))
    length = count({"original_max_position_embeddings": length}, "original_max_position_embeddings", where)
    if length < 2:
        raise InputError(f"{where}: original_max_position_embeddings is {length}; expected at least 2")
    result["original_max_position_embeddings"] = length
    stretch = count(document, "max_position_embeddings", where) / length
    factor = positive(result, "factor", where, default=stretch)
    result.pop("factor", None)
    if result.get("attention_factor") is None:
        # In f32, as transformers multiplies by it and as GGUF stores it.
        result["attention_factor"] = shortest(float(np.float32(longrope_attention_factor(factor, length))))
    half = rotary_dim // 2
    for key in _LISTS:
        if isinstance(result.get(key), list) and len(result[key]) != half:
            raise InputError(
                f"{where}: {key} of the RoPE scaling has {len(result[key])} numbers; expected {half}"
            )
    return result


def _positive_list(document: Mapping[str, Any], key: str, where: str) -> list[float]:
    """Positive numbers, in f32 as transformers computes with them and as GGUF stores them."""
    values = document[key]
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"{where}: {key} of the RoPE scaling is {short(values)}; expected a list of numbers")
    numbers = []
    for index, value in enumerate(values):
        name = f"{key}[{index}]"
        found = positive({name: value}, name, where)
        if not _MIN_F32 <= found <= _MAX_F32:
            raise InputError(f"{where}: {name} is {found}; expected a positive number that f32 can hold")
        numbers.append(shortest(float(np.float32(found))))
    return numbers
