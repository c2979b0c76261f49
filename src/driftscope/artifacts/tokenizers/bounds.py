"""What the steps of a ``tokenizer.json`` may make of a text.

The tokenizers library does what a file says, in memory that nothing bounds: three steps that put a thousand
characters in the place of each one make gigabytes of a word. Regular expressions are bounded by the library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from driftscope.errors import InputError

# Published tokenizers replace a space by one character and put one in front of a text.
_MAX_GROWTH = 1024
_MAX_STEPS = 64
_SECTIONS = ("normalizer", "pre_tokenizer", "decoder")
_TEXTS = ("content", "prepend", "prefix", "suffix", "replacement")


def check_growth(document: Mapping[str, Any], where: str) -> None:
    """Refuse a tokenizer whose steps could make a text more than `_MAX_GROWTH` times as long.

    Args:
        document: the parsed ``tokenizer.json``.
        where: the file, for the message.

    Raises:
        InputError: too many steps, or texts that are too long together.
    """
    for section in _SECTIONS:
        growth = 1
        for number, step in enumerate(_steps(document.get(section))):
            for key in _TEXTS:
                value = step.get(key)
                # An expression can match between any two characters.
                growth *= 1 + len(value) if isinstance(value, str) else 1
            if growth > _MAX_GROWTH or number >= _MAX_STEPS:
                raise InputError(
                    f"{where}: the steps of {section} are more than {_MAX_STEPS}, or could make a text more "
                    f"than {_MAX_GROWTH} times as long; expected a language model's tokenizer"
                )


def _steps(value: Any) -> Iterator[Mapping[str, Any]]:
    """A step and those inside it."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            if "type" in node:
                yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
