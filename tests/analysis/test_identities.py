from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.analysis.recorded import model, recorded, rewritten

from driftscope.analysis.identities import check_identities, identities
from driftscope.forward.arithmetic import Arithmetic


def broken(checks: list[dict[str, object]]) -> set[tuple[object, object]]:
    return {(check["layer"], check["tap"]) for check in checks if not check["holds"]}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    ("fmt", "arithmetic"),
    [
        ("F32", Arithmetic.of("f32")),
        ("Q4_K", Arithmetic.of("int8-dot", kv_type="f16")),
        ("BF16", Arithmetic.of("f32", dtype="bf16")),
        ("F16", Arithmetic.of("f32", dtype="f16")),
    ],
)
def test_identities_hold_in_a_sound_trace(
    tmp_path: Path, architecture: str, fmt: str, arithmetic: Arithmetic
) -> None:
    trace = recorded(model(tmp_path, architecture, fmt), tmp_path / "trace", arithmetic=arithmetic)
    checks = check_identities(trace)
    assert len(checks) == 2 * 7
    assert broken(checks) == set()
    assert identities(trace) == []


def test_the_product_is_checked_without_its_first_step(tmp_path: Path) -> None:
    trace = recorded(model(tmp_path), tmp_path / "trace", wanted=lambda _, tap: tap != "ffn_silu")
    checks = [check for check in check_identities(trace, [1]) if check["tap"] == "ffn_swiglu"]
    assert [(check["identity"], check["holds"]) for check in checks] == [
        ("ffn_swiglu = silu(ffn_gate) * ffn_up", True)
    ]


def test_an_output_recorded_after_the_residual_breaks_the_sum(tmp_path: Path) -> None:
    artifact = model(tmp_path)
    trace = recorded(artifact, tmp_path / "sound")
    values = {(1, "attn_out"): trace.tap(1, "post_attn_residual")}
    checks = check_identities(rewritten(trace, artifact, tmp_path / "elsewhere", values))
    assert broken(checks) == {(1, "post_attn_residual")}
    (check,) = [check for check in checks if not check["holds"]]
    assert "post_attn_residual equals attn_out" in str(check["reading"])


def test_scores_before_the_scale_and_a_wrong_softmax_are_seen(tmp_path: Path) -> None:
    artifact = model(tmp_path)
    trace = recorded(artifact, tmp_path / "sound")
    scores = [part * np.float32(artifact.config.head_dim**0.5) for part in trace.ragged(0, "attn_scores")]
    weights = [part * np.float32(1.01) for part in trace.ragged(1, "attn_softmax")]
    values = {(0, "attn_scores"): scores, (1, "attn_softmax"): weights}
    checks = check_identities(rewritten(trace, artifact, tmp_path / "elsewhere", values))
    assert broken(checks) == {(0, "attn_softmax"), (1, "attn_softmax"), (1, "attention")}
    sums = [check["identity"] for check in checks if not check["holds"] and check["layer"] == 1]
    assert "attn_softmax: rows sum to 1" in sums
