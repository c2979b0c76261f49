from __future__ import annotations

from typing import Any

import pytest

from driftscope.analysis.admissibility import TraceMetadata, admissibility

IDS = {"p": "a" * 64}


def rows(scope: str = "all", **changes: Any) -> list[dict[str, Any]]:
    row = {
        "prompt": "p",
        "layer": 3,
        "tap": "ffn_swiglu",
        "scope": scope,
        "position": -1,
        "token_count": 7,
        "count": 7 * 18944,
        "capture_point": "silu(gate) * up",
    }
    return [{**row, **changes}]


def statuses(*traces: TraceMetadata) -> dict[str, str]:
    found = admissibility(traces)
    assert found["admissible"] == (found["status"] == "admissible")
    assert found["admissible"] == all(check["status"] == "holds" for check in found["checks"])
    return {check["id"]: check["status"] for check in found["checks"]}


TEACHER = TraceMetadata.of_rows("teacher.f32", IDS, rows())


def test_like_traces_are_admissible() -> None:
    assert set(statuses(TEACHER, TraceMetadata.of_rows("candidate.f32", IDS, rows())).values()) == {"holds"}


@pytest.mark.parametrize(
    ("other", "failing"),
    [
        (TraceMetadata.of_rows("b", {"p": "b" * 64}, rows()), {"same-token-ids"}),
        (TraceMetadata.of_rows("b", {"q": "a" * 64}, rows()), {"same-token-ids"}),
        (TraceMetadata.of_rows("b", IDS, rows("last")), {"same-scopes"}),
        (TraceMetadata.of_rows("b", IDS, rows(token_count=1, count=18944)), {"same-count"}),
        (TraceMetadata.of_rows("b", IDS, rows(capture_point="silu(gate)")), {"same-capture-point"}),
        (TraceMetadata.of_rows("b", IDS, rows(), [("p", 4, "ffn_swiglu", "all", -1)]), {"coverage"}),
        (TraceMetadata.of_rows("b", IDS, rows(count=0)), {"same-count", "not-empty"}),
        (TraceMetadata.of_rows("b", {}, []), {"same-token-ids", "same-scopes", "not-empty"}),
    ],
)
def test_each_difference_fails_its_own_check(other: TraceMetadata, failing: set[str]) -> None:
    found = statuses(TEACHER, other)
    assert {name for name, status in found.items() if status == "fails"} == failing
    assert statuses(other, TEACHER) == found


@pytest.mark.parametrize("traces", [(), (TEACHER,)])
def test_nothing_to_compare_is_not_admissible(traces: tuple[TraceMetadata, ...]) -> None:
    assert statuses(*traces)["two-traces"] == "fails"


def test_the_first_fault_is_told_and_the_rest_are_counted() -> None:
    other = TraceMetadata.of_rows("b", IDS, rows(count=7) + rows("last", count=8))
    teacher = TraceMetadata.of_rows("a", IDS, rows() + rows("last"))
    found = {check["id"]: check["found"] for check in admissibility([teacher, other])["checks"]}
    assert found["same-count"] == ("layers.3.ffn_swiglu (p, all): (7, 132608) in a, (7, 7) in b (and 1 more)")
