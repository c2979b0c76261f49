"""Opening files that are not trusted."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from driftscope.errors import InputError

_MAX_JSON_BYTES = 256 * 2**20


def regular_file_size(path: Path) -> int:
    """Size in bytes of a regular file, reached through a symbolic link or not.

    Raises:
        InputError: missing, not readable, or a folder, device, socket or pipe.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({_reason(error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: {_kind(status.st_mode)}; expected a regular file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be opened (permission denied)")
    return status.st_size


def is_folder(path: Path) -> bool:
    """Whether there is a folder, reached through a symbolic link or not.

    Raises:
        InputError: that cannot be found out.
    """
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({_reason(error)})") from error


def list_folder(folder: Path) -> list[Path]:
    """Everything in a folder, sorted.

    Raises:
        InputError: it cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({_reason(error)})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON object of bounded size, with every key at most once.

    Raises:
        InputError: missing, too large, not JSON, not an object, or a repeated key.
    """
    size = regular_file_size(path)
    if size > _MAX_JSON_BYTES:
        raise InputError(f"{path}: {size} bytes; expected at most {_MAX_JSON_BYTES}")
    try:
        return parse_json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)})") from error


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse the bytes of a JSON object, with every key at most once.

    Args:
        text: UTF-8.
        where: the file, for the message.

    Raises:
        InputError: not JSON, not an object, or a repeated key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{where}: the key {repeated!r} is there twice")
        return document

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected a JSON object")
    return document


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _kind(mode: int) -> str:
    kinds = {
        "a folder": stat.S_ISDIR,
        "a character device": stat.S_ISCHR,
        "a block device": stat.S_ISBLK,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }
    return next((name for name, test in kinds.items() if test(mode)), "not a file")
