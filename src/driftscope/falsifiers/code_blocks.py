"""Fenced Python blocks of a text, parsed and never run."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

_FENCE = re.compile(r" {0,3}(?P<marks>`{3,}|~{3,})[ \t]*(?P<info>[^`]*?)[ \t]*")
_LANGUAGES = ("python", "py", "python3")


@dataclass(frozen=True)
class CodeBlock:
    """One fenced block.

    Attributes:
        language: the first word behind the opening fence, in lower case; empty for none.
        code: the lines between the fences.
        closed: whether a closing fence follows.
    """

    language: str
    code: str
    closed: bool

    @property
    def is_python(self) -> bool:
        """Whether it says that it is Python."""
        return self.language in _LANGUAGES

    @property
    def parses(self) -> bool:
        """Whether it is Python by the grammar of the running interpreter."""
        with warnings.catch_warnings():
            # An unknown escape in a string is a warning and no error.
            warnings.simplefilter("ignore")
            try:
                ast.parse(self.code)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return False
        return True


def code_blocks(text: str) -> list[CodeBlock]:
    """Find fenced blocks (CommonMark 0.31, section 4.5); a closing fence is at least as long as the opening.

    Args:
        text: Markdown.
    """
    blocks: list[CodeBlock] = []
    opening: str | None = None
    language, lines = "", list[str]()
    for line in text.splitlines():
        match = _FENCE.fullmatch(line)
        if opening is None:
            if match:
                opening, lines = match["marks"], []
                language = (match["info"].split() or [""])[0].lower()
        elif match and match["marks"].startswith(opening) and not match["info"]:
            blocks.append(CodeBlock(language, "\n".join(lines) + "\n", True))
            opening = None
        else:
            lines.append(line)
    if opening is not None:
        blocks.append(CodeBlock(language, "\n".join(lines) + "\n", False))
    return blocks
