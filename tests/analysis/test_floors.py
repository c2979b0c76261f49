from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from tests.analysis.synthetic_rows import row

from driftscope.analysis.floors import (
    DEFAULTS,
    MIN_RUNS,
    OP_KINDS,
    Cell,
    Floors,
    arithmetic_class,
    expected_maximum,
    kind_of,
    size_of,
)
from driftscope.errors import InputError
from driftscope.forward.architecture import embedding_op, head_ops, layer_ops
from driftscope.forward.arithmetic import Arithmetic

F32, INT8 = Arithmetic.of("f32"), Arithmetic.of("int8-dot")


def random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def fitted(scores: list[float], sizes: list[int] | None = None, **options: object) -> Cell:
    maximum = sizes is not None
    runs = [f"run {i}" for i in range(len(scores))]
    defaults: dict[str, object] = {"prior_spread": 1.0, "prior_runs": 0.0, "maximum": maximum}
    return Cell.fit(scores, sizes or [1] * len(scores), runs, **(defaults | options))  # type: ignore[arg-type]


def test_every_op_of_the_architecture_has_a_kind() -> None:
    from tests.analysis.tiny_configs import llama

    config = dataclasses.replace(llama(), post_norms=True)
    ops = (embedding_op(config), *layer_ops(config), *head_ops(config))
    assert tuple(op.tap for op in ops) == tuple(OP_KINDS)


def test_kinds_tell_arithmetic_apart_only_where_it_matters() -> None:
    assert kind_of(row(tap="ffn_out"), INT8) == "matmul int8-dot"
    assert kind_of(row(tap="ffn_out"), F32) == "matmul f32"
    assert kind_of(row(tap="ffn_norm"), INT8) == "norm f32"
    assert kind_of(row(tap="ffn_out", recomputed="ffn_swiglu"), INT8) == "matmul int8-dot recomputed"
    assert kind_of(row(tap="ffn_out", component="model"), INT8) == "matmul"
    assert kind_of(row(tap="ffn_silu", component="model", recomputed="ffn_gate"), None) == "derived"
    assert kind_of(row(tap="ffn_out"), None) == "matmul unknown"
    assert kind_of(row(tap="attention"), Arithmetic.of("f32", kv_type="f16")) == "attention kv-f16"
    assert kind_of(row(tap="ffn_silu"), Arithmetic.of("f32", dtype="bf16")) == "silu narrow"
    assert arithmetic_class(Arithmetic.of("f32", activation="q8_0"), 0, "ffn_up") == "int8-dot"
    with pytest.raises(InputError, match="tap 'ffn_gelu' is unknown"):
        kind_of(row(tap="ffn_gelu"), None)


def test_sizes_count_what_the_maximum_is_over() -> None:
    assert size_of(row(token_count=16, count=16 * 64), "score_token") == 16
    assert size_of(row(token_count=16, count=16 * 64), "score_channel") == 64
    assert size_of(row(token_count=16, count=16 * 16 * 6, tap="attn_scores"), "score_channel") == 6
    assert size_of(row(), "score") == 1


@pytest.mark.parametrize("size", [2, 5, 64, 4096, 150_000])
def test_expected_maximum_is_that_of_normals(size: int) -> None:
    norm = scipy.stats.norm
    exact, _ = scipy.integrate.quad(
        lambda x: x * size * norm.pdf(x) * norm.cdf(x) ** (size - 1), -8, 9, limit=400, points=[0, 3, 5]
    )
    assert expected_maximum(size) == pytest.approx(exact, abs=0.03)
    assert expected_maximum(1) == 0.0


def test_without_a_prior_the_tail_is_the_prediction_interval_of_a_t() -> None:
    scores = random().normal(1.3, 0.2, size=24)
    cell = fitted(list(scores))
    scale = scores.std(ddof=1) * np.sqrt(1 + 1 / 24)
    for score in (1.0, 1.5, 2.5, 4.0):
        # The location's own prior has the weight of a hundredth of a run.
        expected = scipy.stats.t.sf(score, df=23, loc=scores.mean(), scale=scale)
        assert cell.tail(score) == pytest.approx(expected, rel=1e-3)
    assert cell.threshold(1e-6) == pytest.approx(scipy.stats.t.isf(1e-6, 23, scores.mean(), scale), rel=1e-4)
    assert cell.tail(cell.threshold(1e-9)) == pytest.approx(1e-9)


def test_few_runs_make_a_wider_tail_than_many() -> None:
    values = random(1).normal(size=1000)
    few, many = fitted(list(values[:8])), fitted(list(values))
    assert few.threshold(1e-6) > 2 * many.threshold(1e-6)
    assert many.threshold(1e-3) == pytest.approx(scipy.stats.norm.isf(1e-3), abs=0.25)


def test_rows_of_one_run_count_once() -> None:
    values = random(2).normal(size=10)
    once = fitted(list(values))
    repeated = Cell.fit(
        list(np.repeat(values, 50)),
        [1] * 500,
        [f"run {i // 50}" for i in range(500)],
        prior_spread=1.0,
        prior_runs=0.0,
        maximum=False,
    )
    assert (repeated.count, repeated.runs) == (500, 10)
    assert repeated.degrees == once.degrees
    assert repeated.tail(3.0) == pytest.approx(once.tail(3.0))


def test_maxima_of_other_sizes_are_predicted() -> None:
    """Maxima of up to 256 normals predict those of 16384: no more false alarms, and not far fewer."""
    draw = random(3)
    sizes = [int(s) for s in np.repeat([4, 16, 64, 256], 30)]
    cell = fitted([float(draw.normal(0, 0.2, size=s).max()) for s in sizes], sizes)
    assert cell.slope == pytest.approx(0.2, abs=0.03)
    tails = np.array([cell.tail(float(draw.normal(0, 0.2, size=16384).max()), 16384) for _ in range(400)])
    assert 0.2 < (tails < 0.5).mean() < 0.8
    assert (tails < 0.01).mean() <= 0.03


@pytest.mark.parametrize("seed", range(4))
def test_p_values_of_held_out_scores_are_uniform(seed: int) -> None:
    draw = random(seed)
    cell = fitted(list(draw.normal(0.4, 0.3, size=200)))
    tails = [cell.tail(float(score)) for score in draw.normal(0.4, 0.3, size=400)]
    assert scipy.stats.kstest(tails, "uniform").pvalue > 0.005


def _clean(runs: int, **changes: object) -> list[tuple[str, dict[str, object], Arithmetic | None]]:
    draw = random(7)
    return [
        (f"run {i}", row(score=float(draw.normal(0.5, 0.2)), **changes), F32)
        for i in range(runs)
        for _ in range(5)
    ]


def test_floors_fit_by_kind_and_fall_back_to_theory() -> None:
    floors = Floors.fit(_clean(20) + _clean(MIN_RUNS - 1, tap="ffn_norm"))
    assert ("matmul f32", "engine", "score") in floors.cells
    assert not any(kind.startswith("norm") for kind, _, _ in floors.cells)
    assert floors.tail_probabilities(row(score=0.5), F32)["score"] == pytest.approx(0.5, abs=0.1)
    assert floors.tail_probabilities(row(score=3.0), F32)["score"] < 1e-6
    of_all_ops = floors.cells["any f32", "engine", "score"].tail(3.0)
    assert floors.tail_probabilities(row(tap="ffn_norm", score=3.0), F32)["score"] == of_all_ops
    prior = DEFAULTS["engine"]
    expected = scipy.stats.t.sf(3.0, prior.degrees, prior.location, prior.spread)
    assert floors.tail_probabilities(row(score=3.0), INT8)["score"] == pytest.approx(expected)


def test_channels_of_recomputed_inputs_and_narrow_outputs_are_not_judged() -> None:
    found = Floors({}).tail_probabilities(row(recomputed="ffn_silu", score_channel=30.0), F32)
    assert list(found) == ["score", "score_token"]
    found = Floors({}).tail_probabilities(row(score_channel=30.0), Arithmetic.of("f32", dtype="bf16"))
    assert list(found) == ["score", "score_token"]


def test_an_unknown_arithmetic_is_judged_by_what_allows_most() -> None:
    wide = [(run, row(score=r["score"] + 4.0), INT8) for run, r, _ in _clean(20)]  # type: ignore[operator]
    floors = Floors.fit([*_clean(20), *wide])
    score = row(score=4.0)
    assert floors.tail_probability(score, F32) < 1e-6
    assert floors.tail_probabilities(score, None) == floors.tail_probabilities(score, INT8)


def test_nothing_measured_is_no_reason_to_doubt_but_an_error_where_none_can_be_is() -> None:
    floors = Floors({})
    unscored = {"score": None, "score_token": None, "score_channel": None}
    same = row(component="model", energy=0.0, predicted_energy=0.0, **unscored)
    other = row(component="model", energy=1e-6, predicted_energy=0.0, **unscored)
    rounding = row(component="model", energy=1e-24, predicted_energy=0.0, **unscored)
    assert floors.tail_probability(same) == 1.0
    assert floors.tail_probability(rounding) == 1.0
    assert floors.tail_probability(other) == 0.0
    assert floors.tail_probability(row(component="arithmetic", score=99.0)) == 1.0


def test_document_round_trip() -> None:
    floors = Floors.fit(_clean(20), {"runs": 20})
    document = json.loads(json.dumps(floors.to_dict()))
    assert Floors.from_dict(document) == floors
    document["cells"][0]["spread"] = -1
    with pytest.raises(InputError, match="a cell is malformed"):
        Floors.from_dict(document)
    with pytest.raises(InputError, match="expected 'driftscope-floors'"):
        Floors.from_dict({})
