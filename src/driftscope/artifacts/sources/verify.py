"""A file is what its pin says, or it is not used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from driftscope.artifacts.sources.entry import LockedFile
from driftscope.errors import InputError


def pin_file(path: Path, name: str) -> LockedFile:
    """Return the pin (size in bytes, SHA-256) of the file at `path`, under the name `name`.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return LockedFile(name=name, bytes=size, sha256=digest)


def matches(path: Path, file: LockedFile) -> bool:
    """Tell whether the file at `path` exists and has the size and SHA-256 of `file`."""
    try:
        if not path.is_file() or path.stat().st_size != file.bytes:
            return False
    except OSError:
        return False
    return pin_file(path, file.name).sha256 == file.sha256


def require_match(path: Path, file: LockedFile, where: str) -> None:
    """Raise unless the file at `path` is the pinned `file`; `where` names its origin.

    Raises:
        InputError: it is not; the message gives both digests and both sizes.
    """
    found = pin_file(path, file.name)
    if (found.sha256, found.bytes) != (file.sha256, file.bytes):
        raise InputError(
            f"{where}: checksum mismatch for {file.name}: the lock file says sha256 {file.sha256} "
            f"({file.bytes} bytes), found sha256 {found.sha256} ({found.bytes} bytes); "
            "if the change is intended, run `driftscope lock`"
        )
