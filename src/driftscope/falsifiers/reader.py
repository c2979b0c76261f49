"""What a measurement may read: evidence and models of one results folder, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from driftscope.errors import InputError

if TYPE_CHECKING:
    import polars as pl

    from driftscope.artifacts.model import Artifact

_MAX_TEXT_BYTES = 256 * 2**20


class EvidenceReader(Protocol):
    """Where a measurement gets its evidence from.

    Attributes:
        device: ``cuda`` where the case runs on a GPU, else ``cpu``; whether a host has one decides nothing.
    """

    device: str

    def has(self, name: str) -> bool:
        """Say whether the evidence file `name`, relative to the results folder, is there."""

    def table(self, name: str, schema: str) -> pl.DataFrame:
        """Return the table `name`, validated against the named schema."""

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON document `name`."""

    def text(self, name: str) -> str:
        """Return the UTF-8 text file `name`."""

    def model(self, name: str) -> Artifact:
        """Open the model of a role's manifest: ``models/teacher.json`` or ``models/candidate.json``."""


ROLES = ("teacher", "candidate")


def manifest_of(name: str, pair: Mapping[str, str]) -> str:
    """Return the manifest of the model that has a role in a pair; any other name as it is.

    Args:
        name: evidence file, for example ``models/teacher.json``.
        pair: role to the id of its model, which may be called anything.
    """
    for role in ROLES:
        if name == f"models/{role}.json":
            return f"models/{pair.get(role, role)}.json"
    return name


class FolderReader:
    """Evidence in a results folder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self.device = device

    def path(self, name: str) -> Path:
        """Return where an evidence file is; a role's manifest is that of its model in the configured pair.

        Raises:
            InputError: the resolved configuration is broken.
        """
        from driftscope.evidence.store import read_json

        config = self.folder / "config.json"
        if not name.startswith("models/") or not config.is_file():
            return self.folder / name
        pair = read_json(config).get("pair")
        return self.folder / manifest_of(name, pair if isinstance(pair, Mapping) else {})

    def has(self, name: str) -> bool:
        """Say whether the evidence file `name` is there."""
        return self.path(name).is_file()

    def table(self, name: str, schema: str) -> pl.DataFrame:
        """Return the table `name`, validated against the named schema.

        Raises:
            InputError: it is missing, is not parquet, or breaks the schema.
        """
        from driftscope.evidence.store import read_table

        return read_table(self.path(name), schema)

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON document `name`.

        Raises:
            InputError: it is missing or is not a JSON object.
        """
        from driftscope.evidence.store import read_json

        return read_json(self.path(name))

    def text(self, name: str) -> str:
        """Return the UTF-8 text file `name`.

        Raises:
            InputError: it is missing, too large, or not UTF-8.
        """
        from driftscope.artifacts.files import regular_file_size

        path = self.folder / name
        size = regular_file_size(path)
        if size > _MAX_TEXT_BYTES:
            raise InputError(f"{path}: {size} bytes; expected a text of at most {_MAX_TEXT_BYTES}")
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: is not readable UTF-8 text: {error}") from error

    def model(self, name: str) -> Artifact:
        """Open the model of the manifest `name`.

        Raises:
            InputError: the manifest or a file of the model is missing or broken.
        """
        from driftscope.evidence.manifest import open_model

        return open_model(self.path(name))[0]
