"""Faults of Gemma and Phi-3 from end to end: op and class are named; a sound pass leaves nothing to find."""

from __future__ import annotations

import numpy as np
import pytest

from driftscope.analysis.floors import Floors
from driftscope.faultbench.architectures import fused_by_groups
from driftscope.faultbench.catalogue import DEFAULT_SUBJECTS, INJECTIONS, TINY_SUBJECTS, why_not
from driftscope.faultbench.clean import own_trace
from driftscope.faultbench.edited import values_of
from driftscope.faultbench.examine import examine
from driftscope.faultbench.run import Runner, Unit, units
from driftscope.faultbench.subjects import Subject, Workbench
from driftscope.faultbench.weights import tensor

MODELS = ("gemma2", "gemma3", "phi3")
FAULTS = (
    *("F02", "F03", "F04", "F11", "F14", "F16", "F18", "F19", "F22", "F23", "F24"),
    *("F30", "F31", "F32", "F33"),
)
RIGHT = {"detected": True, "layer_right": True, "op_right": True, "class_right": True}


@pytest.mark.parametrize("model", MODELS)
def test_a_sound_pass_is_clean(bench: Workbench, model: str) -> None:
    subject = Subject(model, "Q8_0", "int8-dot")
    own, teacher = bench.artifact(model, "Q8_0"), bench.artifact(model)
    finding = examine(own_trace(bench, subject, "short"), own, teacher, Floors({}))

    assert finding.first is None
    assert not finding.capture_points


def planned() -> list[tuple[str, str]]:
    """Model and injection of all that `FAULTS` has for these models."""
    return [
        (model, unit.injection)
        for model in MODELS
        for unit in units((Subject(model, regimes=("short",)),), FAULTS)
    ]


@pytest.mark.parametrize(("model", "name"), planned())
def test_faults_are_named(bench: Workbench, model: str, name: str) -> None:
    for row in Runner(bench, Floors({})).run(Unit(Subject(model), "short", name)):
        if row["status"] == "not-applicable":
            assert (model, name) in NOT_APPLICABLE
        else:
            assert {key: row[key] for key in RIGHT} == RIGHT, row


NOT_APPLICABLE = {
    *(("gemma2", name) for name in ("F14/factors-dropped", "F18/logits-capped", "F18/scores-capped")),
    *(("phi3", name) for name in ("F14/factors-dropped",)),
    # Without their window those layers would take the theta of the others, too.
    ("gemma3", "F19/window-ignored"),
    *((model, "F23/gelu-tanh") for model in ("gemma2", "gemma3")),
}


def test_the_catalogue_has_what_these_models_can_have(bench: Workbench) -> None:
    run = {
        (model, name)
        for model, name in planned()
        if next(item for item in INJECTIONS if item.id == name).unless(bench.site(Subject(model))) is None
    }

    for fault in ("F03", "F04", "F11", "F16", "F19", "F23", "F24", "F31", "F32"):
        assert {model for model, name in run if name.startswith(fault)} == set(MODELS), fault
    assert ("gemma2", "F18/score-cap-dropped") in run
    assert ("gemma3", "F16/local-theta-times-ten") in run
    assert ("phi3", "F02/fused-by-groups") in run


def test_other_models_have_no_row_more() -> None:
    of_these = [item for item in INJECTIONS if item.models and set(item.models) <= set(MODELS)]

    assert len(of_these) == 15
    for item in of_these:
        assert all(why_not(item, subject) for subject in (*TINY_SUBJECTS, *DEFAULT_SUBJECTS))


def test_groups_of_the_fused_rows(bench: Workbench) -> None:
    """Of a matrix of two groups, the q of the second group begins where the first one's v ends."""
    site = bench.site(Subject("phi3"))
    config, dim = site.config, site.config.head_dim
    assert (config.num_heads, config.num_kv_heads) == (4, 2)
    fused = np.concatenate([values_of(site.artifact, tensor(site.layer, which)) for which in "qkv"])
    heads = fused.reshape(8, dim, -1)
    found = {
        which: values_of(fused_by_groups(site), tensor(site.layer, which)).reshape(-1, dim, heads.shape[2])
        for which in "qkv"
    }

    np.testing.assert_array_equal(found["q"], heads[[0, 1, 4, 5]])
    np.testing.assert_array_equal(found["k"], heads[[2, 6]])
    np.testing.assert_array_equal(found["v"], heads[[3, 7]])
