"""The evidence that a measurement may read: tables of one results folder, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import polars as pl


class EvidenceReader(Protocol):
    """Where a measurement gets its evidence from."""

    def has(self, name: str) -> bool:
        """Say whether the evidence file `name`, relative to the results folder, is there."""

    def table(self, name: str, schema: str) -> pl.DataFrame:
        """Return the table `name`, validated against the named schema."""


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
