"""What a measurement may read: evidence and models of one results folder, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import polars as pl

    from driftscope.artifacts.model import Artifact


class EvidenceReader(Protocol):
    """Where a measurement gets its evidence from."""

    def has(self, name: str) -> bool:
        """Say whether the evidence file `name`, relative to the results folder, is there."""

    def table(self, name: str, schema: str) -> pl.DataFrame:
        """Return the table `name`, validated against the named schema."""

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON document `name`."""

    def model(self, name: str) -> Artifact:
        """Open the model of the manifest `name`, for example ``models/teacher.json``."""


class FolderReader:
    """Evidence in a results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Say whether the evidence file `name` is there."""
        return (self.folder / name).is_file()

    def table(self, name: str, schema: str) -> pl.DataFrame:
        """Return the table `name`, validated against the named schema.

        Raises:
            InputError: it is missing, is not parquet, or breaks the schema.
        """
        from driftscope.evidence.store import read_table

        return read_table(self.folder / name, schema)

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON document `name`.

        Raises:
            InputError: it is missing or is not a JSON object.
        """
        from driftscope.evidence.store import read_json

        return read_json(self.folder / name)

    def model(self, name: str) -> Artifact:
        """Open the model of the manifest `name`.

        Raises:
            InputError: the manifest or a file of the model is missing or broken.
        """
        from driftscope.evidence.manifest import open_model

        return open_model(self.folder / name)[0]
