"""The chain: the published figures, the growth law, and what breaks it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import chain, super_block
from driftscope.kernels.matmul import matmul_quantized
from driftscope.kernels.reference import published

PARAMETERS = {"depth": 6, "activations": 2, "resamples": 100, "confidence": 0.9}
REGIMES = {
    "random": {"matrices": "random", "activation_format": "apr_q8k"},
    "gaussian": {"matrices": "gaussian", "activation_format": "q8_K"},
}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("chain", "chain-superlinear")


def test_the_published_chain_comes_out_to_its_printed_digits(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    # Printed 0.439143; the norms here are summed in f64.
    assert figures["after_five_percent"] == pytest.approx(0.439143, abs=1.5e-6)
    assert f"{figures['scalar_percent']:.4f}" == "0.0774"
    # The printed 5.70 is 0.4391 / 0.077; with 0.0774 it is 5.67, and in one metric 6.71.
    assert figures["amplification_mixed"] == pytest.approx(5.67, abs=0.005)
    assert figures["amplification_vector"] == pytest.approx(6.71, abs=0.005)
    assert figures["at_end_percent"] < figures["after_one_percent"]


def test_independent_matrices_give_the_square_root_law(measurement: dict[str, Any]) -> None:
    for name in ("random-blocks", "gaussian-weights"):
        exponent = measurement["regimes"][name]["exponent"]
        assert exponent["low"] < 0.5 < exponent["high"]
        growth = measurement["regimes"][name]["growth"]
        assert growth["low"] < measurement["null"]["growth"] < growth["high"]
    assert measurement["controls"]["quadrature"]["exponent"]["value"] == pytest.approx(0.5, abs=0.05)


def test_the_verdict_on_the_unbroken_kernels(measurement: dict[str, Any]) -> None:
    document = verdict("chain", "chain-superlinear", measurement)
    assert document["verdict"] == "falsified"
    assert document["controls"]["compounding"]["as_required"]
    assert document["controls"]["quadrature"]["as_required"]


def test_an_error_that_compounds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in path B that grows with what it is given: the verdict is no longer `falsified`."""

    def rounding(activation: str, gain: float) -> chain.Step:
        return original(activation, 1.6 if gain == 1.0 else gain)

    original = chain._rounding
    monkeypatch.setattr(chain, "_rounding", rounding)
    document = verdict("chain", "chain-superlinear", measured("chain", "chain-superlinear"))
    assert document["verdict"] == "regime-dependent"
    assert "random-blocks" in document["reason"]
    assert "gaussian-weights" in document["reason"]


def test_a_path_b_that_is_path_a_is_found_by_the_controls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no error left to follow, the controls cannot fire and nothing is decided."""
    monkeypatch.setattr(
        super_block, "matmul_quantized", lambda x, raw, dtype, *, activation: super_block.path_a(raw, x)
    )
    document = verdict("chain", "chain-superlinear", measured("chain", "chain-superlinear"))
    assert document["verdict"] in ("inconclusive", "vacuous")


def test_a_constant_error_is_not_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(x: Any, raw: Any, dtype: str, *, activation: str) -> Any:
        return matmul_quantized(x, raw, dtype, activation=activation) * np.float32(1.001)

    monkeypatch.setattr(super_block, "matmul_quantized", biased)
    document = verdict("chain", "chain-superlinear", measured("chain", "chain-superlinear"))
    # Each path is divided by its own root mean square, which takes a common factor out.
    assert document["verdict"] == "falsified"


def test_normalizing_is_the_published_step_row_by_row() -> None:
    rows = chain.generator(1).standard_normal((3, 256)).astype(np.float32)
    expected = np.stack([published.normalize(row) for row in rows])
    assert np.array_equal(chain.normalized(rows), expected)


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(chain.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("change", [{"depth": 4}, {"activations": 0}, {"confidence": 2.0}])
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        chain.measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)


def test_unknown_matrices_are_named() -> None:
    with pytest.raises(InputError, match="expected one of published, gaussian, random"):
        chain.measure(PARAMETERS, {"a": {"matrices": "identity", "activation_format": "q8_K"}}, [1], NOWHERE)


def test_the_published_tokens_come_out_to_their_printed_digits() -> None:
    figures = chain._published(chain.PUBLISHED_DEPTH)
    printed = ["0.439143", "0.246297", "0.020914", "0.028250", "0.023573", "0.024674", "0.020246"]
    assert [f"{value:.6f}" for value in figures["tokens_percent"].values()] == printed
    assert f"{figures['tokens_mean_percent']:.6f}" == "0.114728"
    assert f"{figures['tokens_std_a']:.6f} {figures['tokens_std_b']:.6f}" == "0.033416 0.032228"
