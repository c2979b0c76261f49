"""What a trace of llama.cpp costs beside llama.cpp's plain pass, as one JSON line.

One model, one context for each way, in turn in one process: the plain pass; the pass with every tap copied
and dropped; the pass with every tap written. Times are of the pass alone, without loading the model; `ratio`
is the best time over the plain pass's best. `peak_mib` is the resident memory that each way needs at its
highest, in a process of its own, and `held_mib` what the taps of one layer take.

    python benchmarks/bench_engine_trace.py model.gguf --tokens 100 --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from driftscope.artifacts.open import open_artifact
from driftscope.engines.llama_cpp import LlamaCppOptions
from driftscope.engines.llama_cpp_graph import Watch
from driftscope.engines.llama_cpp_recorder import Recorder
from driftscope.engines.llama_cpp_session import Session, load_api
from driftscope.engines.llama_cpp_taps import TapMap
from driftscope.engines.trace import TraceWriter

WAYS = ("plain", "copied", "written")


class _Counting(TraceWriter):
    """Counts bytes, and writes them if it is told to."""

    def __init__(self, folder: Path, keep: bool) -> None:
        super().__init__(folder)
        self.keep, self.bytes, self.largest = keep, 0, 0

    def write(self, stem: str, arrays: Mapping[str, Any]) -> None:
        size = sum(array.nbytes for array in arrays.values())
        self.bytes += size
        if ".layer-" in stem:
            self.largest = max(self.largest, size)
        if self.keep:
            super().write(stem, arrays)


class Way:
    """One way to run the pass."""

    def __init__(self, way: str, path: Path, options: LlamaCppOptions, tokens: int, stack: ExitStack) -> None:
        api = load_api()
        artifact = open_artifact(path)
        generator = np.random.Generator(np.random.Philox(0))
        self.ids = generator.integers(0, artifact.config.vocab_size, tokens).astype(np.int32)
        self.writer, self.recorder, self.watch = None, None, None
        self.runs = 0
        if way != "plain":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.writer = _Counting(folder, way == "written")
            self.recorder = Recorder(self.writer, TapMap(artifact), None)
            self.watch = Watch(api, self.recorder.wants, self.recorder.take)
        callback = self.watch and self.watch.callback
        self.session = stack.enter_context(Session(api, path, tokens, options, callback))

    def run(self) -> float:
        """Seconds of one pass."""
        self.runs += 1
        start = time.perf_counter()
        batches = list(self.session.batches(len(self.ids)))
        if self.recorder is not None:
            self.recorder.begin(self.runs, "prompt", len(self.ids), whole=len(batches) == 1)
        for begin, end in batches:
            if self.recorder is not None:
                self.recorder.batch(begin, end)
            self.session.decode(self.ids, begin, end)
            if self.recorder is not None and self.watch is not None:
                self.watch.check()
                self.recorder.end_batch()
        if self.recorder is not None:
            self.recorder.finish()
        return time.perf_counter() - start


def peak(way: str, arguments: argparse.Namespace, options: LlamaCppOptions) -> float:
    """MiB of a process that runs one way once."""
    command = [sys.executable, __file__, str(arguments.model), "--way", way]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "threads", "batch")]
    command += ["--flash"] * options.flash_attention
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(found.stdout)


def _peak_mib() -> float:
    # Not getrusage's figure: a process inherits that of the one that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=0, help="tokens at once, 0 for all")
    parser.add_argument("--flash", action="store_true", help="flash attention")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = LlamaCppOptions(
        threads=arguments.threads, batch_size=arguments.batch, flash_attention=arguments.flash
    )
    with ExitStack() as stack:
        if arguments.way is not None:
            Way(arguments.way, arguments.model, options, arguments.tokens, stack).run()
            print(_peak_mib())
            return
        ways = {way: Way(way, arguments.model, options, arguments.tokens, stack) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(arguments.repeats + 1):
            for way, runner in ways.items():
                taken = runner.run()
                if turn:
                    seconds[way].append(taken)
        counter = ways["copied"].writer
        assert counter is not None
        passes = arguments.repeats + 1
    best = {way: min(times) for way, times in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "engine-trace",
                "tokens": arguments.tokens,
                "options": dataclasses.asdict(options),
                "seconds": {way: round(time, 4) for way, time in best.items()},
                "ratio": {way: round(best[way] / best["plain"], 2) for way in WAYS[1:]},
                "taps_mib": round(counter.bytes / passes / 2**20, 1),
                "held_mib": round(counter.largest / 2**20, 1),
                "peak_mib": {way: round(peak(way, arguments, options), 1) for way in WAYS},
            }
        )
    )


if __name__ == "__main__":
    main()
