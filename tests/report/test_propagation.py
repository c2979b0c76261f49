from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.report import helpers, replays

from driftscope.report.propagation import propagation_section

PAIRS = ("candidate.f32|candidate.int8-dot", "teacher.f32|candidate.f32")


@pytest.fixture
def frame() -> pl.DataFrame:
    return replays.propagation_table(3, np.random.Generator(np.random.Philox(5)), PAIRS)


def section(frame: pl.DataFrame | None) -> dict[str, Any]:
    return propagation_section(frame)


def test_absent_is_not_run(frame: pl.DataFrame) -> None:
    assert section(None)["status"] == "not-run"
    assert section(frame.clear())["status"] == "not-run"


def test_steps_are_in_order_and_pooled_over_prompts(frame: pl.DataFrame) -> None:
    found = section(frame)["pairs"]
    assert [pair["pair"] for pair in found] == [PAIRS[1], PAIRS[0]]
    pair = found[0]
    assert [(step["layer"], step["tap"]) for step in pair["steps"]] == [
        (-1, "embedding"),
        *((layer, "post_ffn_residual") for layer in range(3)),
        (-1, "lm_head"),
    ]
    assert (pair["prompts"], pair["tokens"]) == (2, sum(helpers.PROMPTS.values()) - 2)
    rows = frame.filter(pl.col("pair") == PAIRS[1], pl.col("scope") == "all-but-first", pl.col("layer") == 1)
    step = pair["steps"][2]
    assert step["injected"] == pytest.approx(rows["injected"].sum() / rows["signal_energy"].sum(), rel=1e-14)
    assert step["gain"] == pytest.approx(rows["inherited"].sum() / rows["energy_in"].sum(), rel=1e-14)


def test_parts_add_up_to_the_error_behind_each_step(frame: pl.DataFrame) -> None:
    for pair in section(frame)["pairs"]:
        for step in pair["steps"]:
            parts = step["injected"] + step["inherited"] + step["cross"] + step["remainder"]
            assert parts == pytest.approx(step["energy_out"], rel=1e-12)
        assert 0 < pair["unexplained"] < 1e-9


def test_the_first_token_stands_apart(frame: pl.DataFrame) -> None:
    pair = section(frame)["pairs"][0]
    first = frame.filter(
        pl.col("pair") == PAIRS[1], pl.col("scope") == "token", pl.col("position") == 0, pl.col("layer") == 2
    )
    step = next(step for step in pair["first_token"] if step["layer"] == 2)
    assert step["inherited"] == pytest.approx(first["inherited"].sum() / first["signal_energy"].sum())
    assert pair["scope"] == "all-but-first"


def test_prompts_of_one_token_are_taken_whole(frame: pl.DataFrame) -> None:
    pair = section(frame.filter(pl.col("scope") != "all-but-first"))["pairs"][0]
    assert pair["scope"] == "all"
    assert pair["tokens"] == sum(helpers.PROMPTS.values())


def test_what_comes_from_nothing_has_no_gain(frame: pl.DataFrame) -> None:
    pair = section(frame)["pairs"][0]
    assert pair["steps"][0]["gain"] is None
    silent = frame.with_columns(
        pl.lit(0.0).alias(name) for name in ("injected", "inherited", "energy_in", "energy_out")
    )
    quiet = section(silent)["pairs"][0]
    assert quiet["unexplained"] == 0.0
    assert quiet["largest_gain"] is None
