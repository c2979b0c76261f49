"""How fast two tensors are compared, as ratios within one run; prints one JSON line.

BF16 is compared with Q4_K and with Q6_K, as in a 7B model's sweep. That is set against the same work with
NumPy and the gguf package's dequantize (on a part, scaled), and against only reading the same bytes with the
same threads. The tensors are cut into pieces that are gone from the caches when their turn comes again; a
time is the sum over the pieces of the shortest of a few, so that other work on the machine matters little.

    python benchmarks/bench_compare.py
    python benchmarks/bench_compare.py --full FOLDER

With ``--full`` a pair of 7B models (15.2 GB and 4.7 GB) is made in FOLDER, compared by ``driftscope diff``
and removed. Its time is set against that of reading both files once: into a small buffer, and through a
memory map with the same threads; cold, when no page of them is in memory, and warm, when memory holds them,
which it must be large enough for. Seconds of the processor are told too: they depend less on what else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import synthetic
from numpy.typing import NDArray

from driftscope.kernels.compare import compare
from driftscope.kernels.parallel import over_rows

PIECES, ROWS, COLUMNS, REPEATS = 24, 512, 7168, 7
THREADS = (1, 2)
_READ_AT_ONCE = 1 << 26
_COPIED_AT_ONCE = 1 << 23

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


def watched(command: Sequence[str]) -> tuple[float, float, int]:
    """Seconds of a command, those of the processor, and the most bytes it held beyond pages of files."""
    start, before = time.perf_counter(), processor_seconds(resource.RUSAGE_CHILDREN)
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
    used = processor_seconds(resource.RUSAGE_CHILDREN) - before
    return time.perf_counter() - start, used, peak


def processor_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """Seconds of the processor so far, the system's share included."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def forget(files: Sequence[Path]) -> None:
    """Drop the pages of some files from memory, so that they are read from the disk again."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def copy_out(files: Sequence[Path]) -> float:
    """Seconds to read some files in order into one small buffer, as a checksum would."""
    start = time.perf_counter()
    buffer = bytearray(_COPIED_AT_ONCE)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def full(
    folder: Path, threads: Sequence[int], shape: synthetic.Shape, repeats: int, states: Sequence[str]
) -> dict[str, object]:
    """Compare a pair of whole models, from the disk and from memory; the pair is removed afterwards."""
    folder.mkdir(parents=True, exist_ok=False)
    try:
        teacher, candidate = folder / "teacher", folder / "candidate.gguf"
        start = time.perf_counter()
        synthetic.write_candidate(candidate, shape)
        synthetic.write_teacher(teacher, shape)
        figures: dict[str, object] = {"full_seconds_to_write": round(time.perf_counter() - start, 1)}
        files = [*sorted(teacher.glob("*.safetensors")), candidate]
        figures["full_gigabytes"] = round(sum(file.stat().st_size for file in files) / 1e9, 2)
        for state in states:
            times: dict[str, list[float]] = {}
            used: dict[str, list[float]] = {}
            peak = 0
            for _ in range(repeats):
                works: dict[str, Callable[[], Any]] = {"read": partial(copy_out, files)}
                for count in threads:
                    program = [sys.executable, "-m", "driftscope.cli", "diff", "--json"]
                    command = [*program, "--threads", str(count), str(teacher), str(candidate)]
                    works[f"mapped_{count}"] = partial(read_files, files, count)
                    works[f"diff_{count}"] = partial(watched, command)
                for name, work in works.items():
                    if state == "cold":
                        forget(files)
                    before = processor_seconds()
                    found = work()
                    of_processor = processor_seconds() - before
                    if isinstance(found, tuple):
                        found, of_processor, most = found
                        peak = max(peak, most)
                    times.setdefault(name, []).append(found)
                    used.setdefault(name, []).append(of_processor)
                    print(state, name, round(found, 2), round(of_processor, 2), file=sys.stderr, flush=True)
            for name in times:
                figures[f"{state}_{name}_seconds"] = [round(t, 2) for t in times[name]]
                figures[f"{state}_{name}_processor_seconds"] = [round(t, 2) for t in used[name]]
            for count in threads:
                diff = min(times[f"diff_{count}"])
                for way in ("read", f"mapped_{count}"):
                    figures[f"{state}_diff_{count}_over_{way}"] = round(diff / min(times[way]), 2)
            figures[f"{state}_peak_gigabytes_beyond_page_cache"] = round(peak / 1e9, 3)
        return figures
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", type=Path, help="compare whole models, made in this new folder")
    parser.add_argument("--layers", type=int, default=28, help="of the whole models")
    parser.add_argument("--vocab", type=int, default=152064, help="of the whole models")
    parser.add_argument("--states", nargs="+", default=["cold", "warm"], help="of the whole models' files")
    parser.add_argument("--repeats", type=int, default=2, help="of each time, for the whole models")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"benchmark": "compare"}
    if arguments.full:
        shape = synthetic.Shape(layers=arguments.layers, vocab=arguments.vocab)
        figures |= full(arguments.full, THREADS, shape, arguments.repeats, arguments.states)
    else:
        for dtype in ("Q4_K", "Q6_K"):
            figures |= of_format(dtype)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
