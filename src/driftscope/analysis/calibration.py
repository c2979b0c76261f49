"""Clean runs, and the floors that they give.

A run is a small random model in one storage format, passed by an engine with habits of its own
(`driftscope.analysis.clean_engines`), recorded, and replayed by ours. Nothing in it is wrong, so its scores
are those of noise. The runs go through storage formats, arithmetics, shapes, orders of summation, lengths of
prompts, and sets of taps that a trace leaves out. Half of the runs are fitted; the rest is held out and tells
how often a clean trace is flagged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from driftscope.analysis.clean_engines import ORDERS, CleanEngine, Habits
from driftscope.analysis.first_divergence import ALPHA, flags
from driftscope.analysis.floors import Floors
from driftscope.analysis.proportion import clopper_pearson
from driftscope.analysis.random_models import Shape, random_weights, write_random_model
from driftscope.forward.arithmetic import Arithmetic

Rows = list[dict[str, Any]]

RUNS = 120
"""Runs of a calibration, an even multiple of the number of `SETTINGS`."""

LENGTHS = ((1, 4, 9), (2, 6, 11), (3, 5, 16))
"""Tokens of a run's prompts."""

SHAPES = (
    Shape("llama", 256, 256, heads=2, kv_heads=1, head_dim=64),
    Shape("qwen2", 256, 128, heads=7, kv_heads=1, head_dim=32, theta=1e6),
    Shape("qwen3", 256, 256, heads=4, kv_heads=1, head_dim=32, theta=5e5),
    Shape("mistral", 512, 128, heads=4, kv_heads=2, head_dim=64, window=6),
    Shape("llama", 64, 1536, heads=2, kv_heads=2, head_dim=32, vocabulary=320),
)

_INTEGER_FORMATS = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
)

LEFT_OUT: tuple[frozenset[str], ...] = (
    *(frozenset[str](),) * 3,
    frozenset({"ffn_silu"}),
    frozenset({"qkv_matmul", "ffn_silu"}),
    frozenset({"attn_scores", "attn_softmax"}),
    frozenset({"attn_norm", "ffn_norm", "ffn_silu", "ffn_swiglu"}),
    frozenset({"attn_norm", "qkv_matmul", "qkv_bias", "attn_scores", "attn_softmax", "ffn_gate", "ffn_up"}),
)
"""Taps that a trace lacks: as engines have no such op of their own, fuse it, or say little."""


@dataclass(frozen=True)
class Run:
    """One clean run.

    Attributes:
        name: what it is, in words.
        arithmetic: what it was computed in.
        rows: of the ``replay`` table.
    """

    name: str
    arithmetic: Arithmetic
    rows: Rows


SETTINGS: tuple[tuple[str, Arithmetic], ...] = (
    *((name, Arithmetic.of("int8-dot")) for name in _INTEGER_FORMATS[::2]),
    *((name, Arithmetic.of("int8-dot", kv_type="f16")) for name in _INTEGER_FORMATS[1::2]),
    *((name, Arithmetic.of("f32")) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_K")),
    *((name, Arithmetic.of("int8-dot", kv_type="f16")) for name in ("Q4_K", "Q8_0", "F16", "BF16")),
    ("F32", Arithmetic.of("f32", kv_type="f16")),
    *((name, Arithmetic.of("f32", dtype=name.lower())) for name in ("BF16", "F16") * 4),
)
"""Storage formats, each with an arithmetic that engines run it in."""


def clean_run(number: int, folder: Path) -> Run:
    """Make the clean run of a number; the same number gives the same bytes.

    Args:
        number: from 0; it is the seed of weights, tokens and habits.
        folder: an empty folder for the model and the trace.
    """
    from driftscope.analysis.replay import Replayer
    from driftscope.engines.own import record

    random = np.random.Generator(np.random.Philox([number, 1]))
    fmt, arithmetic = SETTINGS[number % len(SETTINGS)]
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    habits = _habits(random)
    left_out = LEFT_OUT[int(random.integers(len(LEFT_OUT)))]
    weights = random_weights(shape, number)
    reference = write_random_model(folder / "reference.bin", shape.config, weights)
    own = write_random_model(folder / "own.bin", shape.config, weights, fmt)
    lengths = LENGTHS[int(random.integers(len(LENGTHS)))]
    prompts = [
        (f"{length} tokens", [int(token) for token in random.integers(0, shape.vocabulary, size=length)])
        for length in lengths
    ]
    engine = CleanEngine(own, arithmetic, habits, seed=number)
    trace = record(
        engine,
        prompts,
        folder / "trace",
        declared=arithmetic,
        wanted=lambda layer, tap: tap not in left_out,
    )
    replayer = Replayer(trace, own, reference=reference, components=("engine", "model"))
    dtype, kv_type = arithmetic.dtype, arithmetic.policy.kv_type
    path = arithmetic.policy.base.path
    name = f"{number}: {fmt} {path} {dtype} kv {kv_type}, {shape.architecture}, {habits.order}"
    return Run(name, arithmetic, replayer.rows(path=str(number)))


def _habits(random: np.random.Generator) -> Habits:
    order = list(ORDERS)[int(random.integers(len(ORDERS)))]
    return Habits(order, *(bool(flag) for flag in random.integers(0, 2, size=6)))


def clean_runs(
    numbers: Sequence[int], *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Run]:
    """Make several runs, one at a time, in a temporary folder."""
    for index, number in enumerate(numbers):
        with tempfile.TemporaryDirectory() as folder:
            yield clean_run(number, Path(folder))
        progress(index + 1, len(numbers))


def calibrate(
    runs: int = RUNS,
    *,
    first: int = 0,
    alpha: float = ALPHA,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Floors:
    """Fit floors to clean runs, and count the false alarms on as many others.

    Runs are dealt out by turns of all settings, so that both halves hold every format and arithmetic.

    Args:
        runs: how many, both halves together.
        first: number of the first run.
        alpha: error rate of a trace's flags that is counted.
        progress: called with the runs done and their number.

    Returns:
        The floors; ``calibration`` says what they rest on.
    """
    found = list(clean_runs(range(first, first + runs), progress=progress))
    fitted = [run for index, run in enumerate(found) if (index // len(SETTINGS)) % 2 == 0]
    held_out = [run for index, run in enumerate(found) if (index // len(SETTINGS)) % 2 == 1]
    floors = Floors.fit((run.name, row, run.arithmetic) for run in fitted for row in run.rows)
    return Floors(
        floors.cells,
        {
            "runs": len(fitted),
            "first_run": first,
            "formats": sorted({fmt for fmt, _ in SETTINGS}),
            "architectures": sorted({shape.architecture for shape in SHAPES}),
            "orders": list(ORDERS),
            "held_out": false_alarms(floors, held_out, alpha),
        },
    )


def false_alarms(floors: Floors, runs: Sequence[Run], alpha: float = ALPHA) -> dict[str, Any]:
    """How often clean runs are flagged.

    Returns:
        ``runs`` and ``flagged`` (runs with any flag at `alpha`), their ``rate`` with a 95 % interval
        (``low``, ``high``; Clopper and Pearson 1934), the ``tests`` made, and ``tails``: the share of single
        tests below each of some probabilities.
    """
    flagged = [run for run in runs if flags(run.rows, floors, alpha, arithmetic=run.arithmetic)]
    tails = np.array(
        [
            tail
            for run in runs
            for row in run.rows
            for statistic, tail in floors.tail_probabilities(row, run.arithmetic).items()
            if row[statistic] is not None
        ]
    )
    low, high = clopper_pearson(len(flagged), len(runs))
    return {
        "alpha": alpha,
        "runs": len(runs),
        "flagged": len(flagged),
        "flagged_runs": [run.name for run in flagged],
        "rate": len(flagged) / len(runs) if runs else None,
        "low": low,
        "high": high,
        "tests": int(tails.size),
        "tails": {
            str(level): float(np.mean(tails <= level)) if tails.size else None
            for level in (0.1, 0.01, 0.001, 0.0001)
        },
    }
