"""Each verdict, and what leads to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.contracts.examples import CONTRACT_YAML, coin_contract, coin_measurement, share

from driftscope.contracts.judge import judge, not_run
from driftscope.contracts.model import judgement_sha256
from driftscope.errors import InputError


def _judge(folder: Path, measurement: dict[str, Any] | None, text: str = CONTRACT_YAML) -> dict[str, Any]:
    contract = coin_contract(folder, text)
    return judge(contract, contract.falsifier("loaded-coin"), measurement)


@pytest.mark.parametrize(
    ("left", "right", "verdict"),
    [
        (None, None, "supported"),
        (share(0.5, 0.45, 0.55), share(0.4, 0.35, 0.45), "falsified"),
        (share(0.8, 0.75, 0.85), share(0.4, 0.35, 0.45), "regime-dependent"),
        (share(0.8, 0.75, 0.85), share(0.6, 0.55, 0.65), "inconclusive"),
        (share(0.5, 0.45, 0.55), share(0.6, 0.55, 0.65), "inconclusive"),
    ],
)
def test_the_regimes_decide(tmp_path: Path, left: Any, right: Any, verdict: str) -> None:
    assert _judge(tmp_path, coin_measurement(left, right))["verdict"] == verdict


def test_the_sentences_and_figures_carry_the_measured_numbers(tmp_path: Path) -> None:
    verdict = _judge(tmp_path, coin_measurement())
    assert verdict["asked"] == "Does the coin show heads in more than 60% of its throws?"
    assert verdict["found"] == "It shows heads in 80% (left) and 70% (right)."
    assert verdict["would_change"] == "A hand with less than 60% heads."
    assert verdict["figures"] == {"left": 0.8, "left_low": 0.75, "left_high": 0.85}
    assert verdict["contradicts"] == ["fair-play"]
    falsified = _judge(tmp_path, coin_measurement(share(0.1), share(0.2)))
    assert falsified["found"] == "Left 10%, right 20%."
    assert falsified["contradicts"] == []


def test_the_verdict_names_contract_version_and_clause(tmp_path: Path) -> None:
    verdict = _judge(tmp_path, coin_measurement())
    falsifier = coin_contract(tmp_path).falsifier("loaded-coin")
    assert (verdict["contract"], verdict["version"]) == ("coin", "1.2.0")
    assert verdict["clause"] == judgement_sha256(falsifier)


def test_no_measurement_is_not_run(tmp_path: Path) -> None:
    assert _judge(tmp_path, None)["verdict"] == "not-run"
    contract = coin_contract(tmp_path)
    document = not_run(contract, contract.falsifier("loaded-coin"), "no coin")
    assert document["verdict"] == "not-run"
    assert document["found"] == "Not measured: no coin."
    assert document["asked"] == "Does the coin show heads in more than 60% of its throws?"


@pytest.mark.parametrize("change", [{"samples": 0}, {"regimes": {}}, {"samples": None}])
def test_nothing_measured_is_inadmissible(tmp_path: Path, change: dict[str, Any]) -> None:
    verdict = _judge(tmp_path, {**coin_measurement(), **change})
    assert verdict["verdict"] == "inadmissible"
    assert "nothing was measured" in verdict["found"]


def test_a_constant_predicate_is_vacuous(tmp_path: Path) -> None:
    for domain in ([share(0.1), share(0.2)], [share(0.8), share(0.9)]):
        assert _judge(tmp_path, {**coin_measurement(), "domain": domain})["verdict"] == "vacuous"


def test_an_unsampled_domain_is_inconclusive(tmp_path: Path) -> None:
    for domain in ([], [share(0.9)], None):
        assert _judge(tmp_path, {**coin_measurement(), "domain": domain})["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("control", "value", "said"),
    [
        ("two-headed", share(0.5), "`two-headed` did not fire"),
        ("two-headed", share(0.7, 0.5, 0.9), "`two-headed` did not fire"),
        ("two-headed", None, "`two-headed` did not fire"),
        ("fair", share(0.9), "`fair` did not stay silent"),
        ("fair", share(0.6, 0.5, 0.7), "`fair` did not stay silent"),
        ("fair", None, "`fair` did not stay silent"),
    ],
)
def test_a_control_that_does_not_do_its_part_leaves_it_undecided(
    tmp_path: Path, control: str, value: Any, said: str
) -> None:
    measurement = coin_measurement()
    measurement["controls"][control] = value
    verdict = _judge(tmp_path, measurement)
    assert verdict["verdict"] == "inconclusive"
    assert said in verdict["found"]


def test_a_missing_regime_or_metric_is_inconclusive(tmp_path: Path) -> None:
    measurement = coin_measurement()
    del measurement["regimes"]["right"]
    assert "regime right was not measured" in _judge(tmp_path, measurement)["found"]
    measurement = coin_measurement(right={"tails": 0.5})
    verdict = _judge(tmp_path, measurement)
    assert verdict["verdict"] == "inconclusive"
    assert "a metric is missing in regime right" in verdict["found"]


def test_a_measurement_of_other_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="measure again"):
        _judge(tmp_path, {**coin_measurement(), "measurement": "0" * 64})


def test_an_admission_clause_that_fails_makes_it_inadmissible(tmp_path: Path) -> None:
    text = CONTRACT_YAML.replace(
        "    clauses:\n",
        "    admits:\n"
        "    - {id: seen, scope: document, metric: observed, comparator: ==, threshold: true,"
        " why: nobody saw it}\n"
        "    clauses:\n",
    )
    assert _judge(tmp_path, {**coin_measurement(), "observed": True}, text)["verdict"] == "supported"
    for measurement in ({**coin_measurement(), "observed": False}, coin_measurement()):
        verdict = _judge(tmp_path, measurement, text)
        assert verdict["verdict"] == "inadmissible"
        assert "nobody saw it" in verdict["found"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{regimes.left.heads:.0%} (left)", "{regimes.left.tails:.0%} (left)"),
        ("left: regimes.left.heads", "left: regimes.up"),
    ],
)
def test_a_template_that_names_a_missing_metric_is_an_error(tmp_path: Path, old: str, new: str) -> None:
    text = CONTRACT_YAML.replace(old, new)
    assert text != CONTRACT_YAML
    with pytest.raises(InputError, match="which the measurement lacks"):
        _judge(tmp_path, coin_measurement(), text)


def test_a_threshold_edit_moves_the_verdict(tmp_path: Path) -> None:
    stricter = CONTRACT_YAML.replace("threshold: 0.6", "threshold: 0.85")
    assert _judge(tmp_path, coin_measurement(), stricter)["verdict"] == "falsified"
