"""The same inputs give the same bytes, however the run went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.workflow.case import Case

pytestmark = pytest.mark.slow


def test_one_core_in_another_folder_gives_the_same_bytes(finished: Case, tmp_path: Path) -> None:
    other = Case.create(tmp_path / "elsewhere" / "deeper")
    done = other.snakemake(cores=1)
    assert done.returncode == 0, done.stderr
    assert other.evidence() == finished.evidence()


def test_a_killed_run_continues_to_the_same_bytes(finished: Case, tmp_path: Path) -> None:
    killed = Case.create(tmp_path / "killed")
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    with subprocess.Popen(
        command,
        cwd=killed.folder,
        env=killed.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        half_way = killed.results / "trace/teacher.f32/chunk_0.parquet"
        while not half_way.exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert not killed.report.exists()
    # A killed Snakemake leaves its lock; a user is told to unlock.
    assert killed.snakemake("--unlock").returncode == 0
    done = killed.snakemake("--rerun-incomplete")
    assert done.returncode == 0, done.stderr
    assert killed.evidence() == finished.evidence()
