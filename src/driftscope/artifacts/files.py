"""Opening files that are not trusted."""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from driftscope.errors import InputError

# Twice what the largest published tokenizer.json has, and little enough that a hostile file takes seconds and
# less than a gigabyte: a value of two characters becomes an object of a hundred bytes.
_MAX_JSON_BYTES = 64 * 2**20
_MAX_JSON_ITEMS = 4_000_000
# Python's own limit differs between versions, and what reads and writes a document has one each.
_MAX_JSON_DEPTH = 64

# What is read from a model folder besides its weights.
_BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


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


# Whether links out of a model folder are followed, see `following_links`.
_FOLLOWING: ContextVar[bool] = ContextVar("following", default=False)


@contextlib.contextmanager
def following_links() -> Iterator[None]:
    """Follow links out of model folders: for a folder of links that driftscope made, to files that it pinned.

    A ``file:`` source is not copied where the file system can link.
    """
    token = _FOLLOWING.set(True)
    try:
        yield
    finally:
        _FOLLOWING.reset(token)


def member(folder: Path, name: str, *, beside: Path | None = None) -> Path:
    """A file that belongs to a model folder, followed through links no further than the model.

    A link may lead to another place in the folder, or to the blobs of the hub's cache whose snapshot the
    folder is (``<model>/snapshots/<revision>`` and ``<model>/blobs``). A path that a person typed may lead
    anywhere; what a folder or an index names may not.

    Args:
        folder: the model folder.
        name: a file name in it; checked by the caller to hold no path.
        beside: a file that a person typed: where that leads to, its neighbours may lead as well.

    Raises:
        InputError: the file is a link that leaves the model.
    """
    path = folder / name
    try:
        if _FOLLOWING.get() or not path.is_symlink():
            return path
        target = Path(os.path.realpath(path))
        roots = [Path(os.path.realpath(folder))]
        if beside is not None:
            roots.append(Path(os.path.realpath(beside)).parent)
        if any(target.is_relative_to(root) for start in roots for root in (start, *_blobs(start))):
            return path
        link = os.readlink(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({_reason(error)})") from error
    raise InputError(
        f"{path}: a symbolic link to {link[:200]!r}, outside of the model folder; expected a file in it"
    )


def check_members(folder: Path) -> None:
    """Check every file that may be read beside the weights, before any of them is.

    Raises:
        InputError: one is there and is no regular file of bounded size, or is a link that leaves the model.
    """
    for name in _BESIDE_WEIGHTS:
        path = member(folder, name)
        if os.path.lexists(path):
            size = regular_file_size(path)
            if size > _MAX_JSON_BYTES:
                raise InputError(f"{path}: {size} bytes; expected at most {_MAX_JSON_BYTES}")


def _blobs(root: Path) -> list[Path]:
    """The blobs of the hub's cache that a folder is a snapshot in, or nothing."""
    return [
        snapshot.parent.parent / "blobs"
        for snapshot in (root, *root.parents)
        if snapshot.parent.name == "snapshots"
    ]


def matches(pattern: Path) -> list[Path]:
    """The paths that a pattern of the shell matches, sorted; none where something has that very name.

    Raises:
        InputError: `pattern` is a pattern and matches nothing.
    """
    text = str(pattern)
    if not glob.has_magic(text) or "\0" in text or os.path.lexists(pattern):
        return []
    found = sorted(Path(name) for name in glob.glob(text))
    if not found:
        raise InputError(f"{pattern}: no file matches this pattern")
    return found


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
    """Parse the bytes of a JSON object of bounded size, with every key at most once.

    Args:
        text: UTF-8.
        where: the file, for the message.

    Raises:
        InputError: too large, not JSON, not an object, or a repeated key.
    """
    items = sum(map(text.count, (b",", b":", b"[", b"{")))
    if items > _MAX_JSON_ITEMS:
        raise InputError(f"{where}: {items} values and keys of JSON; expected at most {_MAX_JSON_ITEMS}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated = next(key for key, count in counts.items() if count > 1)
            raise InputError(f"{where}: the key {repr(repeated)[:120]} is there twice")
        return document

    try:
        with _without_collection():
            document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected a JSON object")
    if _is_deep(document):
        raise InputError(f"{where}: JSON in more than {_MAX_JSON_DEPTH} levels; expected fewer")
    return document


def _is_deep(document: dict[str, Any]) -> bool:
    level: list[Any] = [document]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    return bool(level)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from looking for cycles, of which JSON has none, again and again while objects are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
