"""Prompt sensitivity: all pairs, and models that do not read their prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict
from tests.falsifiers.small_case import SmallCase, small_models, speaking_models

from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import prompt_sensitivity as module
from driftscope.falsifiers.sampling import Resampling
from driftscope.forward.generate import CachedPass, Generation

NAME = "prompt-sensitivity"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> SmallCase:
    return SmallCase(speaking_models(tmp_path_factory.mktemp("case")))


def measured(evidence: Any, **changes: Any) -> dict[str, Any]:
    asked = load_contract(CONTRACTS / f"{NAME}.yaml").falsifier(NAME).measurement
    parameters = {**asked.parameters, "resamples": 100, "new_tokens": 12, **changes}
    return module.measure(parameters, asked.regimes, [1, 2], evidence)


def judged(evidence: Any) -> dict[str, Any]:
    return verdict(NAME, NAME, measured(evidence))


def test_a_model_that_reads_its_prompt(case: SmallCase) -> None:
    measurement = measured(case)
    document = verdict(NAME, NAME, measurement)
    assert document["verdict"] == "supported"
    assert all(control["as_required"] for control in document["controls"].values())
    assert measurement["controls"]["same-prompt"]["identical_pairs"] == 1
    assert measurement["controls"]["cut-prompt"]["identical_pairs"] == 3
    texts = [item["text"] for item in measurement["regimes"]["teacher"]["continuations"]]
    assert len(set(texts)) == 3


def test_two_of_three_distinct_is_one_pair_too_few() -> None:
    metrics = module._metrics([[1, 2], [1, 2], [3, 2]], Resampling(100, 0.95))
    assert (metrics["distinct"], metrics["pairs"], metrics["identical_pairs"]) == (2, 3, 1)
    assert metrics["smallest_differing"] == 0.0
    assert metrics["differing"]["value"] == pytest.approx(1 / 3)


def test_a_model_that_does_not_read_its_prompt_changes_the_verdict(
    case: SmallCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step keeps the first token of each prompt only."""
    feed = CachedPass.feed

    def forgetful(self: CachedPass, tokens: Any) -> Any:
        return feed(self, {slot: [1] if self.lengths[slot] == 0 else new for slot, new in tokens.items()})

    monkeypatch.setattr(CachedPass, "feed", forgetful)
    assert judged(case)["verdict"] == "falsified"


def test_a_path_that_forgets_is_regime_dependent(case: SmallCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of the candidate's continuations is the same."""
    original = module._Model.generate

    def broken(self: Any, path: str, prompts: Any, limit: int) -> list[Generation]:
        found = original(self, path, prompts, limit)
        return [found[0], found[0], *found[2:]] if path == "candidate.int8-dot" else found

    monkeypatch.setattr(module._Model, "generate", broken)
    document = judged(case)
    assert document["verdict"] == "regime-dependent"
    assert "only in teacher" in document["reason"]


def test_logits_that_are_not_finite_decide_nothing(case: SmallCase, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._Model.generate

    def broken(self: Any, path: str, prompts: Any, limit: int) -> list[Generation]:
        if path == "candidate.int8-dot":
            return [Generation((), (), "not-finite") for _ in prompts]
        return original(self, path, prompts, limit)

    monkeypatch.setattr(module._Model, "generate", broken)
    assert judged(case)["verdict"] == "inconclusive"


def test_a_continuation_that_ends_early_differs_behind_its_end() -> None:
    assert module._differing([1, 2], [1, 2, 3, 4]) == 0.5
    assert module._differing([], []) == 0.0
    assert module._differing([], [1]) == 1.0


def test_without_a_model_it_is_not_run() -> None:
    assert judged(NOWHERE)["verdict"] == "not-run"


def test_the_same_evidence_gives_the_same_bytes(case: SmallCase) -> None:
    one, other = (json.dumps(measured(case), allow_nan=False) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "`prompts`"),
        ({"prompts": ["one"]}, "at least two"),
        ({"new_tokens": 0}, "`new_tokens`"),
        ({"roles": ["teacher"]}, "one of the models in `roles`"),
    ],
)
def test_a_bad_parameter_is_named(case: SmallCase, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measured(case, **changes)


def test_a_model_without_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    document = judged(SmallCase(small_models(tmp_path)))
    assert document["verdict"] == "not-run"
    assert "no tokenizer" in document["found"]
