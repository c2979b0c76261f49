"""All injections, and the subjects that they are put into."""

from __future__ import annotations

from driftscope.faultbench import architectures, capture, engine, hyperparameters, weights
from driftscope.faultbench.injection import Injection
from driftscope.faultbench.subjects import DEFAULT, Subject

INJECTIONS: tuple[Injection, ...] = tuple(
    sorted(
        (
            *(*weights.INJECTIONS, *hyperparameters.INJECTIONS, *engine.INJECTIONS, *capture.INJECTIONS),
            *architectures.INJECTIONS,
        ),
        key=lambda injection: injection.id,
    )
)

TINY_SUBJECTS = (
    Subject("qwen2", regimes=("short",)),
    Subject("qwen2", "Q8_0", "int8-dot", regimes=("short",)),
    Subject("qwen2", "Q4_K_M", "int8-dot", regimes=("short",)),
    Subject("qwen2-square", regimes=("long", "rows")),
    Subject("qwen2-square", "Q8_0", "int8-dot", regimes=("rows",), only=("F21", "F27")),
    Subject("qwen2-window", regimes=("short", "long"), only=("F19",)),
    Subject("qwen2-window", "Q4_K_M", "int8-dot", regimes=("long",), only=("F19",)),
    Subject("qwen2-scaled", regimes=("short", "long"), only=("F14",)),
    Subject("qwen2-scaled", "Q8_0", "int8-dot", regimes=("short",), only=("F14",)),
    Subject("qwen2-massive", regimes=("short", "rows"), only=("F25",)),
    Subject("qwen2-massive", "Q4_1", "f32", "q8_1", regimes=("short", "rows"), only=("F26",)),
)

DEFAULT_SUBJECTS = (
    Subject(DEFAULT, regimes=("short",)),
    Subject(DEFAULT, "Q4_K_M", "int8-dot", regimes=("short",)),
    Subject(DEFAULT, regimes=("rows",), only=("F27",)),
    Subject(DEFAULT, regimes=("long",), only=("F15", "F16")),
)


def injection(name: str) -> Injection:
    """The injection of an id, ``F01/rows-of-q-and-k``."""
    return next(item for item in INJECTIONS if item.id == name)


def why_not(item: Injection, subject: Subject) -> str | None:
    """Why an injection is not run on a subject by plan; what depends on the model is `Injection.unless`."""
    if subject.only and item.fault not in subject.only:
        return "the model is there for other faults"
    if item.models and subject.model not in item.models:
        return f"needs the model {' or '.join(item.models)}"
    return None
