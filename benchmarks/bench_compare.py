"""How fast two tensors are compared, as ratios within one run; prints one JSON line.

BF16 is compared with Q4_K and with Q6_K, as in a 7B model's sweep. That is set against the same work with
NumPy and the gguf package's dequantize (on a part, scaled), and against only reading the same bytes with the
same threads. The tensors are cut into pieces that are gone from the caches when their turn comes again; a
time is the sum over the pieces of the shortest of a few, so that other work on the machine matters little.

    python benchmarks/bench_compare.py
    python benchmarks/bench_compare.py --full FOLDER

With ``--full`` a pair of 7B models (15.2 GB and 4.7 GB) is made in FOLDER, compared by ``driftscope diff``
and removed; its time is set against that of reading both files once through a memory map, and its memory
beyond the page cache is watched.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import synthetic
from numpy.typing import NDArray

from driftscope.kernels.compare import compare
from driftscope.kernels.parallel import over_rows

PIECES, ROWS, COLUMNS, REPEATS = 24, 512, 7168, 7
THREADS = (1, 2)
_READ_AT_ONCE = 1 << 26

Piece = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def seconds(work: Callable[[Piece], object], pieces: Sequence[Piece], repeats: int = REPEATS) -> float:
    """Of all pieces, each at its fastest."""
    fastest = [float("inf")] * len(pieces)
    for _ in range(repeats):
        for i, piece in enumerate(pieces):
            start = time.perf_counter()
            work(piece)
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return sum(fastest)


def with_numpy(a: NDArray[np.uint8], b: NDArray[np.uint8], dtype: str) -> tuple[float, ...]:
    """The same figures with NumPy and the gguf package."""
    x = gguf.dequantize(a, gguf.GGMLQuantizationType.BF16).astype(np.float64)
    y = gguf.dequantize(b, gguf.GGMLQuantizationType[dtype]).astype(np.float64)
    d = np.abs(x - y)
    counts = [np.count_nonzero(d < bound) for bound in (1e-3, 1e-2)] + [np.count_nonzero(d == 0)]
    both = np.isfinite(x) & np.isfinite(y)
    sums = [(x * x).sum(), (y * y).sum(), (x * y).sum(), d.sum(), (d * d).sum(), both.sum()]
    return (*counts, *sums, d.max(), d.argmax(), x.std(), y.std())


def _look_at(words: NDArray[np.uint64], first: int, end: int) -> None:
    words[first:end].max()


def read(arrays: Sequence[NDArray[np.uint8]], threads: int) -> None:
    """Look at every byte."""
    for array in arrays:
        flat = array.reshape(-1)
        words = flat[: flat.size // 8 * 8].view(np.uint64)
        over_rows(partial(_look_at, words), words.size, threads=threads)


def of_format(dtype: str) -> dict[str, float]:
    """Ratios for BF16 against one format."""
    whole = synthetic.random_pair("BF16", dtype, PIECES * ROWS, COLUMNS)
    pieces: list[Piece] = [
        (whole[0][i : i + ROWS], whole[1][i : i + ROWS]) for i in range(0, PIECES * ROWS, ROWS)
    ]
    values = PIECES * ROWS * COLUMNS
    compare(pieces[0][0][:4], "BF16", pieces[0][1][:4], dtype)
    numpy_and_gguf = seconds(lambda pair: with_numpy(*pair, dtype), pieces[:2], 2) * PIECES / 2
    figures: dict[str, float] = {}
    for threads in THREADS:

        def ours(pair: Piece, threads: int = threads) -> object:
            return compare(pair[0], "BF16", pair[1], dtype, threads=threads)

        comparing = seconds(ours, pieces)
        reading = seconds(partial(read, threads=threads), pieces)
        label = f"{dtype}_{threads}_thread" + ("s" if threads > 1 else "")
        figures[f"{label}_ns_per_value"] = round(comparing / values * 1e9, 3)
        figures[f"{label}_times_numpy_and_gguf"] = round(numpy_and_gguf / comparing, 1)
        figures[f"{label}_share_of_speed_of_reading"] = round(reading / comparing, 3)
        figures[f"{label}_reading_gb_per_s"] = round(sum(a.nbytes for a in whole) / reading / 1e9, 1)
    return figures


def read_files(files: Sequence[Path], threads: int) -> float:
    """Seconds to look at every byte of some files through memory maps."""
    start = time.perf_counter()
    for file in files:
        mapped = np.memmap(file, np.uint8, "r")
        for at in range(0, mapped.size, _READ_AT_ONCE):
            read([mapped[at : at + _READ_AT_ONCE]], threads)
    return time.perf_counter() - start


def watched(command: Sequence[str]) -> tuple[float, int]:
    """Seconds of a command, and the most bytes of memory that it held beyond pages of files."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        except OSError:
            break
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    process.wait()
    return time.perf_counter() - start, peak


def full(folder: Path, threads: int, shape: synthetic.Shape) -> dict[str, float]:
    """Compare a pair of whole models; the pair is removed afterwards."""
    folder.mkdir(parents=True, exist_ok=False)
    try:
        teacher, candidate = folder / "teacher", folder / "candidate.gguf"
        start = time.perf_counter()
        synthetic.write_candidate(candidate, shape)
        synthetic.write_teacher(teacher, shape)
        writing = time.perf_counter() - start
        files = [*sorted(teacher.glob("*.safetensors")), candidate]
        program = [sys.executable, "-m", "driftscope.cli", "diff", "--json", "--threads", str(threads)]
        reading = [read_files(files, threads)]
        comparing, peak = watched([*program, str(teacher), str(candidate)])
        reading.append(read_files(files, threads))
        return {
            "full_threads": threads,
            "full_gigabytes": round(sum(file.stat().st_size for file in files) / 1e9, 2),
            "full_seconds_to_write": round(writing, 1),
            "full_seconds_to_read": round(min(reading), 2),
            "full_seconds_to_compare": round(comparing, 2),
            "full_times_reading": round(comparing / min(reading), 2),
            "full_peak_gigabytes_beyond_page_cache": round(peak / 1e9, 3),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", type=Path, help="compare whole models, made in this new folder")
    parser.add_argument("--layers", type=int, default=28, help="of the whole models")
    parser.add_argument("--threads", type=int, default=2, help="for the whole models")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"benchmark": "compare"}
    if arguments.full:
        figures |= full(arguments.full, arguments.threads, synthetic.Shape(layers=arguments.layers))
    else:
        for dtype in ("Q4_K", "Q6_K"):
            figures |= of_format(dtype)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
