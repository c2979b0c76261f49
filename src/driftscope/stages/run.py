"""Run the workflow from the command line, and hand on what a rule found wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from driftscope.config import load_config
from driftscope.errors import InputError

_FULL_BYTES = 2**20


def report_path(config: Path) -> Path:
    """Return where the report of a configuration is, relative to the workflow's folder."""
    return Path("results") / f"{load_config(config).name}_report.json"


def run_workflow(config: Path, cores: int, *, dry_run: bool) -> tuple[int, str]:
    """Run Snakemake on a configuration, in the current folder, which holds the Snakefile.

    Returns:
        The exit code, and the first line that a rule gave for bad input (exit code 2), else an empty line.
    """
    if not Path("Snakefile").is_file():
        raise InputError("no Snakefile in this folder; run driftscope in a checkout of the workflow")
    report = report_path(config)
    command = [
        *(sys.executable, "-m", "snakemake"),
        *("--cores", str(cores), "--configfile", str(config)),
        *("--workflow-profile", "workflow/profiles/default"),
        *(["--dry-run"] if dry_run else []),
        str(report),
    ]
    with tempfile.TemporaryDirectory(prefix="driftscope-") as folder:
        failures = Path(folder) / "failures"
        done = subprocess.run(command, env={**os.environ, "DRIFTSCOPE_FAILURES": str(failures)}, check=False)
        lines = failures.read_text(encoding="utf-8").splitlines() if failures.is_file() else []
    if done.returncode and lines:
        return 2, lines[0]
    free = shutil.disk_usage(report.parent if report.parent.is_dir() else Path()).free
    if done.returncode and free < _FULL_BYTES:
        # Snakemake copies a step's earlier outputs before it runs; where that fails, no step can say why.
        return 2, f"{report.parent}: the disk is full ({free} bytes are left); make room and run again"
    return done.returncode, ""
