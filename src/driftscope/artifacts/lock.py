"""The lock file beside a configuration: every downloaded file pinned by revision, size and SHA-256."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from driftscope.artifacts.sources import FetchedFiles, LockEntry, Progress, fetch, parse_source, resolve
from driftscope.errors import InputError

_HEADING = """\
# Written by `driftscope lock`: what each source of the configuration beside it resolved to.
# A download that differs from it is refused. Sizes are in bytes.
"""


class Lock(BaseModel):
    """The pins of a configuration, by model id."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    models: dict[str, LockEntry] = Field(default_factory=dict)


def lock_path(config_path: Path) -> Path:
    """Return the path of the lock file of a configuration: `config.yaml` has `config.lock.yaml`."""
    return config_path.with_name(f"{config_path.stem}.lock.yaml")


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        InputError: it is missing, unreadable, not YAML, or not of the form of `Lock`.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no lock file; run `driftscope lock` on the configuration") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: lock file cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: lock file is not valid YAML: {error}") from error
    try:
        return Lock.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "lock file"
        message = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}: {message}; run `driftscope lock` to write it anew") from error


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock file: the same bytes for the same pins, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    document = {
        "schema_version": lock.schema_version,
        "models": {model_id: _entry_document(lock.models[model_id]) for model_id in sorted(lock.models)},
    }
    text = _HEADING + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def check(lock: Lock, model_id: str, source_text: str, path: Path) -> LockEntry:
    """Return the pin of a model.

    Args:
        lock: the content of the lock file.
        model_id: the model's key in the configuration.
        source_text: its source as the configuration writes it now.
        path: the lock file, for messages.

    Raises:
        InputError: the model is not locked, or was locked from another source.
    """
    entry = lock.models.get(model_id)
    if entry is None:
        raise InputError(f"{path}: model `{model_id}` ({source_text}) is not locked; run `driftscope lock`")
    if entry.source != source_text:
        raise InputError(
            f"{path}: model `{model_id}` is locked to {entry.source}, the configuration says {source_text}; "
            "run `driftscope lock`"
        )
    return entry


def lock_config(
    models: Mapping[str, str],
    config_path: Path,
    *,
    only: Collection[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Resolve the sources of a configuration and write its lock file.

    Args:
        models: source text by model id.
        config_path: the configuration; relative `file:` paths start at its folder.
        only: the ids to resolve; the pins of the others are kept. All if None.
        progress: called as `progress(model_id, bytes_done, bytes_total)`.

    Returns:
        The path of the lock file.

    Raises:
        InputError: a source cannot be resolved; the lock file is then left as it was.
    """
    path = lock_path(config_path)
    kept: dict[str, LockEntry] = {}
    if only is not None:
        unknown = sorted(set(only) - set(models))
        if unknown:
            raise InputError(f"{config_path}: no model `{unknown[0]}` with a source")
        before = read_lock(path) if path.exists() else Lock()
        for model_id in models:
            if model_id not in only:
                kept[model_id] = check(before, model_id, models[model_id], path)
    sources = {
        model_id: parse_source(text, config_path.parent)
        for model_id, text in sorted(models.items())
        if model_id not in kept
    }
    entries = {
        model_id: resolve(source, progress=_named(progress, model_id)) for model_id, source in sources.items()
    }
    write_lock(path, Lock(models={**kept, **entries}))
    return path


def fetch_model(
    model_id: str,
    source_text: str,
    config_path: Path,
    folder: Path,
    progress: Progress | None = None,
) -> FetchedFiles:
    """Bring the files of one model into `folder`, as pinned by the lock file of the configuration.

    Raises:
        InputError: not locked, locked from another source, cannot be brought, or not what is pinned.
    """
    path = lock_path(config_path)
    entry = check(read_lock(path), model_id, source_text, path)
    return fetch(parse_source(source_text, config_path.parent), folder, entry, progress=progress)


def _entry_document(entry: LockEntry) -> dict[str, Any]:
    return entry.model_dump(mode="json", exclude_none=True)


def _named(progress: Callable[[str, int, int], None] | None, model_id: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(model_id, done, total)
