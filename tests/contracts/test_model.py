"""Digests of the two halves of a falsifier."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contracts.examples import CONTRACT_YAML, coin_contract

from driftscope.contracts.model import judgement_sha256, measurement_sha256


@pytest.mark.parametrize(
    ("old", "new", "measured", "judged"),
    [
        ("threshold: 0.6", "threshold: 0.7", False, True),
        ("kind: negative, what: a fair coin", "kind: negative, what: an old coin", False, True),
        ("asked: Does", "asked: So does", False, True),
        ("throws: 100", "throws: 101", True, False),
        ("{hand: right}", "{hand: gloved}", True, False),
        ("seeds: [1, 2]", "seeds: [1, 3]", True, False),
        ("name: coin", "name: dice", True, False),
        ("title: A coin", "title: The coin", False, False),
    ],
)
def test_an_edit_changes_the_digest_of_its_own_half_only(
    tmp_path: Path, old: str, new: str, measured: bool, judged: bool
) -> None:
    before = coin_contract(tmp_path).falsifier("loaded-coin")
    after = coin_contract(tmp_path, CONTRACT_YAML.replace(old, new)).falsifier("loaded-coin")
    assert (measurement_sha256(before) != measurement_sha256(after)) is measured
    assert (judgement_sha256(before) != judgement_sha256(after)) is judged


def test_the_order_of_the_regimes_keys_does_not_change_the_digest(tmp_path: Path) -> None:
    before = coin_contract(tmp_path).falsifier("loaded-coin")
    left, right = "      left: {hand: left}\n", "      right: {hand: right}\n"
    swapped = CONTRACT_YAML.replace(left + right, right + left)
    assert swapped != CONTRACT_YAML
    after = coin_contract(tmp_path, swapped)
    assert measurement_sha256(before) == measurement_sha256(after.falsifier("loaded-coin"))
