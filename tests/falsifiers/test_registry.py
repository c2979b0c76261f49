"""Every registered measurement has the two functions, and every one is used."""

from __future__ import annotations

import pytest
from tests.falsifiers.registered import CONTRACTS

from driftscope.contracts.loading import load_contracts
from driftscope.errors import InputError
from driftscope.falsifiers.registry import MEASUREMENTS, measurement_module


def test_every_registered_measurement_is_bound_by_a_contract() -> None:
    bound = {
        falsifier.measurement.name
        for item in load_contracts([CONTRACTS])
        for falsifier in item.contract.falsifiers
    }
    assert bound == set(MEASUREMENTS)
    for name in MEASUREMENTS:
        module = measurement_module(name)
        assert callable(module.measure)
        assert callable(module.inputs)


def test_an_unknown_measurement_is_named() -> None:
    with pytest.raises(InputError, match=r"`nothing` is not registered; known are .*chain"):
        measurement_module("nothing")
