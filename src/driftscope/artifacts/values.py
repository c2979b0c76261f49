"""Single values of a parsed configuration file, checked, with a message that names the key and the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from driftscope.errors import InputError

# No model is near it; products of two counts below it stay exact in every arithmetic used here.
_MAX_COUNT = 2**31 - 1
_MAX_F32 = float(np.finfo(np.float32).max)


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
        raise InputError(f"{where}: {key} is {short(value)}; expected a positive whole number")
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
    raise InputError(f"{where}: {key} is {short(value)}; expected a finite number")


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
        raise InputError(f"{where}: {key} is {short(value)}; expected true or false")
    return value


def shortest(value: float) -> float:
    """The shortest decimal that rounds to a number stored as f32; any other number as it is.

    0.00001 is then the same number in GGUF's f32 and in config.json.
    """
    if abs(value) > _MAX_F32 or float(np.float32(value)) != value:
        return value
    return float(str(np.float32(value)))


def short(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
