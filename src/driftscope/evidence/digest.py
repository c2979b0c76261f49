"""Digests: of files, of configuration values and of the code that makes a stage's evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent

STAGE_PACKAGES: dict[str, tuple[str, ...]] = {
    "fetch": ("artifacts", "evidence/manifest.py", "stages/models.py"),
    "derive": ("artifacts", "kernels", "evidence/manifest.py", "stages/models.py"),
    "prompts": ("artifacts", "stages/prompts.py"),
    "sweep": ("artifacts", "kernels", "analysis", "evidence", "stages/sweep.py"),
    "trace": (
        "artifacts",
        "kernels",
        "forward",
        "engines",
        "evidence",
        "stages/arrays.py",
        "stages/trace.py",
    ),
    "engine": ("artifacts", "forward", "engines", "evidence", "stages/engines.py"),
    "divergence": (
        *("artifacts", "kernels", "forward", "engines", "analysis", "evidence"),
        *("stages/arrays.py", "stages/trace.py"),
    ),
    "floors": (
        *("artifacts", "kernels", "forward", "engines", "analysis", "evidence"),
        "stages/replay.py",
    ),
    "replay": (
        *("artifacts", "kernels", "forward", "engines", "analysis", "evidence"),
        "stages/replay.py",
    ),
    "propagation": (
        *("artifacts", "kernels", "forward", "engines", "analysis", "evidence"),
        "stages/propagation.py",
    ),
    "decompose": (
        *("artifacts", "kernels", "forward", "engines", "analysis", "evidence"),
        *("stages/arrays.py", "stages/decompose.py"),
    ),
    "measure": (
        *("artifacts", "kernels", "forward", "engines", "analysis", "evidence", "falsifiers"),
        "stages/falsify.py",
    ),
    "faultbench": (
        *("artifacts", "kernels", "forward", "engines", "analysis", "evidence", "faultbench"),
        "stages/faultbench.py",
    ),
    "judge": ("contracts", "report", "evidence", "stages/at_hand.py", "stages/falsify.py"),
    "report": ("report", "evidence", "stages/report.py"),
}
"""Packages and modules whose code decides a stage's evidence; imports run one way, so the list is closed."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON (sorted keys, no spaces), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest(stage: str) -> str:
    """Return the first 16 hexadecimal digits of the digest of the source files that make `stage`'s evidence.

    The same sources give the same digest on every machine: paths are relative and sorted.
    """
    return _digest_sources(STAGE_PACKAGES[stage])


def _digest_sources(packages: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for package in sorted(packages):
        source = _PACKAGE / package
        for file in [source] if source.is_file() else sorted(source.rglob("*")):
            if file.is_file() and file.suffix in {".py", ".cu", ".cuh", ".j2", ".css", ".json"}:
                digest.update(f"{file.relative_to(_PACKAGE).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
