"""Runs faults: a pass with the fault, its trace, and what the tool says about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from driftscope.analysis.floors import Floors
from driftscope.artifacts.model import Artifact
from driftscope.faultbench.catalogue import INJECTIONS, injection, why_not
from driftscope.faultbench.engine import LastBits
from driftscope.faultbench.examine import effect, examine, kl_nats
from driftscope.faultbench.injection import Injection, Site
from driftscope.faultbench.result import Setting, judged, not_run
from driftscope.faultbench.subjects import DEFAULT, Subject, Workbench
from driftscope.faultbench.trace_in_memory import MemoryTrace, record
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL

Result = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A subject, a regime and an injection: what is run as one."""

    subject: Subject
    regime: str
    injection: str


def units(subjects: tuple[Subject, ...], faults: tuple[str, ...] = ()) -> Iterator[Unit]:
    """Every combination that the plan allows.

    Args:
        subjects: the models.
        faults: ids, empty for all.
    """
    for subject in subjects:
        for item in INJECTIONS:
            if (faults and item.fault not in faults) or why_not(item, subject):
                continue
            for regime in item.regimes:
                if regime in subject.regimes:
                    yield Unit(subject, regime, item.id)


class Runner:
    """Runs units on a workbench; keeps the clean trace of the subject at hand."""

    def __init__(self, bench: Workbench, floors: Floors, *, threads: int = 1) -> None:
        """Prepare."""
        self._bench = bench
        self._floors = floors
        self._threads = threads
        self._clean: tuple[tuple[Subject, str], MemoryTrace] | None = None
        self._rounding: dict[tuple[Subject, str], float | None] = {}

    def run(self, unit: Unit) -> list[Result]:
        """One row for each way in which the fault is judged."""
        item, site = injection(unit.injection), self._bench.site(unit.subject)
        reason = item.unless(site)
        if reason:
            return [not_run(setting(unit, item, _ways(item)[0]), "not-applicable", reason)]
        clean = self.clean(unit.subject, unit.regime)
        trace, faulty = self.faulty(unit, item, site, clean)
        kl = (0.0, 0) if item.mechanism == "capture" else _kl(clean, trace)
        return [self._judge(unit, item, site, trace, faulty, way, kl) for way in _ways(item)]

    def clean(self, subject: Subject, regime: str) -> MemoryTrace:
        """The trace without a fault."""
        if self._clean is None or self._clean[0] != (subject, regime):
            site = self._bench.site(subject)
            self._clean = ((subject, regime), self._record(subject, regime, site.artifact))
        return self._clean[1]

    def rounding(self, subject: Subject, regime: str) -> float | None:
        """Mean KL, in nats, that last bits of the residual stream cause in a sound pass."""
        key = (subject, regime)
        if key not in self._rounding:
            forward = LastBits(self._bench.site(subject))
            prompts = self._bench.prompts(subject.model, regime)
            trace = record(forward, prompts, subject.arithmetic, layers=())
            self._rounding[key] = _kl(self.clean(subject, regime), trace)[0]
        return self._rounding[key]

    def faulty(
        self, unit: Unit, item: Injection, site: Site, clean: MemoryTrace
    ) -> tuple[MemoryTrace, Artifact]:
        """The trace with the fault, and the model that was run for it."""
        if item.artifact is not None:
            artifact = item.artifact(site)
            return self._record(unit.subject, unit.regime, artifact), artifact
        if item.engine is not None:
            prompts = self._bench.prompts(unit.subject.model, unit.regime)
            return record(item.engine(site), prompts, unit.subject.arithmetic), site.artifact
        assert item.capture is not None
        return item.capture(clean, site), site.artifact

    def _record(self, subject: Subject, regime: str, artifact: Artifact) -> MemoryTrace:
        policy = subject.arithmetic.policy
        forward = ForwardPass({policy.base.artifact: artifact}, policy, threads=self._threads)
        return record(forward, self._bench.prompts(subject.model, regime), subject.arithmetic)

    def _judge(
        self,
        unit: Unit,
        item: Injection,
        site: Site,
        trace: MemoryTrace,
        faulty: Artifact,
        way: str,
        kl: tuple[float | None, int],
    ) -> Result:
        own, reference = (faulty, site.teacher) if way == "model" else (site.artifact, None)
        layers = _layers(unit.subject, site)
        finding = examine(trace, own, reference, self._floors, layers=layers, threads=self._threads)
        component = "model" if way == "model" else "engine"
        spot = item.first(site)
        rounding = None if way == "capture" else self.rounding(unit.subject, unit.regime)
        size = effect(finding.rows, spot, component, self._floors, unit.subject.arithmetic, kl, rounding)
        if way == "capture":
            # It is no error of the computation; the tap is wrong by as much as its consumers are.
            size = dataclasses.replace(size, above_floor=True)
        return judged(setting(unit, item, way), spot, item.classes, finding, size)


def setting(unit: Unit, item: Injection, way: str) -> Setting:
    """What a row says of its making."""
    subject = unit.subject
    return Setting(
        fault=item.fault,
        injection=item.name,
        says=item.says,
        mechanism=item.mechanism,
        judged=way,
        source="driftscope",
        model=subject.model,
        format=subject.scheme,
        path=subject.path,
        regime=unit.regime,
    )


def _layers(subject: Subject, site: Site) -> list[int] | None:
    """Layers that are replayed: of the default model only those up to two behind the fault, and the head.

    What comes later cannot be the first divergence. Every layer of the clean pairs is replayed.
    """
    return [*range(site.layer + 3), WHOLE_MODEL] if subject.model == DEFAULT else None


def _ways(item: Injection) -> tuple[str, ...]:
    """Weights and hyperparameters are looked for in the engine that ran them, and in the model itself."""
    if item.mechanism == "capture":
        return ("capture",)
    return ("engine", "model") if item.artifact is not None else ("engine",)


def _kl(clean: MemoryTrace, faulty: MemoryTrace) -> tuple[float | None, int]:
    return kl_nats(clean.tap(-1, "lm_head"), faulty.tap(-1, "lm_head"))
