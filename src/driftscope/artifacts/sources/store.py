"""Bring the pinned files of a source into a folder: each is verified before it appears under its name."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath

from driftscope.artifacts.sources.entry import (
    FetchedFiles,
    LockedFile,
    LockEntry,
    Progress,
    Source,
    is_plain_name,
)
from driftscope.artifacts.sources.verify import matches, require_match
from driftscope.errors import InputError

_MANIFEST = ".fetched.json"


def fetch(
    source: Source, folder: Path, entry: LockEntry, *, progress: Progress | None = None
) -> FetchedFiles:
    """Bring the files that `entry` pins into `folder` and verify them.

    A file that is there and has the pinned SHA-256 is kept. Another is brought as `<name>.<digest>.part`,
    which survives an interruption and is continued by the next call, and takes its place only once
    verified: what stood there before is untouched until then. Files that an earlier fetch brought and
    the entry no longer names are removed at the end.

    Args:
        source: where the files come from.
        folder: made if needed.
        entry: the pin; see `lock.py`.
        progress: called with the bytes of all files together.

    Raises:
        InputError: a file does not have the pinned digest (both are given), or cannot be brought.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = 0
        for file in entry.files:
            target = folder / PurePosixPath(file.name)
            if not matches(target, file):
                _bring(source, target, file, entry, _shifted(progress, done, entry.total_bytes))
            done += file.bytes
            if progress is not None:
                progress(done, entry.total_bytes)
        _forget_others(folder, [file.name for file in entry.files])
    except OSError as error:
        place = error.filename or folder
        raise InputError(f"{place}: cannot be written: {error.strerror or error}") from error
    return FetchedFiles(folder, entry)


def _bring(
    source: Source, target: Path, file: LockedFile, entry: LockEntry, progress: Progress | None
) -> None:
    # The digest in the name keeps the beginning of one version from being continued with another.
    part = target.with_name(f"{target.name}.{file.sha256[:12]}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    if part.is_symlink():
        part.unlink()  # writing through a left-over link would change the user's own file
    source.obtain(file, entry, part, progress)
    try:
        require_match(part, file, f"source `{source.text}`")
    except InputError:
        part.unlink(missing_ok=True)
        raise
    if not part.is_symlink():
        with part.open("rb") as stream:  # read-only: it may be a link into a shared cache
            os.fsync(stream.fileno())
    part.replace(target)


def _forget_others(folder: Path, names: list[str]) -> None:
    """Remove what an earlier fetch brought here under names that are no longer pinned."""
    manifest = folder / _MANIFEST
    try:
        known = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = []
    for name in known if isinstance(known, list) else []:
        if isinstance(name, str) and is_plain_name(name) and name not in names:
            (folder / PurePosixPath(name)).unlink(missing_ok=True)
    if known != names:
        partial = manifest.with_name(f"{_MANIFEST}.{os.getpid()}.partial")
        partial.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
        partial.replace(manifest)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a callback for one file that reports to `progress` in bytes of all files."""
    if progress is None:
        return None
    return lambda done, _: progress(min(before + done, total), total)
