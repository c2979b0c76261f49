"""An outlier in a block: the predicted loss of the others, and what breaks the prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict
from tests.falsifiers.test_real_weights import Candidate

from driftscope.artifacts.open import open_artifact
from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import outlier_step
from driftscope.falsifiers.outlier_step import block_size_of, inputs, measure
from driftscope.falsifiers.own_activations import OwnActivations
from driftscope.falsifiers.sampling import Resampling, generator
from driftscope.kernels.activations import quantize_activation

ASKED = load_contract(CONTRACTS / "outlier.yaml").falsifier("outlier-multiplies").measurement
RESAMPLING = Resampling(100, 0.95)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn activations with a heavy tail in the place of the model's own."""
    arrays = {
        (layer, tap): generator(layer, len(tap)).standard_t(2, (12, 512)).astype(np.float32)
        for layer in range(6)
        for tap in ("attn_norm", "attention", "ffn_norm", "ffn_swiglu")
    }
    held = OwnActivations(arrays, np.zeros(12, np.int64), np.arange(12))
    monkeypatch.setattr(outlier_step, "own_activations", lambda *_, **__: held)


def _measured() -> dict[str, Any]:
    return measure(ASKED.parameters, ASKED.regimes, ASKED.seeds, Candidate())


def _verdict() -> dict[str, Any]:
    return verdict("outlier", "outlier-multiplies", _measured())


def test_the_loss_of_one_block_is_that_of_its_values_rounded_one_by_one() -> None:
    x = np.array([[40.0, 1.0, *np.sin(np.arange(254))]], np.float32)
    error, multiplier, predicted, lost = outlier_step._losses(x, "q8_K", 256, 2.0)[0]
    step = 40.0 / 127.0
    others = x[0, 1:].astype(np.float64)
    by_hand = others - step * np.rint(others / step)
    assert error == pytest.approx(np.sqrt(np.square(by_hand).mean()) / (step / np.sqrt(12)), rel=1e-5)
    assert predicted == pytest.approx(40.0)
    assert lost == pytest.approx(np.square(by_hand).sum() / np.square(others).sum(), rel=1e-5)
    calm = others - np.rint(others * 127.0) / 127.0
    assert multiplier == pytest.approx(np.sqrt(np.square(by_hand).sum() / np.square(calm).sum()), rel=1e-3)


def test_a_block_without_an_outlier_is_left_out() -> None:
    even = np.ones((3, 256), np.float32)
    assert len(outlier_step._losses(even, "q8_K", 256, 2.0)) == 0
    assert outlier_step._metrics([even], "q8_K", 2.0, RESAMPLING) == {}
    assert len(outlier_step._losses(np.zeros((1, 256), np.float32), "q8_0", 32, 1.0)) == 0


@pytest.mark.parametrize(("fmt", "size"), [("q8_0", 32), ("q8_1", 32), ("q8_K", 256), ("f16", 256)])
def test_the_width_of_a_block_is_its_format_s(fmt: str, size: int) -> None:
    assert block_size_of(fmt) == size


@pytest.mark.usefixtures("own")
def test_the_unbroken_formats_support_the_prediction() -> None:
    document = _verdict()
    assert document["verdict"] == "supported"
    assert len(document["regimes"]) == 6


@pytest.mark.usefixtures("own")
def test_the_prediction_ends_where_the_others_round_to_zero() -> None:
    lost = [sample["lost"] for sample in _measured()["domain"][:-1]]
    assert lost == sorted(lost)
    assert lost[0] < 1e-3
    assert lost[-1] == 1.0


@pytest.mark.usefixtures("own")
def test_formats_without_a_shared_step_change_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlier_step, "quantize_activation", lambda x, fmt: quantize_activation(x, "f16"))
    assert _verdict()["verdict"] in ("falsified", "vacuous", "inconclusive")


@pytest.mark.usefixtures("own")
def test_a_kernel_with_a_coarser_step_changes_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six bits instead of eight in the model's own blocks: the error is four times the predicted one."""

    class Coarse:
        def __init__(self, values: Any) -> None:
            self.values = values

        def dequantize(self) -> Any:
            return self.values

    def coarse(x: Any, fmt: str) -> Any:
        quantized = quantize_activation(x, fmt)
        if fmt == "f16" or not np.any(x):
            return quantized
        step = 4.0 * np.abs(x).max(axis=1, keepdims=True) / 127.0
        return Coarse((np.rint(x / step) * step).astype(np.float32))

    monkeypatch.setattr(outlier_step, "quantize_activation", coarse)
    assert _verdict()["verdict"] != "supported"


@pytest.mark.usefixtures("own")
def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(_measured(), allow_nan=False) for _ in range(2))
    assert first == second


@pytest.mark.model
def test_the_default_model_s_own_blocks_follow_the_prediction(default_gguf: Path) -> None:
    parameters = {**ASKED.parameters, "most_tokens": 2, "resamples": 100}
    regimes = {name: regime for name, regime in ASKED.regimes.items() if regime["activation"] == "own"}
    document = measure(parameters, regimes, [1], Candidate(open_artifact(default_gguf)))
    for regime in document["regimes"].values():
        assert regime["excess"]["value"] == pytest.approx(1.0, abs=0.1)


def test_no_candidate_is_not_run_and_the_evidence_is_named() -> None:
    assert inputs({}) == ["models/candidate.json", "prompts.json"]
    assert measure(ASKED.parameters, ASKED.regimes, [1], NOWHERE)["status"] == "not-run"


def test_bad_parameters_are_named() -> None:
    with pytest.raises(InputError, match="`least_ratio`"):
        measure({**ASKED.parameters, "least_ratio": 0.5}, {}, [1], Candidate())
    with pytest.raises(InputError, match="expected own or normal"):
        measure(ASKED.parameters, {"a": {"format": "q8_K", "activation": "zero"}}, [1], Candidate())
