"""A model's manifest: which files it consists of, with their digests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from driftscope.errors import InputError
from driftscope.evidence.digest import sha256_file, sha256_json
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.store import read_json, write_json

if TYPE_CHECKING:
    from driftscope.artifacts.model import Artifact


def write_manifest(
    manifest: Path, model: str, path: Path, header: EvidenceHeader, origin: dict[str, Any]
) -> None:
    """Describe a model that has just been written or fetched.

    Args:
        manifest: where to write; `path` is kept relative to its folder.
        model: the model's id.
        path: the file or folder that the model is opened by.
        header: evidence header.
        origin: where the model comes from, for the report.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    # What starts with a dot is the downloader's own bookkeeping.
    listed = [
        {
            "path": file.relative_to(manifest.parent).as_posix(),
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in files
        if not file.name.startswith(".")
    ]
    document = {
        "model": model,
        **origin,
        "path": path.relative_to(manifest.parent).as_posix(),
        "files": listed,
    }
    write_json(document, manifest, header)


def open_model(manifest: Path) -> tuple[Artifact, str]:
    """Open the model of a manifest.

    Returns:
        The artifact, complete for its architecture, and the digest of all of its files.

    Raises:
        InputError: a file is gone or has another size than the manifest says, the model cannot be read, or
            a tensor is missing.
    """
    from driftscope.artifacts.complete import check_complete
    from driftscope.artifacts.files import following_links
    from driftscope.artifacts.open import open_artifact

    document = read_json(manifest)
    if not _is_manifest(document):
        raise InputError(f"{manifest}: is no manifest of a model; for the model of a folder, name the folder")
    for file in document["files"]:
        path = manifest.parent / file["path"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise InputError(
                f"{path}: {found}, expected {file['bytes']} bytes as listed in {manifest}; "
                f"delete {manifest} to make the model anew"
            )
    # A manifest is written when its model has been opened, and so verified, once.
    with following_links():
        artifact = open_artifact(manifest.parent / document["path"], verified=True)
    check_complete(artifact)
    return artifact, model_digest(document)


def _is_manifest(document: dict[str, Any]) -> bool:
    files = document.get("files")
    return (
        isinstance(document.get("path"), str)
        and isinstance(files, list)
        and all(
            isinstance(file, dict)
            and isinstance(file.get("path"), str)
            and isinstance(file.get("bytes"), int)
            and isinstance(file.get("sha256"), str)
            for file in files
        )
    )


def model_digest(document: dict[str, Any]) -> str:
    """Return one digest for all the files of a model."""
    return sha256_json([[file["path"], file["sha256"]] for file in document["files"]])
