"""Real blocks against matched random ones: the matching, the tail, the verdicts and what breaks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict

from driftscope.artifacts.open import open_artifact
from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import real_weights
from driftscope.falsifiers.own_activations import OwnActivations
from driftscope.falsifiers.real_weights import Tensor, inputs, measure, mirror, shuffled, with_random_quants
from driftscope.falsifiers.sampling import Resampling, generator
from driftscope.falsifiers.super_block import gaussian_rows, path_a, random_rows
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import format_of
from driftscope.kernels.matmul import matmul_f32_quantized
from driftscope.kernels.reference import published

CONTRACT = load_contract(CONTRACTS / "real-weights.yaml")
REGIMES = {name: {"activation": name} for name in ("ramp", "normal", "own")}
PARAMETERS = {"blocks": 48, "activations": 2, "most_tokens": 2, "resamples": 100, "confidence": 0.95}


class Candidate:
    """Evidence in memory: a candidate and two prompts."""

    def __init__(self, artifact: Any = None) -> None:
        self.artifact = artifact

    def has(self, name: str) -> bool:
        return name in ("models/candidate.json", "prompts.json")

    def table(self, name: str, schema: str) -> Any:
        raise AssertionError(name)

    def document(self, name: str) -> dict[str, Any]:
        return {"trace": [{"ids": [1, 2, 3]}, {"ids": [4]}]}

    def model(self, name: str) -> Any:
        return self.artifact


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put given rows in the place of the candidate's projections."""

    def place(rows_of: Any) -> None:
        tensors = [
            Tensor(index, "down", "Q4_K", rows_of(generator(9, index)), 256)
            for index in range(real_weights._SYNTHETIC_TENSORS)
        ]
        coverage = {"tensors": len(tensors), "blocks": 256, "blocks_there": 256, "share_of_values": 1.0}
        ramp = np.broadcast_to(published.activation(), (3, 256)).astype(np.float32)
        own = OwnActivations(
            {(index, "ffn_swiglu"): ramp for index in range(len(tensors))},
            np.zeros(3, np.int64),
            np.arange(3),
        )
        monkeypatch.setattr(real_weights, "_tensors", lambda artifact, most: (tensors, coverage))
        monkeypatch.setattr(real_weights, "_first_blocks", lambda artifact: {"layers": [], "count": 0})
        monkeypatch.setattr(real_weights, "own_activations", lambda *_, **__: own)

    return place


def _verdict(falsifier: str, regimes: dict[str, dict[str, str]] | None = None) -> dict[str, Any]:
    asked = CONTRACT.falsifier(falsifier).measurement
    document = measure(asked.parameters, regimes or asked.regimes, asked.seeds, Candidate())
    return verdict("real-weights", falsifier, document)


@pytest.mark.parametrize("dtype", sorted(real_weights._QUANT_BYTES))
def test_random_quants_keep_the_scales_and_minima(dtype: str) -> None:
    random = generator(1)
    layout = format_of(dtype)
    n_blocks = 64 * 256 // layout.block_size
    rows = random.integers(0, 256, (n_blocks, layout.block_bytes), dtype=np.uint8)
    drawn = with_random_quants(rows, dtype, random)
    first, last = real_weights._QUANT_BYTES[dtype]
    assert np.array_equal(drawn[:, :first], rows[:, :first])
    assert np.array_equal(drawn[:, last:], rows[:, last:])
    assert not np.array_equal(drawn[:, first:last], rows[:, first:last])


def test_the_scales_of_a_block_really_are_where_nothing_is_drawn() -> None:
    """Blocks of zero scales and minima stay zero whatever their quants: no scale byte was touched."""
    for dtype, (first, last) in real_weights._QUANT_BYTES.items():
        if dtype == "MXFP4":  # its smallest scale is 2^-127, not zero
            continue
        blocks = np.zeros((256 // format_of(dtype).block_size, format_of(dtype).block_bytes), np.uint8)
        blocks[:, first:last] = 0x5A
        assert not np.any(dequantize(blocks.reshape(1, -1), dtype)), dtype


def test_shuffling_stays_inside_runs_of_32() -> None:
    x = np.arange(512, dtype=np.float32).reshape(2, 256)
    moved = shuffled(x, generator(2))
    assert not np.array_equal(moved, x)
    assert np.array_equal(np.sort(moved.reshape(-1, 32), axis=1), x.reshape(-1, 32))


def test_a_mirrored_block_is_symmetric_and_its_sum_with_an_odd_activation_cancels() -> None:
    rows = mirror(gaussian_rows(generator(3), 8))
    values = dequantize(rows, "Q4_K")
    assert np.array_equal(values, values[:, ::-1])
    odd = (np.arange(256) - 127.5).astype(np.float32)[None]
    assert np.abs(path_a(rows, odd)).max() < 1e-3 * np.abs(values).sum(axis=1).max() * 127


def test_the_tail_exponent_of_a_pareto_law_is_found() -> None:
    for alpha in (1.0, 2.5):
        groups = [generator(4, index).pareto(alpha, 20000) + 1.0 for index in range(8)]
        found = real_weights._tail(groups, Resampling(200, 0.95))["tail"]
        assert found["value"] == pytest.approx(alpha, rel=0.1)
        assert found["low"] < found["value"] < found["high"]


def test_generic_blocks_are_like_their_matched_ones_and_have_no_mean(blocks: Any) -> None:
    blocks(lambda random: random_rows(random, 256))
    assert _verdict("real-weights-amplify")["verdict"] == "falsified"
    assert _verdict("real-weights-scalar")["verdict"] == "falsified"


def test_weights_that_cancel_against_the_activation_change_the_verdict(blocks: Any) -> None:
    blocks(lambda random: mirror(gaussian_rows(random, 256)))
    document = _verdict("real-weights-amplify")
    assert document["verdict"] == "regime-dependent"
    assert "ramp" in document["reason"]
    assert "own" in document["reason"]


def test_a_path_b_that_is_path_a_is_found_by_the_controls(
    blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks(lambda random: random_rows(random, 256))
    monkeypatch.setattr(
        real_weights, "matmul_quantized", lambda x, rows, dtype: matmul_f32_quantized(x, rows, dtype)
    )
    assert _verdict("real-weights-amplify")["verdict"] in ("vacuous", "inconclusive")


def test_sums_that_cannot_cancel_change_the_second_verdict(
    blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = real_weights.products

    def away_from_zero(rows: Any, dtype: str, x: Any) -> Any:
        a, b = original(rows, dtype, x)
        far = np.float32(20.0 * np.abs(a).max())
        return a + far, b + far

    blocks(lambda random: random_rows(random, 256))
    monkeypatch.setattr(real_weights, "products", away_from_zero)
    assert _verdict("real-weights-scalar")["verdict"] == "supported"


@pytest.mark.model
def test_the_default_model_is_read_whole_or_in_even_steps(default_gguf: Path) -> None:
    evidence = Candidate(open_artifact(default_gguf))
    first, second = (
        json.dumps(measure(PARAMETERS, REGIMES, [1], evidence), allow_nan=False) for _ in range(2)
    )
    assert first == second
    document = json.loads(first)
    coverage = document["coverage"]
    assert coverage["tensors"] == 7 * 30
    assert coverage["tensors_left_out"] == []
    # 576 columns hold two whole runs of 256, 1536 hold six.
    assert coverage["blocks_there"] == 30 * (2 * (576 + 192 + 192 + 576 + 1536 + 1536) + 6 * 576)
    assert coverage["blocks"] == 210 * 48
    for regime in document["regimes"].values():
        assert 0.001 < regime["error"]["value"] < 0.1
        assert regime["tail"]["value"] == pytest.approx(1.0, abs=0.3)


def test_no_candidate_is_not_run_and_the_evidence_is_named() -> None:
    assert inputs({}) == ["models/candidate.json", "prompts.json"]
    assert measure(PARAMETERS, REGIMES, [1], NOWHERE)["status"] == "not-run"


def test_bad_parameters_are_named(blocks: Any) -> None:
    blocks(lambda random: random_rows(random, 16))
    with pytest.raises(InputError, match="`blocks`"):
        measure({**PARAMETERS, "blocks": 0}, REGIMES, [1], Candidate())
    with pytest.raises(InputError, match="expected one of ramp, normal, own"):
        measure(PARAMETERS, {"a": {"activation": "zero"}}, [1], Candidate())
