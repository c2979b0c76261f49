"""Numbers in words: one way of writing counts, shares, small errors and digests."""

from __future__ import annotations

import math
from typing import Any

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
MISSING = "–"


def number(value: Any, digits: int = 3) -> str:
    """Write a number with `digits` significant digits: plain near one, as a power of ten elsewhere.

    None and non-finite values are written as what they are.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -3 <= power < 5:
        decimals = max(digits - 1 - power, 0)
        return f"{value:,.{decimals}f}".replace("-", "−")
    return f"{mantissa} × 10{str(power).translate(_SUPERSCRIPTS)}".replace("-", "−", 1)


def power_of_ten(exponent: int) -> str:
    """Write a power of ten."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def count(value: Any) -> str:
    """Write a whole number with its thousands apart."""
    return MISSING if value is None else f"{value:,}"


def percent(share: Any, digits: int | None = None) -> str:
    """Write a share in [0, 1] as per cent, with as many decimals as its size asks for."""
    if share is None:
        return MISSING
    value = 100.0 * share
    if digits is None:
        size = abs(value)
        digits = 1 if size >= 1 or size == 0 else 2 if size >= 0.1 else 3
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return f"{text} %".replace("-", "−")


def percent_interval(low: Any, high: Any, digits: int | None = None) -> str:
    """Write an interval of shares as per cent, or nothing where it is not given."""
    if low is None or high is None:
        return ""
    if digits is None:
        widest = max(abs(low), abs(high)) * 100.0
        digits = 1 if widest >= 1 or widest == 0 else 2 if widest >= 0.1 else 3
    return f"{percent(low, digits).removesuffix(' %')} to {percent(high, digits)}"


def probability(value: Any) -> str:
    """Write a tail probability; one too small for a double is said to be smaller, not zero."""
    if value is None:
        return MISSING
    return f"< {power_of_ten(-300)}" if value < 1e-300 else number(float(value), 2)


def size(count_bytes: Any) -> str:
    """Write a number of bytes in decimal units."""
    if count_bytes is None:
        return MISSING
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def counted(value: int, singular: str, plural: str | None = None) -> str:
    """Write a count with its noun: ``1 tensor``, ``272 tensors``."""
    return f"{count(value)} {singular if value == 1 else plural or singular + 's'}"


def listed(names: list[str], limit: int = 3) -> str:
    """Name the first few of a list and count the rest."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {count(len(names) - limit)} more"
