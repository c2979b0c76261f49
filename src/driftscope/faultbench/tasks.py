"""The benchmark as a list of tasks that jobs share, and the running of one job's part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from driftscope.analysis.floors import Floors
from driftscope.faultbench import controls, inventory
from driftscope.faultbench.catalogue import DEFAULT_SUBJECTS, TINY_SUBJECTS
from driftscope.faultbench.clean import Clean, CleanPair, clean_pairs
from driftscope.faultbench.controls import Controls
from driftscope.faultbench.elsewhere import TORCH_MODELS, TORCH_MODELS_WITH_DEFAULT, Elsewhere
from driftscope.faultbench.result import Setting
from driftscope.faultbench.run import Runner, Unit, units
from driftscope.faultbench.subjects import Subject, Workbench

Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One thing to run.

    Attributes:
        kind: ``fault``, ``inventory``, ``llama.cpp``, ``transformers``, ``clean`` or ``control``.
        what: a `Unit`, a `Subject`, the name of a model, a `CleanPair` or the name of a control.
    """

    kind: str
    what: Any

    @property
    def cost(self) -> float:
        """Roughly how long it takes, in units of one fault in a short prompt of a tiny model."""
        if self.kind == "fault":
            unit: Unit = self.what
            size = {"short": 1.0, "rows": 1.5, "long": 6.0}[unit.regime]
            return size * (6.0 if unit.subject.model == "default" else 1.0)
        if self.kind == "clean":
            pair: CleanPair = self.what
            return 5.0 if pair.source != "driftscope" or pair.regime == "long" else 2.0
        return {"inventory": 0.1, "llama.cpp": 6.0, "transformers": 12.0, "control": 12.0}[self.kind]


def tasks(*, default: bool, tiny: bool = True, faults: tuple[str, ...] = ()) -> list[Task]:
    """Every task, in a fixed order.

    Args:
        default: whether the default model takes part.
        tiny: whether the tiny models do.
        faults: ids; empty for all of them, with the controls and the clean pairs.
    """
    subjects = (TINY_SUBJECTS if tiny else ()) + (DEFAULT_SUBJECTS if default else ())
    found = [Task("fault", unit) for unit in units(subjects, faults)]
    plain = [subject for subject in subjects if not subject.only]
    if not faults or "F07" in faults:
        seen: dict[tuple[str, str], Subject] = {}
        for subject in plain:
            seen.setdefault((subject.model, subject.scheme), subject)
        found += [Task("inventory", subject) for subject in seen.values()]
    if faults:
        return found
    if tiny:
        found.append(Task("llama.cpp", None))
        found += [Task("control", name) for name in controls.NAMES]
    models = TORCH_MODELS_WITH_DEFAULT if default else TORCH_MODELS
    found += [Task("transformers", model) for model in models if tiny or model == "default"]
    pairs = [pair for pair in clean_pairs(default=default) if tiny or pair.subject.model == "default"]
    return found + [Task("clean", pair) for pair in pairs]


def deal(listed: Sequence[Task], part: int, parts: int) -> list[Task]:
    """The tasks of one job: each goes to the job with least to do; the order within a job stays."""
    load = [0.0] * parts
    mine: list[int] = []
    for index in sorted(range(len(listed)), key=lambda i: (-listed[i].cost, i)):
        job = min(range(parts), key=lambda j: (load[j], j))
        load[job] += listed[index].cost
        if job == part:
            mine.append(index)
    return [listed[index] for index in sorted(mine)]


def run(
    listed: Sequence[Task],
    bench: Workbench,
    floors: Floors,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Result]]:
    """Run tasks.

    Returns:
        ``faults``, ``clean`` and ``controls``: rows.
    """
    runner = Runner(bench, floors, threads=threads)
    elsewhere = Elsewhere(bench, floors, threads=threads)
    clean = Clean(bench, floors, threads=threads)
    control = Controls(bench, floors, threads=threads)
    rows: dict[str, list[Result]] = {"faults": [], "clean": [], "controls": []}
    for number, task in enumerate(listed):
        if task.kind == "fault":
            rows["faults"] += runner.run(task.what)
        elif task.kind == "inventory":
            rows["faults"] += _inventory(task.what, bench)
        elif task.kind == "llama.cpp":
            rows["faults"] += elsewhere.llama_cpp()
        elif task.kind == "transformers":
            rows["faults"] += elsewhere.transformers(task.what)
        elif task.kind == "clean":
            rows["clean"].append(clean.run(task.what))
        else:
            rows["controls"] += control.run(task.what)
        progress(number + 1, len(listed))
    return rows


def _inventory(subject: Subject, bench: Workbench) -> Iterator[Result]:
    site = bench.site(subject)
    for fault in inventory.FAULTS:
        setting = Setting(
            fault="F07",
            injection=fault.name,
            says=fault.says,
            mechanism="inventory",
            judged="inventory",
            source="driftscope",
            model=subject.model,
            format=subject.scheme,
            path=subject.path,
            regime="none",
        )
        yield inventory.row(setting, fault, site)
