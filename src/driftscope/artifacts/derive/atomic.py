"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from driftscope.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` if the block succeeds.

    Raises:
        InputError: the disk is full or the place cannot be written; `path` is then as it was.
    """
    partial = _partial(path)
    try:
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a new temporary folder beside `path`; put it in the place of `path` if the block succeeds.

    Raises:
        InputError: the disk is full or the place cannot be written; `path` is then as it was.
    """
    partial, previous = _partial(path), path.with_name(f".{path.name}.previous-{os.getpid()}")
    try:
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            if path.exists():
                # A folder that is not empty cannot be replaced in one step.
                os.replace(path, previous)
            try:
                os.replace(partial, path)
            except OSError:
                if previous.exists():
                    os.replace(previous, path)
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: no space left on the disk; nothing was changed") from error
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
