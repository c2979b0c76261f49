"""What the sweep alone says of the benchmark's faults of the weights: before anything is run."""

from __future__ import annotations

import pytest
from tests.analysis.planted import judge

from driftscope.faultbench.controls import fine_tuned
from driftscope.faultbench.subjects import Subject, Workbench
from driftscope.faultbench.weights import INJECTIONS

NAMED = ("F01", "F02", "F04", "F06", "F08", "F09", "F12", "F33", "F34")
# The scales of blocks that are taken for one leave no factor that is the same everywhere.
BY_SWEEP = [item for item in INJECTIONS if item.fault in NAMED and item.name != "block-scales"]


@pytest.mark.parametrize("scheme", ["F32", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("injection", BY_SWEEP, ids=lambda item: f"{item.fault}-{item.name}")
def test_the_sweep_names_the_tensors_and_the_class(injection: object, scheme: str, bench: Workbench) -> None:
    for model in ("qwen2", "qwen2-square"):
        site = bench.site(Subject(model, scheme))
        if injection.unless(site) is None:  # type: ignore[attr-defined]
            break
    else:
        assert injection.fault in ("F06", "F34"), "no model takes the fault"  # type: ignore[attr-defined]
        return
    faulty = injection.artifact(site)  # type: ignore[attr-defined]
    found = judge(site.teacher, faulty)
    changed = {
        name
        for name, ref in faulty.tensors.items()
        if name not in site.artifact.tensors
        or ref.file != site.artifact.tensors[name].file
        or ref.offset != site.artifact.tensors[name].offset
    }
    assert set(found["at_fault"]) == changed
    classes = {found["found"][name]["class"] for name in found["at_fault"]}
    assert classes <= set(injection.classes)  # type: ignore[attr-defined]
    assert classes


@pytest.mark.parametrize("scheme", ["F32", "Q8_0", "Q4_K_M"])
def test_a_clean_subject_has_only_expected_relations(scheme: str, bench: Workbench) -> None:
    site = bench.site(Subject("qwen2", scheme))
    found = judge(site.teacher, site.artifact)
    assert found["holds"]
    assert found["searched"]["tensors"] == 0


def test_the_control_of_other_weights_is_said_to_be_another_training(bench: Workbench) -> None:
    base = bench.artifact("qwen2")
    found = judge(base, fine_tuned(base, 0))
    assert found["conclusion"] == "different-weights"
