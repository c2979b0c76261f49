"""What an injected fault is: where it goes, what it needs, and what the tool should find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.faultbench.trace_in_memory import MemoryTrace
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL


@dataclass(frozen=True)
class Spot:
    """An op: layer (-1 for the whole model), tap, and q, k or v where the tap has parts."""

    layer: int
    tap: str
    part: str = ""

    def __str__(self) -> str:
        where = self.tap if self.layer == WHOLE_MODEL else f"layers.{self.layer}.{self.tap}"
        return f"{where}.{self.part}" if self.part else where


@dataclass(frozen=True)
class Site:
    """The model that a fault is put into.

    Attributes:
        artifact: what the engine runs, of the tested format.
        teacher: the same model in float32.
        arithmetic: what the engine says that it computes in.
        layer: the layer for faults that sit in one.
    """

    artifact: Artifact
    teacher: Artifact
    arithmetic: Arithmetic
    layer: int

    @property
    def config(self) -> ModelConfig:
        """Hyperparameters of the model, without the fault."""
        return self.artifact.config


@dataclass(frozen=True)
class Injection:
    """One way to put one fault into a model.

    Attributes:
        fault: its id in `driftscope.faultbench.faults.FAULTS`.
        name: short and unique, e.g. ``rows-of-q-and-k``.
        mechanism: ``weights``, ``configuration``, ``engine`` or ``capture``.
        says: the injection in words.
        first: the op that should be named first, given the site.
        classes: classes that are right; the first is the one of the catalogue.
        unless: why it cannot be put into a site, or None where it can.
        artifact: the model with the fault (``weights``, ``configuration``).
        engine: makes the faulty pass (``engine``).
        capture: changes what a clean trace holds (``capture``).
        regimes: prompts that it is run on.
        models: names of the models that it is run on; empty for all that `unless` lets through.
    """

    fault: str
    name: str
    mechanism: str
    says: str
    first: Callable[[Site], Spot]
    classes: tuple[str, ...]
    unless: Callable[[Site], str | None] = lambda site: None
    artifact: Callable[[Site], Artifact] | None = None
    engine: Callable[[Site], ForwardPass] | None = None
    capture: Callable[[MemoryTrace, Site], MemoryTrace] | None = None
    regimes: tuple[str, ...] = ("short", "long", "rows")
    models: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Fault and name, ``F01/rows-of-q-and-k``."""
        return f"{self.fault}/{self.name}"


def within(tap: str, part: str = "") -> Callable[[Site], Spot]:
    """The op of the site's layer."""
    return lambda site: Spot(site.layer, tap, part)


def from_the_start(tap: str, part: str = "") -> Callable[[Site], Spot]:
    """The op of layer 0, for a fault that every layer has."""
    return lambda site: Spot(0, tap, part)


def outside(tap: str) -> Callable[[Site], Spot]:
    """An op of the whole model."""
    return lambda site: Spot(WHOLE_MODEL, tap)
