"""Report: read what is there, say what is not, write JSON and page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from driftscope.config import Config
from driftscope.evidence.digest import code_digest, sha256_json
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_json, read_table, read_table_header

TABLES = {
    "sweep": ("sweep.parquet", "sweep"),
    "divergence": ("divergence.parquet", "divergence"),
    "propagation": ("propagation.parquet", "propagation"),
}
DOCUMENTS = {
    "sweep_inventory": "sweep.json",
    "sweep_summary": "weights.json",
    "admissibility": "admissibility.json",
    "replay": "replay.json",
    "decomposition": "decomposition.json",
    "impact": "impact.json",
    "fix_scope": "fix_scope.json",
}


def collect(config: Config, results: Path, paths: tuple[str, ...]) -> dict[str, Any]:
    """Gather the evidence of a results folder for `driftscope.report.build.build_report`."""
    headers: dict[str, Any] = {}
    evidence: dict[str, Any] = {
        "name": config.name,
        "title": config.title,
        "config": sha256_json(config.canonical()),
        "code": code_digest("report"),
        "traces": {},
        "models": _models(config, results, headers),
    }
    for key, (file, schema) in TABLES.items():
        if (results / file).is_file():
            evidence[key] = read_table(results / file, schema)
            headers[file] = read_table_header(results / file)
    for path in paths:
        file = f"trace/{path}.parquet"
        if (results / file).is_file():
            evidence["traces"][path] = read_table(results / file, "trace")
            headers[file] = read_table_header(results / file)
    for key, file in DOCUMENTS.items():
        if (results / file).is_file():
            evidence[key] = _document(results, file, headers)
    evidence["paths"] = [_path(path, evidence["traces"].get(path)) for path in paths]
    if (results / "prompts.json").is_file():
        prompts = _document(results, "prompts.json", headers)
        for key, name in (("prompts", "trace"), ("texts", "texts")):
            evidence[key] = [
                {field: prompt[field] for field in ("id", "sha256", "tokens")} for prompt in prompts[name]
            ]
    evidence["falsifiers"] = [
        _document(results, f"falsifiers/{file.name}", headers)
        for file in sorted((results / "falsifiers").glob("*.verdict.json"))
    ]
    for key in ("published", "gates"):
        if (results / f"{key}.json").is_file():
            evidence[key] = _document(results, f"{key}.json", headers)[key]
    evidence["headers"] = headers
    return evidence


def write(config: Config, results: Path, paths: tuple[str, ...], json_path: Path, html_path: Path) -> str:
    """Write the report of a results folder as JSON and as a page; return the verdict's class."""
    from altair.utils.schemapi import debug_mode

    from driftscope.report.build import build_report
    from driftscope.report.evidence import ReportEvidence
    from driftscope.report.write import write_report

    report = build_report(cast(ReportEvidence, collect(config, results, paths)))
    # Altair checks every part of every chart, which takes longer than drawing them; the tests let it.
    with debug_mode(False):
        write_report(report, json_path, html_path)
    return str(report["verdict"]["class"])


def _models(config: Config, results: Path, headers: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for role, model in (("teacher", config.pair.teacher), ("candidate", config.pair.candidate)):
        file = f"models/{model}.json"
        if not (results / file).is_file():
            continue
        manifest = _document(results, file, headers)
        artifact, _ = open_model(results / file)
        found.append(
            {
                "id": model,
                "role": role,
                "source": manifest["source"],
                "container": manifest["container"],
                "files": manifest["files"],
                "config": asdict(artifact.config),
            }
        )
    return found


def _document(results: Path, file: str, headers: dict[str, Any]) -> dict[str, Any]:
    document = read_json(results / file)
    if "evidence" in document:
        headers[file] = document.pop("evidence")
    return document


def _path(path: str, trace: Any) -> dict[str, Any]:
    role, _, arithmetic = path.partition(".")
    formats = [] if trace is None else sorted(set(trace["activation_format"].to_list()) - {"none"})
    return {"id": path, "artifact": role, "arithmetic": arithmetic, "activation_formats": formats}
