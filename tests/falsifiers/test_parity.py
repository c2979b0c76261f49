"""Parity gates: what one token cannot see, what many positions can, and what breaks that."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict
from tests.falsifiers.small_case import SmallCase, small_models

from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import case_logits, logit_parity, parity_faults
from driftscope.falsifiers.faulty_pass import FaultyPass
from driftscope.falsifiers.registry import measurement_module
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> SmallCase:
    return SmallCase(small_models(tmp_path_factory.mktemp("case"), num_hidden_layers=3))


def measured(falsifier: str, evidence: Any, contract: str = "parity-gate", **changes: Any) -> dict[str, Any]:
    asked = load_contract(CONTRACTS / f"{contract}.yaml").falsifier(falsifier).measurement
    parameters = {**asked.parameters, "text_tokens": 20, "resamples": 100, **changes}
    return measurement_module(asked.name).measure(parameters, asked.regimes, [1], evidence)


def judged(falsifier: str, evidence: Any, contract: str = "parity-gate") -> dict[str, Any]:
    return verdict(contract, falsifier, measured(falsifier, evidence, contract))


def test_one_token_is_blind_bit_for_bit(case: SmallCase) -> None:
    measurement = measured("parity-one-token", case)
    assert all(regime["differing"] == 0 for regime in measurement["regimes"].values())
    assert all(regime["cosine"] == 1.0 for regime in measurement["regimes"].values())
    document = verdict("parity-gate", "parity-one-token", measurement)
    assert document["verdict"] == "supported"
    assert all(control["as_required"] for control in document["controls"].values())


def test_many_positions_are_not_blind(case: SmallCase) -> None:
    document = judged("parity-positions", case)
    assert document["verdict"] == "falsified"
    assert all(control["as_required"] for control in document["controls"].values())


def test_a_first_position_that_is_rotated_is_no_longer_blind(
    case: SmallCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that begin at 3 and a second key: RoPE and the softmax have something to do."""
    monkeypatch.setattr(
        parity_faults,
        "_batch",
        lambda *_: TokenBatch.of([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 1, 8, 2, 8, 1, 8, 2, 8, 4]]),
    )
    assert judged("parity-one-token", case)["verdict"] == "falsified"


def test_faults_that_do_nothing_change_the_verdict(case: SmallCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that cannot see what it is asked about passes the faults."""
    original = FaultyPass.__init__

    def harmless(self: FaultyPass, artifacts: Any, policy: Any, **fault: Any) -> None:
        original(self, artifacts, policy, mixed_head=fault.get("mixed_head", 0.0))

    monkeypatch.setattr(FaultyPass, "__init__", harmless)
    # No sample of the domain but the mixed head is faulty then.
    assert judged("parity-positions", case)["verdict"] in ("supported", "vacuous")


def test_an_attention_that_does_not_attend_hides_the_faults(
    case: SmallCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token reads its own value only, as at position 0: RoPE and scale are out of reach."""

    def own_value(self: ForwardPass, layer: int, q: Any, k: Any, v: Any, batch: Any) -> Any:
        group = self.config.num_heads // self.config.num_kv_heads
        heads = v.reshape(len(v), self.config.num_kv_heads, -1)
        return np.ascontiguousarray(np.repeat(heads, group, axis=1).reshape(q.shape))

    monkeypatch.setattr(ForwardPass, "attend", own_value)
    assert judged("parity-positions", case)["verdict"] != "falsified"


def test_paths_of_one_model_agree_where_nothing_is_rounded(tmp_path: Path) -> None:
    """With float32 weights everywhere the paths are one: the gate passes, and the prediction holds."""
    teacher = small_models(tmp_path)["teacher"]
    document = judged("parity-paths", SmallCase({"teacher": teacher, "candidate": teacher}))
    assert document["verdict"] == "supported"
    assert all(control["as_required"] for control in document["controls"].values())


def test_a_path_with_broken_logits_changes_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = small_models(tmp_path)["teacher"]
    original = logit_parity._run

    def broken(artifacts: Any, path: str, batch: TokenBatch) -> Any:
        logits = original(artifacts, path, batch)
        return np.roll(logits, 1, axis=1) if path == "candidate.int8-dot" else logits

    monkeypatch.setattr(logit_parity, "_run", broken)
    document = judged("parity-paths", SmallCase({"teacher": teacher, "candidate": teacher}))
    assert document["verdict"] == "regime-dependent"
    assert "only in weights" in document["reason"]


def test_the_faults_are_what_they_are_called(case: SmallCase) -> None:
    teacher = {"teacher": case.models["teacher"]}
    policy, batch = Policy.uniform("teacher"), TokenBatch.of([list(range(20))])
    sound = ForwardPass(teacher, policy).run(batch)
    assert np.array_equal(FaultyPass(teacher, policy).run(batch), sound)
    config = dataclasses.replace(teacher["teacher"].config, rope_theta=1000.0)
    other = {"teacher": dataclasses.replace(teacher["teacher"], config=config)}
    assert np.array_equal(
        FaultyPass(teacher, policy, theta=0.1).run(batch), ForwardPass(other, policy).run(batch)
    )
    for fault in ({"theta": 0.1}, {"angle": 0.0}, {"score_gain": 2.0}, {"mixed_head": 1.0}):
        assert not np.array_equal(FaultyPass(teacher, policy, **fault).run(batch), sound)


def test_without_rope_a_token_does_not_know_the_order_of_those_before(case: SmallCase) -> None:
    teacher = {"teacher": case.models["teacher"]}
    none = FaultyPass(teacher, Policy.uniform("teacher"), angle=0.0)
    one, other = (none.run(TokenBatch.of([ids]))[-1] for ids in ([5, 6, 7, 7], [5, 6, 7, 7]))
    assert np.array_equal(one, other)
    single = dataclasses.replace(case.models["teacher"].config, num_layers=1)
    shallow = {"teacher": dataclasses.replace(case.models["teacher"], config=single)}
    none = FaultyPass(shallow, Policy.uniform("teacher"), angle=0.0)
    one, other = (none.run(TokenBatch.of([ids]))[-1] for ids in ([5, 6, 7], [6, 5, 7]))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_difference_of_logits() -> None:
    a = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]], dtype=np.float32)
    b = np.array([[1.0, 2.0, 4.0], [15.0, 15.0, 10.0]], dtype=np.float32)
    found = case_logits.difference(a, b)
    assert found.same_argmax.tolist() == [False, True]
    assert found.movement.tolist() == [(3.0 - 2.0) + (4.0 - 2.0), 0.0]
    assert found.margin_a.tolist() == [1.0, 0.0]
    assert found.margin_b.tolist() == [2.0, 0.0]
    # A common offset of the logits is nothing to a softmax, but the plain cosine sees it.
    assert found.error[1] < 1e-15
    assert found.noise[1] < 1e-15
    assert found.centred_cosine[1] == pytest.approx(1.0)
    assert found.cosine[1] == pytest.approx(
        float((a[1] * b[1]).sum()) / np.sqrt(float((a[1] ** 2).sum() * (b[1] ** 2).sum()))
    )
    assert found.differing.tolist() == [2, 3]


def test_the_null_model_expects_the_flips_that_noise_makes() -> None:
    random = np.random.Generator(np.random.Philox(3))
    a = random.standard_normal((400, 50)).astype(np.float32) * 3
    b = a + random.standard_normal(a.shape).astype(np.float32) * np.float32(0.4)
    metrics = logit_parity._metrics(a, b, [1, 2], logit_parity.Resampling(100, 0.95))
    assert metrics["expected_flips"]["low"] <= metrics["flips"] <= metrics["expected_flips"]["high"]
    assert metrics["noise"] == pytest.approx(0.4, rel=0.05)
    assert 0.0 < metrics["largest_flip"] < 4.0


@pytest.mark.parametrize("falsifier", ["parity-one-token", "parity-positions", "parity-paths"])
def test_the_same_evidence_gives_the_same_bytes(case: SmallCase, falsifier: str) -> None:
    one, other = (json.dumps(measured(falsifier, case), allow_nan=False) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("falsifier", ["parity-one-token", "parity-positions", "parity-paths"])
def test_without_a_model_it_is_not_run(falsifier: str) -> None:
    document = judged(falsifier, NOWHERE)
    assert document["verdict"] == "not-run"
    assert "models/" in document["found"]


def test_bad_parameters_are_named(case: SmallCase) -> None:
    with pytest.raises(InputError, match="`set_up`"):
        measured("parity-one-token", case, set_up="two-token")
    with pytest.raises(InputError, match="`roles`"):
        measured("parity-paths", case, roles="teacher")
    with pytest.raises(InputError, match="expected some of theta"):
        parity_faults._fault({"gain": 1.0})
    with pytest.raises(InputError, match="there is no prompt"):
        measured("parity-paths", SmallCase(case.models, {"prompts.json": {"trace": [], "texts": []}}))


def test_formats_of_one_model_are_one_model(case: SmallCase) -> None:
    measurement = measured("format-parity", case, "format-parity")
    assert measurement["source"] == {"status": "compared", "differing": 0, "flips": 0}
    ties = measurement["near_ties"]["dequantized"]
    assert [tie["margin"] for tie in ties] == [0.145, 0.185]
    assert 0.0 <= ties[1]["turned"] <= ties[0]["turned"] < 0.5
    document = verdict("format-parity", "format-parity", measurement)
    assert document["verdict"] == "supported"
    assert all(control["as_required"] for control in document["controls"].values())


def test_a_case_without_a_source_says_so(case: SmallCase) -> None:
    models = {role: case.models[role] for role in ("teacher", "candidate")}
    assert measured("format-parity", SmallCase(models), "format-parity")["source"] == {
        "status": "not present"
    }


def test_a_fault_in_an_artifact_changes_the_verdict(case: SmallCase) -> None:
    """The candidate with two matrices exchanged: every other tensor is right."""
    candidate = case.models["candidate"]
    tensors = dict(candidate.tensors)
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    broken = {**case.models, "candidate": dataclasses.replace(candidate, tensors=tensors)}
    assert judged("format-parity", SmallCase(broken), "format-parity")["verdict"] == "falsified"


def test_a_single_wrong_token_is_no_near_tie(case: SmallCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of the head exchanged: the typical cosine stays, the flip is far beyond the noise."""
    original = logit_parity._run

    def broken(artifacts: Any, path: str, batch: TokenBatch) -> Any:
        logits = original(artifacts, path, batch)
        return logit_parity._exchanged(logits) if path == "candidate.f32" else logits

    monkeypatch.setattr(logit_parity, "_run", broken)
    measurement = measured("format-parity", case, "format-parity")
    assert measurement["regimes"]["dequantized"]["centred_cosine"]["low"] > 0.98
    document = verdict("format-parity", "format-parity", measurement)
    assert document["verdict"] == "regime-dependent"
    assert "only in integer" in document["reason"]


@pytest.mark.parametrize(
    ("contract", "falsifier", "expected"),
    [
        ("parity-gate", "parity-one-token", "inadmissible"),
        ("parity-gate", "parity-positions", "inadmissible"),
        ("parity-gate", "parity-paths", "inadmissible"),
        ("format-parity", "format-parity", "inadmissible"),
    ],
)
def test_logits_that_are_not_finite_are_never_a_pass(
    tmp_path: Path, contract: str, falsifier: str, expected: str
) -> None:
    models = small_models(tmp_path)
    ref = models["candidate"].tensors["model.layers.1.mlp.up_proj.weight"]
    with ref.file.open("r+b") as stream:
        stream.seek(ref.offset)
        stream.write(b"\xff\x7f" * (ref.nbytes // 2))
    measurement = measured(falsifier, SmallCase(models), contract)
    json.dumps(measurement, allow_nan=False)
    assert verdict(contract, falsifier, measurement)["verdict"] == expected
