"""What a job pays before its first product, in fresh processes, as one JSON line of seconds and ratios.

- ``warm``: start of Python, imports, and the first product on a path, compiled kernels on disk; the best of
  a few; ``cold``: the same with an empty folder of compiled kernels. Seconds.
- ``warm_processor``: the least processor time of a warm run, which a busy machine changes less;
- ``parts``: where the warm time goes.
- ``over_numba``: warm over a process that only imports Numba, the floor of anything that uses it.
- ``help``: ``driftscope --help``; ``evidence``: what a stage imports to write its tables.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

REPEATS = 5
JOB = """
import time
times = [time.perf_counter()]
import numpy as np
times.append(time.perf_counter())
import numba
times.append(time.perf_counter())
from driftscope.kernels.matmul import matmul_f32_quantized, matmul_quantized
times.append(time.perf_counter())
{product}(np.zeros((7, 256), np.float32), np.zeros((64, 144), np.uint8), "Q4_K")
times.append(time.perf_counter())
print(*np.diff(times))
"""
PARTS = ("numpy", "numba", "driftscope", "first_call")


def run(command: list[str], cache: str) -> tuple[float, float, str]:
    """Seconds of a process from start to end, of the processor's time, and what it printed."""
    # An installed package has its bytecode.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"NUMBA_CACHE_DIR": cache}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, done.stdout


def main() -> None:
    """Print the line."""
    python = [sys.executable, "-c"]
    jobs = {
        "f32": [*python, JOB.format(product="matmul_f32_quantized")],
        "int8-dot": [*python, JOB.format(product="matmul_quantized")],
    }
    others = {
        "import_numba": [*python, "import numba"],
        "help": [sys.executable, "-m", "driftscope.cli", "--help"],
        "evidence": [*python, "import driftscope.evidence.store"],
    }
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as cache:
        cold = {name: run(command, cache)[0] for name, command in jobs.items()}
        # In turns, so that a disturbance meets all of them.
        rounds = [
            {name: run(command, cache) for name, command in {**jobs, **others}.items()}
            for _ in range(REPEATS)
        ]
        fastest = {name: min(each[name] for each in rounds) for name in rounds[0]}
    for name in jobs:
        warm, _, printed = fastest[name]
        parts = dict(zip(PARTS, map(float, printed.split()), strict=True))
        parts = {"python": warm - sum(parts.values()), **parts}
        result[name] = {
            "cold": round(cold[name], 2),
            "warm": round(warm, 3),
            "warm_processor": round(min(each[name][1] for each in rounds), 3),
            "over_numba": round(warm / fastest["import_numba"][0], 2),
            "parts": {part: round(value, 3) for part, value in parts.items()},
        }
    result |= {name: round(fastest[name][0], 3) for name in others}
    print(json.dumps({"benchmark": "startup", **result}))


if __name__ == "__main__":
    main()
