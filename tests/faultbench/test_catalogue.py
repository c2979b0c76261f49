"""The catalogue and the plan are complete and consistent."""

from __future__ import annotations

from collections import Counter

import pytest

from driftscope.faultbench import gguf_files, torch_modules
from driftscope.faultbench.catalogue import DEFAULT_SUBJECTS, INJECTIONS, TINY_SUBJECTS, injection
from driftscope.faultbench.clean import clean_pairs
from driftscope.faultbench.faults import CONTROLS, FAULTS
from driftscope.faultbench.rates import CLEAN_TARGET
from driftscope.faultbench.run import units
from driftscope.faultbench.subjects import REGIMES
from driftscope.faultbench.tasks import deal, tasks


def test_the_catalogue_has_the_35_faults_and_7_controls() -> None:
    assert list(FAULTS) == [f"F{number:02d}" for number in range(1, 36)]
    assert list(CONTROLS) == [f"C{number}" for number in range(1, 8)]


def test_every_fault_is_injected() -> None:
    injected = {item.fault for item in INJECTIONS} | {"F07"}

    assert injected == set(FAULTS)


def test_names_are_unique_and_classes_are_the_catalogues() -> None:
    assert max(Counter(item.id for item in INJECTIONS).values()) == 1
    for item in INJECTIONS:
        assert FAULTS[item.fault].class_ in item.classes, item.id
        assert set(item.regimes) <= set(REGIMES), item.id
        assert sum(way is not None for way in (item.artifact, item.engine, item.capture)) == 1, item.id


@pytest.mark.parametrize("faults", [gguf_files.FAULTS, torch_modules.FAULTS])
def test_faults_elsewhere_are_of_the_catalogue(faults: tuple[object, ...]) -> None:
    for fault in faults:
        assert FAULTS[fault.fault].class_ in fault.classes  # type: ignore[attr-defined]


def test_every_fault_is_run_on_a_tiny_model_and_most_on_the_default_one() -> None:
    tiny = {injection(unit.injection).fault for unit in units(TINY_SUBJECTS)}
    default = {injection(unit.injection).fault for unit in units(DEFAULT_SUBJECTS)}

    assert tiny == set(FAULTS) - {"F07"}
    assert set(FAULTS) - default == {"F07", "F25", "F26"}


def test_there_are_enough_clean_pairs_without_extras() -> None:
    ours = [pair for pair in clean_pairs(default=False) if pair.source.startswith("driftscope")]

    assert len(ours) >= CLEAN_TARGET
    assert len({pair.id for pair in ours}) == len(ours)


def test_jobs_share_all_tasks_evenly() -> None:
    listed = tasks(default=True)
    parts = [deal(listed, index, 5) for index in range(5)]

    assert sorted(map(repr, listed)) == sorted(repr(task) for part in parts for task in part)
    costs = [sum(task.cost for task in part) for part in parts]
    assert max(costs) - min(costs) <= max(task.cost for task in listed)


def test_naming_faults_leaves_controls_and_others_out() -> None:
    listed = tasks(default=False, faults=("F03",))

    assert {task.kind for task in listed} == {"fault"}
    assert {injection(task.what.injection).fault for task in listed} == {"F03"}
