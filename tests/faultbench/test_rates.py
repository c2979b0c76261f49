"""The report's arithmetic on rows made by hand; intervals against scipy."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import binomtest

from driftscope.errors import InputError
from driftscope.faultbench.page import page
from driftscope.faultbench.rates import by_fault, rate, rates, targets
from driftscope.faultbench.report import build, check


def row(fault: str = "F01", name: str = "a", right: str = "dloc", **changes: Any) -> dict[str, Any]:
    """A row of a run fault; `right` names what was right: detected, layer, op, class."""
    above = changes.pop("above_floor", True)
    return {
        "id": f"{fault}/{name}",
        "fault": fault,
        "injection": name,
        "says": "something wrong",
        "mechanism": "engine",
        "judged": "engine",
        "source": "driftscope",
        "model": "qwen2",
        "format": "F32",
        "path": "f32",
        "regime": "short",
        "status": "run",
        "reason": "",
        "expected": {"layer": 1, "tap": "ffn_up", "part": "", "class": "transposed", "also": []},
        "effect": {
            "kl": changes.pop("kl", 0.25),
            "kl_undefined": 0,
            "kl_rounding": None,
            "over_predicted": 1e9,
            "unpredicted": False,
            "above_floor": above,
        },
        "detected": "d" in right,
        "layer_right": "l" in right,
        "op_right": "o" in right,
        "class_right": "c" in right,
        "found": None,
        "flags": 0,
        "capture_points": [],
        **changes,
    }


def sound(name: str, *, alarm: bool = False, control: str = "C1") -> dict[str, Any]:
    """A row of a clean pair or a control."""
    return {
        "id": name,
        "control": control,
        "source": "driftscope",
        "model": "qwen2",
        "format": "F32",
        "path": "f32",
        "regime": "short",
        "status": "run",
        "reason": "",
        "alarm": alarm,
        "found": None,
        "capture_points": [],
        "figures": {},
    }


@pytest.mark.parametrize(("hits", "trials"), [(0, 40), (3, 7), (19, 20), (20, 20), (1, 1)])
def test_intervals_are_scipy_s(hits: int, trials: int) -> None:
    found = rate(hits, trials)
    expected = binomtest(hits, trials).proportion_ci(0.95, method="exact")

    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-3)
    assert found["rate"] == pytest.approx(hits / trials, rel=1e-3)


def test_nothing_has_no_rate() -> None:
    assert rate(0, 0) == {"count": 0, "of": 0, "rate": None, "low": None, "high": None}


def test_shares_are_of_what_has_an_effect() -> None:
    listed = [
        row(),
        row(name="b", right="dl"),
        row(name="c", right=""),
        row(name="d", right="d", above_floor=False),
        {"status": "not-applicable", "fault": "F01"},
    ]
    found = rates(listed)

    assert (found["runs"], found["above_floor"], found["detected_below_floor"]) == (4, 3, 1)
    counts = {key: (found[key]["count"], found[key]["of"]) for key in ("detected", "op_right", "class_right")}
    assert counts == {"detected": (2, 3), "op_right": (1, 3), "class_right": (1, 3)}


def test_a_fault_is_complete_where_all_of_it_was_found() -> None:
    listed = [row(), row("F02", right="dlo"), row("F02", name="b", kl=0.5), row("F03", above_floor=False)]
    found = {item["fault"]: item for item in by_fault(listed, ["F01", "F02", "F03", "F04"])}

    assert [found[name]["complete"] for name in found] == [True, False, False, False]
    assert [found[name]["largest_kl"] for name in found] == [0.25, 0.5, 0.25, None]


def met(faults: list[dict[str, Any]], clean: list[dict[str, Any]]) -> dict[str, bool]:
    return {item["id"]: item["met"] for item in targets(faults, clean, [])}


def test_targets() -> None:
    pairs = [sound(f"p{index}") for index in range(50)]
    good = [row(name=str(index)) for index in range(19)]

    assert all(met([*good, row(name="x", right="dlo")], pairs).values())
    assert met([*good, row(name="x", right="d")], pairs)["op"]
    missed = met([*good[:18], row(name="x", right="d"), row(name="y", right="")], pairs)
    assert missed == {
        "detected": False,
        "op": False,
        "class": True,
        "false-alarms": True,
        "clean-pairs": True,
    }
    assert not met(good, [*pairs, sound("bad", alarm=True)])["false-alarms"]
    assert not met(good, pairs[:49])["clean-pairs"]


def test_nothing_run_meets_nothing() -> None:
    assert not any(met([], []).values())


def test_a_report_is_valid_and_names_each_miss() -> None:
    parts = [
        {"faults": [row(), row("F02", right="dl")], "clean": [sound("p")], "controls": []},
        {
            "faults": [
                row("F15", above_floor=False, right="", kl=0.0),
                {**row("F05"), "status": "not-applicable", "reason": "no biases"},
            ],
            "clean": [{"id": "q", "control": "C1", "status": "not-run", "reason": "not installed"}],
            "controls": [sound("c", alarm=True, control="C4")],
        },
    ]
    document = build(parts, alpha=0.001)
    check(document)

    assert document["misses"] == ["F02/a"]
    assert document["below_floor"] == ["F15/a"]
    assert document["alarms"] == ["c"]
    assert document["not_applicable"] == [{"id": "F05/a", "reason": "no biases"}]
    assert document["not_run"] == [{"id": "q", "reason": "not installed"}]
    text = page(document)
    for word in ("F02/a", "op right, class right", "no biases", "not installed", "alarm: c"):
        assert word in text


def test_the_order_of_parts_does_not_matter() -> None:
    parts = [
        {"faults": [row("F02")], "clean": [], "controls": []},
        {"faults": [row("F01")], "clean": [], "controls": []},
    ]

    assert build(parts, alpha=0.001) == build(parts[::-1], alpha=0.001)


def test_a_broken_report_is_refused() -> None:
    document = build([{"faults": [row()], "clean": [], "controls": []}], alpha=0.001)
    document["rows"][0]["detected"] = "yes"

    with pytest.raises(InputError, match=r"rows\[0\]\.detected"):
        check(document)
