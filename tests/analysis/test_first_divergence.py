from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.analysis.synthetic_rows import row

from driftscope.analysis.first_divergence import first_divergence, flags
from driftscope.analysis.floors import OP_KINDS, Floors
from driftscope.forward.architecture import op_order
from driftscope.forward.arithmetic import Arithmetic

F32 = Arithmetic.of("f32")


def clean_rows(
    seed: int, *, layers: int = 3, prompts: tuple[str, ...] = ("a", "b", "c")
) -> list[dict[str, Any]]:
    draw = np.random.Generator(np.random.Philox(seed))
    return [
        row(
            prompt=prompt,
            layer=layer,
            tap=tap,
            score=float(draw.normal(0.5, 0.2)),
            score_token=float(draw.normal(0.9, 0.2)),
            score_channel=float(draw.normal(1.1, 0.2)),
        )
        for layer in range(layers)
        for tap in OP_KINDS
        if tap not in ("embedding", "final_norm", "lm_head")
        for prompt in prompts
    ]


@pytest.fixture(scope="module")
def floors() -> Floors:
    return Floors.fit((f"run {seed}", found, F32) for seed in range(100, 130) for found in clean_rows(seed))


def replaced(rows: list[dict[str, Any]], where: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return [found | changes if all(found[k] == v for k, v in where.items()) else found for found in rows]


def test_the_family_wise_error_rate_holds(floors: Floors) -> None:
    """Of 60 clean traces at 5 % some three are flagged, and none at 0.1 %."""
    traces = [clean_rows(seed) for seed in range(60)]
    flagged = sum(bool(flags(rows, floors, 0.05, arithmetic=F32)) for rows in traces)
    assert flagged <= 8
    assert not any(flags(rows, floors, arithmetic=F32) for rows in traces)


def test_a_wrong_op_is_flagged_and_comes_first(floors: Floors) -> None:
    rows = replaced(clean_rows(0), {"layer": 1, "tap": "ffn_silu"}, score=9.0, nmse=1e-4)
    rows = replaced(rows, {"layer": 2, "tap": "attn_norm"}, score=20.0)
    found = flags(pl.DataFrame(rows), floors, arithmetic=F32)
    assert [flag.place for flag in found] == [(1, "ffn_silu", "")] * 3 + [(2, "attn_norm", "")] * 3
    first = first_divergence(found, rows)
    assert first is not None
    assert first.flag.place == (1, "ffn_silu", "")
    assert first.flag.statistic == "score"
    assert first.flag.p_value < 1e-3
    assert first.prompts == (("a", "b", "c"), ())
    assert (first.one_position, first.note) == (5, None)
    assert first_divergence([]) is None


def test_one_bad_token_is_enough(floors: Floors) -> None:
    rows = replaced(
        clean_rows(0), {"layer": 0, "tap": "ffn_up", "prompt": "b"}, score_token=8.0, worst_position=3
    )
    first = first_divergence(flags(rows, floors, arithmetic=F32), rows)
    assert first is not None
    assert (first.flag.statistic, first.one_position) == ("score_token", 3)
    assert first.prompts == (("b",), ("a", "c"))


def test_what_is_not_finite_is_flagged_without_a_score(floors: Floors) -> None:
    nothing = {"score": None, "score_token": None, "score_channel": None, "energy": 0.0}
    nothing |= {"worst_position": -1, "worst_channel": -1}
    rows = replaced(clean_rows(0), {"layer": 2, "tap": "ffn_out", "prompt": "c"}, non_finite=4, **nothing)
    found = flags(rows, floors, arithmetic=F32)
    assert [(flag.statistic, flag.prompt, flag.p_value) for flag in found] == [("non_finite", "c", 0.0)]
    assert found[0].position is None


def test_arithmetic_is_never_flagged(floors: Floors) -> None:
    rows = [found | {"component": "arithmetic", "score": 30.0} for found in clean_rows(0)]
    assert flags(rows, floors, arithmetic=F32) == []


@pytest.mark.parametrize(
    ("wrong", "counts", "note"),
    [
        ({"b"}, {"a": 1, "b": 3, "c": 8}, "row-count"),
        ({"a"}, {"a": 2, "b": 5, "c": 8}, "row-count"),
        ({"c"}, {"a": 2, "b": 5, "c": 800}, "long-prompts"),
        ({"a", "b"}, {"a": 2, "b": 8, "c": 8}, None),
        ({"a", "b", "c"}, {"a": 2, "b": 8, "c": 8}, None),
    ],
)
def test_token_counts_are_told(floors: Floors, wrong: set[str], counts: dict[str, int], note: str) -> None:
    rows = [found | {"token_count": counts[found["prompt"]]} for found in clean_rows(0)]
    for prompt in wrong:
        rows = replaced(rows, {"layer": 1, "tap": "ffn_gate", "prompt": prompt}, score=9.0)
    first = first_divergence(flags(rows, floors, arithmetic=F32), rows)
    assert first is not None
    assert first.note == note


def test_order_is_that_of_the_pass() -> None:
    places = [
        (-1, "embedding", ""),
        (0, "attn_norm", ""),
        (0, "qkv_matmul", "q"),
        (0, "qkv_matmul", "v"),
        (0, "post_ffn_residual", ""),
        (11, "attn_norm", ""),
        (-1, "final_norm", ""),
        (-1, "lm_head", ""),
    ]
    assert sorted(places, key=lambda place: op_order(*place)) == places
