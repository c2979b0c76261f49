"""Faults from end to end: put in, traced, replayed, named. A few of each family; the benchmark has all."""

from __future__ import annotations

import numpy as np
import pytest

from driftscope.analysis.floors import Floors
from driftscope.faultbench.clean import Clean, clean_pairs
from driftscope.faultbench.controls import Controls
from driftscope.faultbench.edited import without_tensors
from driftscope.faultbench.examine import kl_nats
from driftscope.faultbench.inventory import look
from driftscope.faultbench.run import Runner, Unit
from driftscope.faultbench.subjects import Subject, Workbench
from driftscope.faultbench.tasks import Task, run

F32, Q8_0 = Subject("qwen2"), Subject("qwen2", "Q8_0", "int8-dot")
SQUARE = Subject("qwen2-square")
RIGHT = {"detected": True, "layer_right": True, "op_right": True, "class_right": True}


@pytest.mark.parametrize(
    ("subject", "regime", "name"),
    [
        (F32, "short", "F01/rows-of-q-and-k"),
        (Q8_0, "short", "F04/mlp-norm-plus-one"),
        (F32, "short", "F34/nan"),
        (Q8_0, "short", "F35/scale-bit-high"),
        (F32, "short", "F16/theta-times-ten"),
        (F32, "short", "F03/interleaved-everywhere"),
        (Q8_0, "short", "F32/added-twice"),
        (SQUARE, "rows", "F27/two-or-three-rows"),
        (SQUARE, "long", "F15/bf16-positions"),
        (F32, "short", "F20/qkv-before-bias"),
    ],
)
def test_faults_are_found(bench: Workbench, subject: Subject, regime: str, name: str) -> None:
    for row in Runner(bench, Floors({})).run(Unit(subject, regime, name)):
        assert row["effect"]["above_floor"], row["id"]
        assert {key: row[key] for key in RIGHT} == RIGHT, row


def test_no_effect_is_said_to_be_none(bench: Workbench) -> None:
    (row,) = Runner(bench, Floors({})).run(Unit(SQUARE, "short", "F15/bf16-positions"))

    assert not row["effect"]["above_floor"]
    assert not row["detected"]
    assert row["effect"]["kl"] == 0.0


def test_what_cannot_be_injected_says_why(bench: Workbench) -> None:
    (row,) = Runner(bench, Floors({})).run(Unit(F32, "short", "F06/head-of-its-own"))

    assert (row["status"], row["reason"]) == ("not-applicable", "the head is not tied")


def test_lost_tensors_are_named(bench: Workbench) -> None:
    rows = run([Task("inventory", F32)], bench, Floors({}))["faults"]

    assert len(rows) == 3
    assert all({key: row[key] for key in RIGHT} == RIGHT for row in rows)
    renamed = next(row for row in rows if row["injection"] == "all-renamed")
    assert renamed["found"]["statement"].startswith("0 of 51 tensors can be compared")


def test_a_whole_model_loses_nothing(bench: Workbench) -> None:
    site = bench.site(F32)
    found = look(site, without_tensors(site.artifact, set()))

    assert (found["missing"], found["compared"], found["refused"]) == ([], 51, None)


def test_kl_is_in_nats_and_leaves_out_what_is_undefined() -> None:
    clean = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=np.float32))
    faulty = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]], dtype=np.float32))
    faulty[1, 0] = np.nan
    expected = 0.5 * np.log(2.0) - 0.25 * np.log(2.0)

    assert kl_nats(clean, faulty) == (pytest.approx(expected, abs=1e-6), 1)


def test_clean_pairs_raise_no_alarm(bench: Workbench) -> None:
    pairs = [pair for pair in clean_pairs(default=False) if pair.source == "driftscope-other-habits"]
    clean = Clean(bench, Floors({}))

    for pair in pairs[::11]:
        row = clean.run(pair)
        assert not row["alarm"], row
        assert row["tested"] > 40


@pytest.mark.parametrize("name", ["C2", "C5", "C7"])
def test_controls_raise_no_alarm(bench: Workbench, name: str) -> None:
    rows = Controls(bench, Floors({})).run(name)

    assert rows
    assert not [row["id"] for row in rows if row["alarm"]]


def test_controls_are_what_they_say(bench: Workbench) -> None:
    controls = Controls(bench, Floors({}))

    assert all(row["figures"]["std_over_neighbour"] > 17 for row in controls.run("C2"))
    assert all(row["figures"]["error_of_first_token_over_others"] > 100 for row in controls.run("C7"))
    assert all(row["figures"]["status"] == "inadmissible" for row in controls.run("C5"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["C3", "C4", "C6"])
def test_slow_controls_raise_no_alarm(bench: Workbench, name: str) -> None:
    rows = Controls(bench, Floors({})).run(name)

    assert not [row for row in rows if row["alarm"]]
    for row in rows:
        if name == "C3":
            assert 0 < row["figures"]["flips"] == row["figures"]["flips_within_noise"]
        if name == "C4":
            assert row["found"] is not None
            assert row["figures"]["tensors_different"] == row["figures"]["tensors"]
