"""Which layers have a sliding window, from Hugging Face's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from driftscope.artifacts.values import count, flag, short
from driftscope.errors import InputError

LAYER_TYPES = ("full_attention", "sliding_attention")

Windows = tuple[int | None, tuple[int, ...] | None]
"""`ModelConfig.sliding_window` and `ModelConfig.sliding_layers`."""


def windows_from_hf(document: Mapping[str, Any], architecture: str, num_layers: int, where: str) -> Windows:
    """The window and its layers.

    Raises:
        InputError: a value that makes no sense, or a kind of attention that is not implemented.
    """
    if architecture == "llama":
        return None, None
    if architecture in ("mistral", "phi3"):
        if document.get("sliding_window") is None:
            return None, None
        return count(document, "sliding_window", where), None
    if architecture.startswith("gemma"):
        windowed = _layer_types(document, num_layers, where)
        if windowed is None:
            windowed = _every_nth_is_full(document, architecture, num_layers, where)
        return window_on(count(document, "sliding_window", where), windowed)
    if not flag(document, "use_sliding_window", where) or document.get("sliding_window") is None:
        return None, None
    window = count(document, "sliding_window", where)
    windowed = _layer_types(document, num_layers, where)
    if windowed is None:
        first = document.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise InputError(f"{where}: max_window_layers is {short(first)}; expected a whole number")
        windowed = [layer >= first for layer in range(num_layers)]
    return window_on(window, windowed)


def window_on(window: int, windowed: Sequence[bool]) -> Windows:
    """The window and its layers, where each layer says whether it has one."""
    layers = tuple(layer for layer, has_one in enumerate(windowed) if has_one)
    if not layers:
        return None, None
    return window, None if len(layers) == len(windowed) else layers


def _layer_types(document: Mapping[str, Any], num_layers: int, where: str) -> list[bool] | None:
    """Whether each layer has a window, or None where the file has no ``layer_types``."""
    kinds = document.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise InputError(f"{where}: layer_types is not a list of {num_layers} names")
    unknown = next((kind for kind in kinds if kind not in LAYER_TYPES), None)
    if unknown is not None:
        raise InputError(
            f"{where}: layer_types has {short(unknown)}, which is not supported; "
            f"expected {' or '.join(LAYER_TYPES)}"
        )
    return [kind == "sliding_attention" for kind in kinds]


def _every_nth_is_full(
    document: Mapping[str, Any], architecture: str, num_layers: int, where: str
) -> list[bool]:
    """Gemma's pattern: each second layer, in Gemma 3 each sixth or what the file says, has no window."""
    period = 2
    if architecture != "gemma2":
        keys = ("sliding_window_pattern", "_sliding_window_pattern")
        key = next((key for key in keys if document.get(key) is not None), keys[0])
        period = count(document, key, where, default=6)
    return [bool((layer + 1) % period) for layer in range(num_layers)]
