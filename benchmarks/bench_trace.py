"""What all taps cost beside the matmuls: a traced pass over a model of 7B shape, as one JSON line.

Both paths run over a few generated layers with every tap recorded as a trace records it. Within one and the
same run the time inside the matmuls (decoding the weights and quantizing the activations included), inside
the taps' statistics and in all else is taken apart; `ratio` is the time of a model of 28 such layers, with
embedding and head, over the time of its matmuls alone.

    python benchmarks/bench_trace.py --layers 2 --tokens 7 --threads 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import Shape, write_candidate

from driftscope.artifacts.open import open_artifact
from driftscope.engines.own import forward_pass
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.weights import Weights
from driftscope.stages.trace import Recorder

PATHS = ("candidate.f32", "candidate.int8-dot")
LAYERS = 28
REPEATS = 3


@dataclass
class Clock:
    """Seconds since the last `take`, in total and within the functions that are timed."""

    total: float = 0.0
    matmuls: float = 0.0
    taps: float = 0.0

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`function`, whose time is added to a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                setattr(self, part, getattr(self, part) + time.perf_counter() - start)

        return call

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Time of everything inside."""
        start = time.perf_counter()
        yield
        self.total += time.perf_counter() - start


def one_pass(forward: ForwardPass, batch: TokenBatch, path: str) -> tuple[Clock, Clock]:
    """Run a traced pass: times of the layers, and of the embedding and the head."""
    prompts = [{"id": "prompt", "tokens": batch.n_tokens}]
    recorder = Recorder(forward, path, prompts, ())
    layers, ends = Clock(), Clock()
    plain = Weights.matmul, Recorder.__call__

    def measured(clock: Clock, work: Callable[[], Any]) -> Any:
        Weights.matmul = clock.timed(plain[0], "matmuls")  # type: ignore[method-assign]
        Recorder.__call__ = clock.timed(plain[1], "taps")  # type: ignore[method-assign]
        try:
            with clock.whole():
                return work()
        finally:
            Weights.matmul, Recorder.__call__ = plain  # type: ignore[method-assign]

    hidden = measured(ends, lambda: forward.embed(batch, recorder))
    span = range(forward.config.num_layers)
    hidden = measured(layers, lambda: forward.run_layers(hidden, batch, span, recorder))
    measured(ends, lambda: forward.head(hidden, tap=recorder))
    return layers, ends


def of_whole_model(layers: Clock, ends: Clock, n_layers: int) -> dict[str, float]:
    """Figures of a model of `LAYERS` layers from a pass over `n_layers`."""
    scale = LAYERS / n_layers
    total, matmuls, taps = (
        scale * getattr(layers, part) + getattr(ends, part) for part in ("total", "matmuls", "taps")
    )
    return {
        "ratio": round(total / matmuls, 3),
        "taps_share": round(taps / total, 3),
        "other_ops_share": round((total - matmuls - taps) / total, 3),
        "seconds": round(total, 3),
        "layers_ratio": round(layers.total / layers.matmuls, 3),
    }


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers to generate and run")
    parser.add_argument("--tokens", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="GGUF file to run instead of a generated one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.model
        if file is None:
            file = Path(folder) / "model.gguf"
            write_candidate(file, Shape(layers=options.layers))
        artifact = open_artifact(file)
        generator = np.random.Generator(np.random.Philox(0))
        ids = generator.integers(0, artifact.config.vocab_size, options.tokens)
        batch = TokenBatch.of([ids.tolist()])
        figures = {}
        for path in PATHS:
            forward = forward_pass({"candidate": artifact}, path, threads=options.threads)
            one_pass(forward, batch, path)
            runs = [one_pass(forward, batch, path) for _ in range(REPEATS)]
            best = min(runs, key=lambda run: run[0].total + run[1].total)
            figures[path] = of_whole_model(*best, artifact.config.num_layers)
    print(
        json.dumps(
            {
                "benchmark": "trace",
                "layers_run": artifact.config.num_layers,
                "layers": LAYERS,
                "tokens": options.tokens,
                "threads": options.threads,
                "paths": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
