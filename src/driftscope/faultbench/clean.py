"""Clean pairs: sound engines on sound models, in which nothing may be found."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from driftscope.analysis.clean_engines import ORDERS, CleanEngine, Habits
from driftscope.analysis.floors import Floors
from driftscope.artifacts.model import Artifact
from driftscope.engines.trace import Trace
from driftscope.faultbench.elsewhere import Elsewhere, why_not
from driftscope.faultbench.examine import Finding, examine
from driftscope.faultbench.subjects import DEFAULT, Subject, Workbench
from driftscope.faultbench.trace_in_memory import MemoryTrace, record
from driftscope.forward.model import ForwardPass

Result = dict[str, Any]

SCHEMES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K")
SEEDS = (21, 22, 23, 24)
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class CleanPair:
    """A sound engine on a sound model.

    Attributes:
        source: ``driftscope``, ``driftscope-other-habits`` (sums in another order, other exponentials and so
            on), ``llama.cpp`` or ``transformers``.
        subject: model, format, path; its seed is also that of the habits.
        regime: the prompts.
        options: of the engine.
    """

    source: str
    subject: Subject
    regime: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        """All of it in one line."""
        options = "".join(f"/{key}={value}" for key, value in self.options)
        return f"clean|{self.source}{options}|{self.subject.id}|{self.regime}"


def _habits(seed: int) -> Habits:
    """Habits of a seed, of another stream of random numbers than those that floors are calibrated on."""
    random = np.random.Generator(np.random.Philox([seed, 77]))
    order = list(ORDERS)[int(random.integers(len(ORDERS)))]
    return Habits(order, *(bool(flag) for flag in random.integers(0, 2, size=6)))


def _other_habits() -> Iterator[CleanPair]:
    for number, scheme in enumerate(SCHEMES):
        for index, seed in enumerate(SEEDS):
            model = ("qwen2-square", "llama")[(number + index) % 2]
            path = "f32" if scheme in _FLOATS or index == 3 else "int8-dot"
            kv = "f16" if index == 2 else "f32"
            subject = Subject(model, scheme, path, kv_type=kv, seed=seed)
            yield CleanPair("driftscope-other-habits", subject, "short")


_OWN = tuple(
    CleanPair("driftscope", subject, regime)
    for subject, regime in (
        (Subject("qwen2", "Q4_K_M", "int8-dot"), "long"),
        (Subject("qwen2", "Q8_0", "f32"), "rows"),
        (Subject("qwen2-window", "Q4_K_M", "int8-dot"), "long"),
        (Subject("qwen2-scaled", "Q8_0", "int8-dot"), "short"),
        (Subject("qwen2-massive", "Q4_K_M", "int8-dot"), "rows"),
        (Subject("llama", "Q6_K", "int8-dot"), "rows"),
        (Subject("qwen2", "Q5_K_M", "f32", seed=5), "short"),
    )
)
_OF_DEFAULT = tuple(
    CleanPair("driftscope", subject, regime)
    for subject, regime in (
        (Subject(DEFAULT), "short"),
        (Subject(DEFAULT, "Q4_K_M", "int8-dot"), "short"),
        (Subject(DEFAULT, "Q4_K_M", "f32"), "rows"),
        (Subject(DEFAULT, "Q4_K_M", "int8-dot"), "rows"),
    )
)
_LLAMA_CPP = (
    *(
        CleanPair("llama.cpp", Subject("qwen2-square", scheme, "int8-dot", seed=seed), "short")
        for seed, scheme in enumerate(("F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q6_K", "Q4_0"), start=31)
    ),
    CleanPair("llama.cpp", Subject("llama", "Q4_K_M", "int8-dot", seed=31), "rows", (("repack", False),)),
    CleanPair("llama.cpp", Subject("llama", "Q8_0", "int8-dot", seed=32), "short", (("kv_type", "f32"),)),
)
_TRANSFORMERS = (
    *(
        CleanPair("transformers", Subject("qwen2-square", seed=seed), "short", (("dtype", dtype),))
        for seed, dtype in enumerate(("f32", "bf16", "f16"), start=41)
    ),
    CleanPair("transformers", Subject("llama", seed=41), "rows", (("attention", "sdpa"),)),
    CleanPair("transformers", Subject("llama", seed=42), "short"),
)


def clean_pairs(*, default: bool) -> tuple[CleanPair, ...]:
    """Every clean pair; those of the default model where it takes part."""
    found = (*_other_habits(), *_OWN, *_LLAMA_CPP, *_TRANSFORMERS)
    if not default:
        return found
    return (
        *found,
        *_OF_DEFAULT,
        CleanPair("llama.cpp", Subject(DEFAULT, "Q4_K_M", "int8-dot"), "short"),
        CleanPair("transformers", Subject(DEFAULT), "short"),
    )


class Clean:
    """Runs clean pairs."""

    def __init__(self, bench: Workbench, floors: Floors, *, threads: int = 1) -> None:
        """Prepare."""
        self._bench = bench
        self._floors = floors
        self._threads = threads
        self._elsewhere = Elsewhere(bench, floors, threads=threads)

    def run(self, pair: CleanPair) -> Result:
        """The row of a clean pair."""
        row = {"id": pair.id, "control": "C1", "source": pair.source, "model": pair.subject.model}
        row |= {"format": pair.subject.scheme, "path": pair.subject.path, "regime": pair.regime}
        reason = why_not(pair.source) if pair.source in ("llama.cpp", "transformers") else None
        if reason:
            return {**row, "status": "not-run", "reason": reason}
        with tempfile.TemporaryDirectory() as folder:
            trace = self.trace(pair, Path(folder))
            found = self.examine(trace, pair.subject)
        return {**row, **verdict(found), "figures": {}}

    def trace(self, pair: CleanPair, out: Path) -> Trace:
        """The trace of a clean pair."""
        subject, options = pair.subject, dict(pair.options)
        if pair.source == "llama.cpp":
            file = self._bench.file(subject.model, subject.scheme, subject.seed)
            return self._elsewhere.llama_trace(file, subject.model, out, regime=pair.regime, **options)
        if pair.source == "transformers":
            return self._elsewhere.torch_trace(
                subject.model, None, 0, out, regime=pair.regime, seed=subject.seed, **options
            )
        if pair.source == "driftscope":
            return own_trace(self._bench, subject, pair.regime, threads=self._threads)
        artifact = self._bench.artifact(subject.model, subject.scheme, subject.seed)
        engine = CleanEngine(artifact, subject.arithmetic, _habits(subject.seed), seed=subject.seed)
        prompts = self._bench.prompts(subject.model, pair.regime, subject.seed)
        return record(engine, prompts, subject.arithmetic)

    def examine(self, trace: Trace, subject: Subject) -> Finding:
        """What the tool says of a trace of a sound model, beside the teacher."""
        own = self._bench.artifact(subject.model, subject.scheme, subject.seed)
        teacher = self._bench.artifact(subject.model, "F32", subject.seed)
        return examine(trace, own, teacher, self._floors, threads=self._threads)


def own_trace(bench: Workbench, subject: Subject, regime: str, *, threads: int = 1) -> MemoryTrace:
    """A trace of our own pass over a sound model."""
    artifact: Artifact = bench.artifact(subject.model, subject.scheme, subject.seed)
    policy = subject.arithmetic.policy
    forward = ForwardPass({policy.base.artifact: artifact}, policy, threads=threads)
    return record(forward, bench.prompts(subject.model, regime, subject.seed), subject.arithmetic)


def verdict(finding: Finding) -> Result:
    """Whether something was found, and what."""
    points = [f"{point['layer']}.{point['tap']}" for point in finding.capture_points]
    return {
        "status": "run",
        "reason": "",
        "alarm": finding.first is not None or bool(points),
        "found": finding.summary(),
        "capture_points": points,
        "tested": int(finding.entry["tested"]),
    }
