"""Writing a report: validated, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from driftscope.evidence.atomic import write_text
from driftscope.evidence.store import read_json, write_document
from driftscope.report.schema import validate_report


def write_report(report: Mapping[str, Any], json_path: Path, html_path: Path | None = None) -> None:
    """Write a report as JSON and, where asked, as a page; both or, on an error, neither.

    Raises:
        InputError: the report breaks its schema, or a file cannot be written. Earlier files stay.
    """
    validate_report(dict(report), str(json_path))
    page = None
    if html_path is not None:
        from driftscope.report.html import render_html

        page = render_html(report)
    write_document(dict(report), json_path)
    if html_path is not None and page is not None:
        write_text(html_path, page)


def read_report(path: Path) -> dict[str, Any]:
    """Read a report and hold it against its schema.

    Raises:
        InputError: the file is missing, is not a JSON object, or breaks the schema.
    """
    report = read_json(path)
    validate_report(report, str(path))
    return report
