"""Shares of energies whose parts are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from driftscope.analysis.decomposition import Resampling, centred_energy, decompose
from driftscope.errors import InputError
from driftscope.evidence.schemas import frame_of

RESAMPLING = Resampling(block_positions=4, resamples=300, confidence=0.9, seed=1)
PLACES = [("a", i) for i in range(12)] + [("b", i) for i in range(8)]
N = len(PLACES)
Item = tuple[str, str, str]


def table(energies: Mapping[Item, NDArray[np.float64]]) -> pl.DataFrame:
    """An ``energies`` table."""
    rows = [
        dict(zip(("by", "item", "mechanism"), item, strict=True))
        | {"sequence": sequence, "position": position, "energy": float(value)}
        for item, values in energies.items()
        for (sequence, position), value in zip(PLACES, values, strict=True)
    ]
    return frame_of(rows, "energies")


def known() -> dict[Item, NDArray[np.float64]]:
    """Weights bring 60 %, activations 30 %, their interaction 10 %; two layers and two sites each."""
    total = np.random.Generator(np.random.Philox(1)).gamma(2.0, size=N)
    return {
        ("total", "weight", "weight"): 0.6 * total,
        ("total", "activation", "activation"): 0.3 * total,
        ("total", "all", "both"): total,
        ("layer", "0", "weight"): 0.15 * total,
        ("layer", "1", "weight"): 0.35 * total,
        ("layer", "0", "activation"): 0.2 * total,
        ("layer", "1", "activation"): 0.2 * total,
        ("site", "q", "weight"): 0.6 * total,
        ("site", "q", "activation"): 0.3 * total,
        ("control", "no-op", "both"): 0 * total,
        ("control", "all", "both"): total.copy(),
        ("control", "f16-cache", "both"): 0.02 * total,
    }


def shares(document: dict[str, Any], key: str = "shares") -> dict[Item, float]:
    """Shares by item."""
    return {(row["by"], row["item"], row["mechanism"]): row["share"] for row in document[key]}


def test_known_parts_are_found_and_add_up() -> None:
    document = decompose(table(known()), RESAMPLING, 10)
    found = shares(document)
    assert document["status"] == "done"
    assert found["mechanism", "weight", "weight"] == pytest.approx(0.6, rel=1e-12)
    assert found["mechanism", "activation", "activation"] == pytest.approx(0.3, rel=1e-12)
    assert found["mechanism", "interaction", "both"] == pytest.approx(0.1, rel=1e-12)
    assert found["layer", "interaction", "weight"] == pytest.approx(0.1, rel=1e-12)
    # The layers' activations bring in more than the mechanism: their interaction is negative.
    assert found["layer", "interaction", "activation"] == pytest.approx(-0.1, rel=1e-12)
    assert found["site", "interaction", "weight"] == pytest.approx(0, abs=1e-15)
    for mechanism, share in (("weight", 0.6), ("activation", 0.3)):
        for by in ("layer", "site"):
            parts = [value for key, value in found.items() if key[0] == by and key[2] == mechanism]
            assert sum(parts) == pytest.approx(share, rel=1e-12)
    assert sum(value for key, value in found.items() if key[0] == "mechanism") == pytest.approx(1, rel=1e-12)


def test_proportional_energies_leave_no_width_and_others_do() -> None:
    energies = known()
    for row in decompose(table(energies), RESAMPLING, 10)["shares"]:
        assert row["low"] == pytest.approx(row["share"], abs=1e-12)
        assert row["high"] == pytest.approx(row["share"], abs=1e-12)
    energies["layer", "0", "weight"] = energies["layer", "0", "weight"][::-1]
    row = next(
        row
        for row in decompose(table(energies), RESAMPLING, 10)["shares"]
        if (row["by"], row["item"], row["mechanism"]) == ("layer", "0", "weight")
    )
    assert row["low"] < row["share"] < row["high"]


def test_the_first_token_of_every_sequence_is_left_out_as_well() -> None:
    energies = known()
    first = [index for index, (_, position) in enumerate(PLACES) if position == 0]
    energies["total", "all", "both"][first] = 1000.0
    energies["control", "all", "both"][first] = 1000.0
    document = decompose(table(energies), RESAMPLING, 10)
    total = energies["total", "all", "both"]
    assert document["first_token_energy_share"] == pytest.approx(2000 / total.sum())
    assert shares(document)["mechanism", "weight", "weight"] < 0.1
    assert shares(document, "shares_all_but_first")["mechanism", "weight", "weight"] == pytest.approx(0.6)


def test_the_controls_are_reported_as_they_are() -> None:
    energies = known()
    controls = decompose(table(energies), RESAMPLING, 10)["controls"]
    assert controls["no_op_energy"] == 0
    assert controls["all_promoted_share"] == 1
    assert controls["all_promoted_exact"] is True
    assert controls["f16_cache_share"] == pytest.approx(0.02)

    energies["control", "no-op", "both"][3] = 0.5
    energies["control", "all", "both"][3] = np.nextafter(energies["control", "all", "both"][3], 9)
    controls = decompose(table(energies), RESAMPLING, 10)["controls"]
    assert controls["no_op_energy"] == 0.5
    assert controls["all_promoted_exact"] is False


def test_too_few_positions_give_no_shares() -> None:
    document = decompose(table(known()), RESAMPLING, N + 1)
    assert document["status"] == "inadmissible"
    assert str(N) in document["reason"]
    assert document["shares"] == []


def test_energies_that_are_not_defined_give_no_shares() -> None:
    frame = table(known())
    broken = (pl.col("by") == "layer") & (pl.col("item") == "1") & (pl.col("position") == 2)
    frame = frame.with_columns(energy=pl.when(broken).then(None).otherwise(pl.col("energy")))
    document = decompose(frame, RESAMPLING, 10)
    assert document["status"] == "inadmissible"
    assert f"2 of {N} token positions" in document["reason"]
    assert document["shares"] == []


def test_outputs_that_do_not_differ_have_no_shares() -> None:
    document = decompose(table({item: 0 * values for item, values in known().items()}), RESAMPLING, 10)
    assert document["shares"] == []
    assert document["controls"]["all_promoted_share"] is None
    assert document["controls"]["all_promoted_exact"] is True


@pytest.mark.parametrize(
    "item", [("total", "all", "both"), ("control", "no-op", "both"), ("control", "all", "both")]
)
def test_a_missing_run_is_bad_input(item: Item) -> None:
    energies = known()
    del energies[item]
    with pytest.raises(InputError, match="missing"):
        decompose(table(energies), RESAMPLING, 10)


def test_runs_over_other_positions_are_bad_input() -> None:
    frame = table(known())
    short = frame.filter(~((pl.col("item") == "q") & (pl.col("position") == 5)))
    with pytest.raises(InputError, match="other token positions"):
        decompose(short, RESAMPLING, 10)


def test_energy_is_that_of_the_centred_logits() -> None:
    difference = np.random.Generator(np.random.Philox(2)).standard_normal((6, 50), dtype=np.float32)
    wide = difference.astype(np.float64)
    np.testing.assert_allclose(centred_energy(difference), wide.var(axis=1) * 50, rtol=1e-12)
    # A constant on all logits changes no probability.
    np.testing.assert_allclose(
        centred_energy(difference + np.float32(4)), centred_energy(difference), rtol=1e-4
    )
    assert centred_energy(np.zeros((2, 7), np.float32)).tolist() == [0.0, 0.0]
    difference[1, 3] = np.nan
    assert np.isfinite(centred_energy(difference)).tolist() == [True, False, True, True, True, True]


def test_the_three_energies_of_vectors_add_up() -> None:
    random = np.random.Generator(np.random.Philox(3))
    weights, activations = (random.standard_normal((N, 40)).astype(np.float32) for _ in range(2))
    energies = known()
    energies["total", "weight", "weight"] = centred_energy(weights)
    energies["total", "activation", "activation"] = centred_energy(activations)
    energies["total", "all", "both"] = centred_energy(weights + activations)
    found = shares(decompose(table(energies), RESAMPLING, 10))
    centred = [x - x.mean(axis=1, keepdims=True) for x in (weights.astype(float), activations.astype(float))]
    inner = 2 * (centred[0] * centred[1]).sum() / np.square(centred[0] + centred[1]).sum()
    assert found["mechanism", "interaction", "both"] == pytest.approx(inner, abs=1e-6)
