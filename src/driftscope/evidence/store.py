"""Validated reading and writing of evidence: parquet for tables, JSON for documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from driftscope.errors import InputError
from driftscope.evidence.atomic import replacing, write_text
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.provenance import write_provenance

if TYPE_CHECKING:
    import polars as pl

_HEADER_KEY = b"driftscope"


def write_table(frame: pl.DataFrame, path: Path, schema: str, header: EvidenceHeader) -> None:
    """Write a table as parquet, validated against the named schema, with its header in the file's metadata.

    Raises:
        InputError: the table breaks its schema, or the file cannot be written. An earlier file stays.
    """
    import pyarrow.parquet as pq

    from driftscope.evidence.schemas import validate

    table = validate(frame, schema, path).to_arrow()
    metadata = {_HEADER_KEY: json.dumps({"schema": schema, "evidence": header.as_dict()}, sort_keys=True)}
    with replacing(path) as partial:
        pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd", version="2.6")
    write_provenance(path)


def read_table(path: Path, schema: str) -> pl.DataFrame:
    """Read a table and validate it against the named schema.

    Raises:
        InputError: the file is missing, is not parquet, or breaks the schema.
    """
    import polars as pl

    from driftscope.evidence.schemas import validate

    try:
        frame = pl.read_parquet(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: evidence table is missing; run the workflow that writes it") from error
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: is not a readable parquet table: {error}") from error
    return validate(frame, schema, path)


def read_table_header(path: Path) -> dict[str, Any]:
    """Return the evidence header of a table."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    if _HEADER_KEY not in metadata:
        raise InputError(f"{path}: carries no evidence header; it was not written by driftscope")
    header: dict[str, Any] = json.loads(metadata[_HEADER_KEY])["evidence"]
    return header


def write_json(document: dict[str, Any], path: Path, header: EvidenceHeader) -> None:
    """Write a JSON document with its header under ``evidence``; NaN and infinities are refused.

    Raises:
        InputError: the document holds a non-finite number, or the file cannot be written.
    """
    write_document({**document, "evidence": header.as_dict()}, path)
    write_provenance(path)


def write_document(document: dict[str, Any], path: Path) -> None:
    """Write a JSON document in the one layout used everywhere: sorted as given, one space of indent."""
    try:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        where = first_non_finite(document)
        raise InputError(f"{path}: {where} is not a finite number; JSON evidence must be finite") from error
    write_text(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON document.

    Raises:
        InputError: the file is missing or is not a JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing; run the workflow that writes it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not readable JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a JSON {type(document).__name__}, expected an object")
    return document


def first_non_finite(value: Any, where: str = "$") -> str:
    """Return the JSON path of the first non-finite number, or an empty string."""
    if isinstance(value, float) and not math.isfinite(value):
        return where
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = [(f".{key}", child) for key, child in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"[{index}]", child) for index, child in enumerate(value)]
    for suffix, child in items:
        found = first_non_finite(child, f"{where}{suffix}")
        if found:
            return found
    return ""
