"""The report's JSON Schema: loading it and holding a document against it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from driftscope.errors import InputError

SCHEMA_PATH = Path(__file__).with_name("report.schema.json")


@cache
def report_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a report."""
    schema: dict[str, Any] = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    return schema


def validate_report(report: Any, where: str) -> None:
    """Hold a report against its schema.

    Raises:
        InputError: the deepest violation, with its place in the document, in one line.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(report_schema()).iter_errors(report))
    if error is not None:
        message = error.message if len(error.message) <= 200 else f"{error.message[:200]}…"
        raise InputError(f"{where}: breaks the report's schema at {error.json_path}: {message}")
