"""Fuzz the readers: ``python -m tests.fuzz.run --format gguf --count 20000 --seed 0``.

Prints a line for each distinct problem and the counts; exits 1 where there is a problem. The inputs of
problems are left in ``--keep``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fuzz.subjects import SUBJECTS


def run(format_: str, count: int, seed: int, keep: Path) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Fuzz one format in a process of its own, which is started again where an input ends it.

    Returns:
        The counts, and for each distinct problem where its input lies and the traceback.
    """
    totals: dict[str, Any] = {}
    problems: dict[str, dict[str, Any]] = {}
    done = 0
    while done < count:
        with tempfile.TemporaryDirectory(dir=_fast_folder()) as name:
            folder = Path(name)
            (folder / "findings").mkdir()
            command = [sys.executable, "-m", "tests.fuzz.worker", "--format", format_]
            # A process that died has read an unknown number of inputs: the next starts from another seed.
            command += ["--count", str(count - done), "--seed", str(seed + 1_000_003 * len(problems))]
            ended = subprocess.run(
                [*command, "--folder", str(folder)], capture_output=True, text=True, check=False
            )
            lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
            for line in lines:
                if "finding" in line and line["key"] not in problems:
                    problems[line["key"]] = line
            summary = next((line for line in lines if "done" in line), None)
            if summary is None and not (folder / "case").exists():
                raise SystemExit(ended.stderr)
            if summary is None:
                key = f"the process ended with {ended.returncode}: {ended.stderr.strip()[-300:]}"
                if key in problems or len(problems) > 20:
                    raise SystemExit(key)
                problems[key] = {"finding": ended.stderr[-4000:], "kept": str(folder / "case")}
                shutil.copytree(folder / "case", keep / f"{format_}-died-{len(problems)}", symlinks=True)
                done += max((line.get("index", 0) for line in lines), default=0) + 1
            else:
                done += summary["done"]
                totals = summary
            if any((folder / "findings").iterdir()):
                shutil.copytree(
                    folder / "findings",
                    keep / format_,
                    symlinks=True,
                    ignore_dangling_symlinks=True,
                    dirs_exist_ok=True,
                )
    return totals, problems


def _fast_folder() -> str | None:
    """A folder in memory where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=[*sorted(SUBJECTS), "all"], default="all")
    parser.add_argument("--count", type=int, default=20_000, help="inputs of a format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the inputs of problems")
    arguments = parser.parse_args()
    keep = arguments.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    found = 0
    for format_ in sorted(SUBJECTS) if arguments.format == "all" else [arguments.format]:
        start = time.perf_counter()
        totals, problems = run(format_, arguments.count, arguments.seed, keep)
        print(f"{format_}: {json.dumps(totals)} in {time.perf_counter() - start:.0f} s", flush=True)
        for key, line in problems.items():
            print(f"  {key}\n    {line['kept']}", flush=True)
        found += len(problems)
    if found:
        print(f"{found} distinct problems; their inputs are in {keep}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
