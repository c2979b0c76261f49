"""Grouped attention: the head map, the bound of the error, and what breaks them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict

from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import grouped_attention as module
from driftscope.falsifiers.reader import FolderReader
from driftscope.kernels.forward import attention

NAME = "grouped-attention"


def _measured(evidence: FolderReader = NOWHERE, **changes: Any) -> dict[str, Any]:
    """The registered measurement over a shorter cache and one seed."""
    asked = load_contract(CONTRACTS / f"{NAME}.yaml").falsifier(NAME).measurement
    parameters = {**asked.parameters, "tokens": 24, "resamples": 100, **changes}
    return module.measure(parameters, asked.regimes, [1, 2], evidence)


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return _measured()


def _broken(change: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    def broken(q: Any, k: Any, v: Any, starts: Any, **options: Any) -> Any:
        q, k, v = change(q, k, v, options)
        return attention(q, k, v, starts, **options)

    return broken


def test_the_verdict_on_the_unbroken_kernel(measurement: dict[str, Any]) -> None:
    document = verdict(NAME, NAME, measurement)
    assert document["verdict"] == "supported"
    assert all(control["as_required"] for control in document["controls"].values())
    for regime in measurement["regimes"].values():
        assert regime["wrong_heads"] == regime["formulas_differ"] == regime["cached_differs"] == 0
        # One key has all the weight, whatever its score.
        assert regime["absolute"]["first"] == 0.0
        assert 0.0 < regime["error"]["low"] <= regime["error"]["high"] < 0.1


def test_the_published_tolerances_hold_and_would_miss_a_small_fault(measurement: dict[str, Any]) -> None:
    published = measurement["regimes"]["7-to-1"]["absolute"]
    assert published["first"] <= 1e-4
    assert published["second"] <= 1e-3
    fault = next(sample for sample in measurement["domain"] if sample.get("scale_fault") == 1e-3)
    assert fault["absolute"]["second"] <= 1e-3
    assert fault["error"]["low"] > 1.0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda q, k, v, o: (q, np.roll(k, o_dim(k, o), 1), v), id="keys of the next head"),
        pytest.param(lambda q, k, v, o: (q, k, np.roll(v, o_dim(v, o), 1)), id="values of the next head"),
        pytest.param(lambda q, k, v, o: (q * np.float32(1.001), k, v), id="scale"),
        pytest.param(lambda q, k, v, o: (q, k, v * np.float32(1.001)), id="values too large"),
        pytest.param(lambda q, k, v, o: (q, k.astype(np.float16).astype(np.float32), v), id="keys in f16"),
    ],
)
def test_a_broken_kernel_changes_the_verdict(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, ...]]
) -> None:
    monkeypatch.setattr(module, "attention", _broken(change))
    assert verdict(NAME, NAME, _measured())["verdict"] == "falsified"


def o_dim(x: Any, options: dict[str, Any]) -> int:
    """Channels of a KV head."""
    return int(x.shape[1] // options["n_kv_heads"])


def test_a_swapped_pair_of_heads_is_regime_dependent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that is wrong only where heads share: at 1:1 it is the identity."""

    def modulo(q: Any, k: Any, v: Any, starts: Any, **options: Any) -> Any:
        if options["n_heads"] == options["n_kv_heads"]:
            return attention(q, k, v, starts, **options)
        return module._modulo(q, k, v, options["n_heads"], options["n_kv_heads"], options["scale"])

    monkeypatch.setattr(module, "attention", modulo)
    document = verdict(NAME, NAME, _measured())
    assert document["verdict"] == "regime-dependent"
    assert "only in 1-to-1" in document["reason"]


def test_a_broken_cache_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.cached_attention

    def broken(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options) * np.float32(1.0001)

    monkeypatch.setattr(module, "cached_attention", broken)
    assert _measured()["regimes"]["3-to-1"]["cached_differs"] > 100


def test_the_heads_that_are_read_are_found() -> None:
    shape = (12, 4, 8)
    assert module.heads_read(module.kernel, shape).tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3] * 2
    assert module.heads_read(module._modulo, shape).tolist() == [[0, 1, 2, 3] * 3] * 2
    mixed = module.heads_read(lambda q, k, v, *rest: np.full_like(q, 0.5), shape)
    assert (mixed == -1).all()


def test_the_bound_holds_where_the_softmax_is_peaked_and_where_values_cancel() -> None:
    shape, tokens = (2, 1, 64), 40
    for spread in (0.01, 1.0, 30.0):
        q, k, v = module._draw(3, shape, tokens, spread)
        v[::2] = -v[1::2]
        found = module.kernel(q, k, v, 2, 1, 0.125).reshape(tokens, 2, 64)
        for i in range(tokens):
            exact, bound = module._exact(q[i], k[: i + 1], v[: i + 1], shape, 0.125)
            assert (np.abs(found[i] - exact) <= bound).all()


def test_cuda_is_measured_or_said_not_to_be_there(
    measurement: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measurement["devices"] == {"cuda": {"status": "not asked for"}}

    class Card:
        """The CPU's kernel under a card's interface."""

        def to_device(self, x: Any) -> Any:
            return x

        to_host = to_device

        def attention(self, *arguments: Any, **options: Any) -> Any:
            return attention(*arguments, **options)

    monkeypatch.setattr(module, "kernels_on", lambda device: Card())
    found = _measured(FolderReader(Path("/nonexistent"), "cuda"))["devices"]["cuda"]
    assert found["status"] == "measured"
    assert found["7-to-1"]["wrong_heads"] == 0
    assert found["7-to-1"]["error"]["value"] < 1.0


def test_the_same_arguments_give_the_same_bytes(measurement: dict[str, Any]) -> None:
    assert json.dumps(_measured(), allow_nan=False) == json.dumps(measurement)


@pytest.mark.parametrize("change", [{"tokens": 7}, {"confidence": 1.0}, {"resamples": 1}])
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        _measured(**change)


def test_heads_that_do_not_divide_are_named() -> None:
    parameters = {"tokens": 8, "resamples": 100, "confidence": 0.9}
    with pytest.raises(InputError, match="multiple of 3"):
        module.measure(parameters, {"a": {"heads": 7, "kv_heads": 3, "head_dim": 4}}, [1], NOWHERE)
