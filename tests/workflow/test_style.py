"""The workflow's files pass the tools of their trade."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.workflow.case import ROOT


def test_snakemake_lint() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--lint"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_snakefmt() -> None:
    snakefmt = Path(sys.executable).parent / "snakefmt"
    done = subprocess.run(
        [snakefmt, "--check", "Snakefile", "workflow"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
