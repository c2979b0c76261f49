"""Documents with a JSON Schema of their own, held against it when they are written and read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from driftscope.errors import InputError
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.store import read_json, write_json


def write_checked(document: dict[str, Any], path: Path, schema: str, header: EvidenceHeader) -> None:
    """Write a JSON document that meets the named schema.

    Raises:
        InputError: it does not, or the file cannot be written. An earlier file stays.
    """
    _check(document, schema, path)
    write_json(document, path, header)


def read_checked(path: Path, schema: str) -> dict[str, Any]:
    """Read a JSON document that meets the named schema.

    Raises:
        InputError: the file is missing, is not JSON, or breaks the schema.
    """
    document = read_json(path)
    _check(document, schema, path)
    return document


def _check(document: dict[str, Any], schema: str, path: Path) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(_schema(schema)).iter_errors(document))
    if error is not None:
        message = error.message if len(error.message) <= 200 else f"{error.message[:200]}…"
        raise InputError(f"{path}: breaks the schema of {schema} at {error.json_path}: {message}")


@cache
def _schema(name: str) -> dict[str, Any]:
    file = Path(__file__).with_name(f"{name}.schema.json")
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema
