"""Token scope: the ratio, its cause, its refusal, and what breaks the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, measured, verdict

from driftscope.analysis.statistic import Statistic
from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers.sampling import Resampling, generator
from driftscope.falsifiers.token_scope import inputs, one_pass, scope_metrics, trace_of

RESAMPLING = Resampling(200, 0.95)
TAPS = ("ffn_swiglu", "ffn_out", "post_ffn_residual")


class Traces:
    """Evidence in memory."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame

    def has(self, name: str) -> bool:
        return name == "trace/teacher.f32.parquet"

    def table(self, name: str, schema: str) -> pl.DataFrame:
        assert schema == "trace"
        return self.frame


def _pass(prompt: str, tokens: int, gain: float, *, path: str = "teacher.f32") -> pl.DataFrame:
    frames = []
    for index, tap in enumerate(TAPS):
        values = generator(len(prompt), tokens, index).standard_normal((6, tokens, 64))
        values[2:, 0, 17] += gain * np.array([0.1, 1.0, 0.1, 0.1])
        frames.append(trace_of(values, prompt, tap))
    return pl.concat(frames).with_columns(path=pl.lit(path), artifact=pl.lit("teacher"))


def _model(gain: float, **other: Any) -> Traces:
    return Traces(pl.concat([_pass("two", 7, gain, **other), _pass("chat", 30, gain, **other)]))


def _verdict(evidence: Traces) -> dict[str, Any]:
    return verdict("token-scope", "token-scope", measured("token-scope", "token-scope", evidence))


def test_the_ratio_is_that_of_the_two_stds() -> None:
    values = generator(1).standard_normal((4, 5, 32))
    values[:, 0] *= 10.0
    metrics = scope_metrics(trace_of(values, "p", "t"), "t", RESAMPLING)
    for layer in metrics["layers"]:
        tensor = values[layer["layer"]]
        assert layer["all_over_last"] == pytest.approx(tensor.std(ddof=1) / tensor[-1].std(ddof=1))
        assert layer["without_first"] == pytest.approx(tensor[1:].std(ddof=1) / tensor[-1].std(ddof=1))
    ratios = [layer["all_over_last"] for layer in metrics["layers"]]
    assert metrics["largest"]["value"] == pytest.approx(max(max(r, 1 / r) for r in ratios))
    assert metrics["largest"]["low"] <= metrics["largest"]["value"] <= metrics["largest"]["high"]


def test_the_token_and_channel_that_cause_it_are_named_with_their_share() -> None:
    values = generator(2).standard_normal((5, 6, 40))
    values[2, 1, 33] = -500.0
    cause = scope_metrics(trace_of(values, "p", "t"), "t", RESAMPLING)["cause"]
    assert (cause["layer"], cause["position"], cause["channel"], cause["value"]) == (2, 1, 33, -500.0)
    share = np.square(values[2, 1]).sum() / np.square(values[2]).sum()
    assert cause["energy_share"] == pytest.approx(share)


def test_a_massive_first_token_supports_and_like_tokens_falsify() -> None:
    supported = _verdict(_model(1000.0))
    assert supported["verdict"] == "supported"
    assert "token 0, channel 17 of layer 3" in supported["found"]
    assert "18.23" in supported["found"]
    assert _verdict(_model(0.0))["verdict"] == "falsified"


def test_one_regime_with_and_one_without_is_regime_dependent() -> None:
    mixed = Traces(pl.concat([_pass("two", 7, 1000.0), _pass("chat", 30, 0.0)]))
    assert _verdict(mixed)["verdict"] == "regime-dependent"


def test_a_ratio_across_scopes_that_is_not_refused_changes_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Statistic, "why_not", lambda self, other: None)
    assert _verdict(_model(1000.0))["verdict"] == "falsified"


def test_statistics_over_one_token_only_change_the_verdict() -> None:
    """Were the pooled std taken over the last token by mistake, nothing would part."""
    frame = _model(1000.0).frame
    last = frame.filter(pl.col("scope") == "last").select("prompt", "layer", "tap", last_std="std")
    broken = frame.join(last, on=["prompt", "layer", "tap"], how="left", maintain_order="left")
    broken = broken.with_columns(
        std=pl.when(pl.col("scope") == "all").then(pl.col("last_std")).otherwise(pl.col("std"))
    ).drop("last_std")
    assert _verdict(Traces(broken))["verdict"] == "falsified"


def test_two_paths_in_one_trace_are_inadmissible() -> None:
    two = pl.concat([_pass("two", 7, 1000.0), _pass("chat", 30, 1000.0, path="candidate.f32")])
    document = _verdict(Traces(two))
    assert document["verdict"] == "inadmissible"
    assert "more than one path" in document["found"]


def test_prompts_of_one_length_only_are_inconclusive() -> None:
    document = _verdict(Traces(_pass("two", 7, 1000.0)))
    assert document["verdict"] == "inconclusive"
    assert "regime long was not measured" in document["found"]


def test_layers_with_an_undefined_or_zero_std_are_left_out_and_listed() -> None:
    values = generator(3).standard_normal((4, 5, 8))
    values[1, -1] = 0.0
    frame = trace_of(values, "p", "t")
    frame = frame.with_columns(std=pl.when(pl.col("layer") == 2).then(None).otherwise(pl.col("std")))
    metrics = scope_metrics(frame, "t", RESAMPLING)
    assert metrics["layers_left_out"] == [1, 2]
    assert [layer["layer"] for layer in metrics["layers"]] == [0, 3]
    assert scope_metrics(frame.filter(pl.col("layer") == 1), "t", RESAMPLING) == {}


def _cause_verdict(evidence: Traces) -> dict[str, Any]:
    return verdict(
        "token-scope", "massive-activation", measured("token-scope", "massive-activation", evidence)
    )


def test_the_first_token_s_massive_activation_is_named_as_the_cause() -> None:
    document = _cause_verdict(_model(1000.0))
    assert document["verdict"] == "supported"
    assert "channel 17 of the first token" in document["found"]
    # With no massive activation the channel that happens to be largest carries next to nothing.
    assert _cause_verdict(_model(0.0))["verdict"] == "falsified"


def test_a_massive_activation_of_another_token_changes_the_verdict() -> None:
    frames = []
    for prompt, tokens in (("two", 7), ("chat", 30)):
        values = generator(tokens).standard_normal((6, tokens, 64))
        values[3, 2, 17] = 1000.0
        frames.append(trace_of(values, prompt, "ffn_swiglu"))
    evidence = Traces(pl.concat(frames).with_columns(path=pl.lit("teacher.f32"), artifact=pl.lit("teacher")))
    assert _cause_verdict(evidence)["verdict"] == "falsified"


def test_one_pass_is_shown_layer_by_layer_with_causes_and_stages() -> None:
    values = generator(4).standard_normal((4, 5, 32))
    values[2, 0, 9] = 300.0
    frame = pl.concat([trace_of(values, "p", "ffn_swiglu"), trace_of(2.0 * values, "p", "ffn_out")])
    shown = one_pass(frame, "ffn_swiglu", "p")
    assert (shown["prompt"], shown["tokens"]) == ("p", 5)
    for row in shown["layers"]:
        tensor = values[row["layer"]]
        assert row["all"] == pytest.approx(tensor.std(ddof=1))
        assert row["last"] == pytest.approx(tensor[-1].std(ddof=1))
        assert row["all_over_last"] == pytest.approx(row["all"] / row["last"])
    largest = shown["largest"]
    assert largest["layer"] == 2
    assert (largest["cause"]["position"], largest["cause"]["channel"]) == (0, 9)
    assert largest["cause"]["value_share"] == pytest.approx(300.0**2 / np.square(values[2]).sum())
    assert [stage["stage"] for stage in shown["stages"]] == ["ffn_swiglu", "ffn_out"]
    for stage in shown["stages"]:
        assert stage["over"] == pytest.approx(values[2].std(ddof=1) / values[1].std(ddof=1))
    assert one_pass(frame, "ffn_swiglu", "another")["prompt"] == "p"
    assert one_pass(frame.clear(), "ffn_swiglu", "p") == {"prompt": "", "layers": []}


def test_the_published_quotient_is_the_scope_times_the_sides() -> None:
    figures = measured("token-scope", "token-scope", _model(0.0))["published"]
    product = figures["same_side_quotient"] * figures["like_for_like"]
    assert product == pytest.approx(figures["crossed"]["quotient"])
    assert figures["same_side_refused"] is True
    assert figures["like_for_like_before"] == 1.245
    quotients = {item["layer"]: item["scope_quotient"] for item in figures["by_layer"]}
    assert quotients[3] == pytest.approx(1.2216 / 0.080802)
    assert max(quotients, key=lambda layer: quotients[layer]) == 3
    over = {item["stage"]: item["over"] for item in figures["stages"]}
    # The published layer 3 stands out from the product of gate and up on, 17 and 53 times.
    assert f"{over['ffn_swiglu']:.1f}" == "17.2"
    assert f"{over['ffn_out']:.0f}" == "53"
    assert over["ffn_gate"] < 1.0


def test_no_trace_is_not_run() -> None:
    document = verdict("token-scope", "token-scope", measured("token-scope", "token-scope", NOWHERE))
    assert document["verdict"] == "not-run"
    assert "trace/teacher.f32.parquet is not there" in document["found"]


def test_the_published_ratio_is_refused_and_the_like_for_like_one_is_given() -> None:
    figures = measured("token-scope", "token-scope", _model(0.0))["published"]
    assert f"{figures['crossed']['quotient']:.2f}" == "18.23"
    assert figures["crossed"]["refused"] is True
    assert "132608 against 18944" in figures["crossed"]["reason"]
    assert f"{figures['like_for_like']:.4f}" == "1.2059"
    assert [item["layer"] for item in figures["by_layer"]] == [0, 1, 2, 3, 27]
    assert all(0.5 <= item["ratio"] <= 2.0 for item in figures["by_layer"])


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.pop("published"),
        lambda p: p["published"].pop("layer"),
        lambda p: p["published"]["last_token_b"].pop("27"),
        lambda p: p["published"].update(all_tokens_a={"3": "high"}),
        lambda p: p["published"].pop("like_for_like_before"),
        lambda p: p["published"]["stages_a"].pop("2"),
        lambda p: p.update(resamples=3),
        lambda p: p.pop("prompt"),
        lambda p: p.pop("tap"),
    ],
)
def test_a_malformed_parameter_is_one_input_error(edit: Callable[[dict[str, Any]], Any]) -> None:
    from driftscope.falsifiers.token_scope import measure

    asked = load_contract(CONTRACTS / "token-scope.yaml").falsifier("token-scope").measurement
    parameters = json.loads(json.dumps(asked.parameters))
    edit(parameters)
    with pytest.raises(InputError, match="measurement parameter"):
        measure(parameters, asked.regimes, asked.seeds, _model(0.0))


def test_the_measurement_says_what_it_reads(tmp_path: Path) -> None:
    assert inputs({"path": "candidate.int8-dot"}) == ["trace/candidate.int8-dot.parquet"]


def test_the_same_evidence_gives_the_same_bytes() -> None:
    first, second = (
        json.dumps(measured("token-scope", "token-scope", _model(100.0)), allow_nan=False) for _ in range(2)
    )
    assert first == second
