"""The main job in figures: first run, run with nothing changed, largest memory of a job.

    python benchmarks/bench_workflow.py [CORES]

Runs the default configuration in a temporary folder and prints one JSON line. The time of the second run is
also given as a ratio to the time that Snakemake itself takes to start (``snakemake --version``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str], folder: Path) -> float:
    """Return the seconds that a command takes; its output is kept for the case that it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return time.perf_counter() - start


def main() -> None:
    """Run and print."""
    cores = sys.argv[1] if len(sys.argv) > 1 else "2"
    snakemake = [sys.executable, "-m", "snakemake"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("Snakefile", "workflow", "config", "contracts"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        first = timed([*snakemake, "--cores", cores], folder)
        again = min(timed([*snakemake, "--cores", cores], folder) for _ in range(3))
        start = min(timed([*snakemake, "--version"], folder) for _ in range(3))
        peak = max(
            float(file.read_text(encoding="utf-8").splitlines()[1].split("\t")[2])
            for file in sorted(folder.glob("results/*/benchmarks/**/*.tsv"))
            if "NA" not in file.read_text(encoding="utf-8").splitlines()[1].split("\t")[2]
        )
    print(
        json.dumps(
            {
                "benchmark": "workflow",
                "cores": int(cores),
                "machine_cores": os.cpu_count(),
                "first_run_s": round(first, 1),
                "nothing_changed_s": round(again, 2),
                "nothing_changed_over_snakemake_start": round(again / start, 2),
                "largest_job_rss_mib": round(peak),
            }
        )
    )


if __name__ == "__main__":
    main()
