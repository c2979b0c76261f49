"""Code completion: every Python block parses, and what leaves it undecided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict
from tests.falsifiers.small_case import SmallCase, small_models, speaking_models

from driftscope.artifacts.tokenizers.tokenizer import Tokenizer, load_tokenizer
from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import code_completion as module
from driftscope.forward.generate import Generation

GOOD = "Here it is:\n\n```python\ndef f(n):\n    return n\n```\n\nDone."
BAD = GOOD.replace("(n):", "(n)")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> SmallCase:
    return SmallCase(speaking_models(tmp_path_factory.mktemp("case"), max_position_embeddings=512))


def measured(evidence: Any, **changes: Any) -> dict[str, Any]:
    asked = load_contract(CONTRACTS / "chat.yaml").falsifier("code-completion").measurement
    parameters = {**asked.parameters, "resamples": 100, **changes}
    return module.measure(parameters, asked.regimes, [1, 2], evidence)


def judged(evidence: Any, **changes: Any) -> dict[str, Any]:
    return verdict("chat", "code-completion", measured(evidence, **changes))


def answers(
    monkeypatch: pytest.MonkeyPatch, case: SmallCase, teacher: str, candidate: str, ended: str = "stop-token"
) -> None:
    """Put answers into the models' mouths, as the tokens of their tokenizer."""
    tokenizer = load_tokenizer(case.models["teacher"])

    def generate(artifacts: Any, policy: Any, prompts: Any, **options: Any) -> list[Generation]:
        ids = tokenizer.encode({"teacher": teacher, "candidate": candidate}[policy.base.artifact])
        return [Generation(tuple(ids), tuple(1.0 for _ in ids), ended)]

    monkeypatch.setattr(module, "generate", generate)


def test_python_that_parses_is_supported(case: SmallCase, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, case, GOOD, GOOD + "\n" + GOOD)
    measurement = measured(case)
    assert measurement["regimes"]["candidate"]["blocks"] == 2
    assert measurement["regimes"]["teacher"]["text"] == GOOD
    document = verdict("chat", "code-completion", measurement)
    assert document["verdict"] == "supported"
    assert all(control["as_required"] for control in document["controls"].values())


@pytest.mark.parametrize(
    ("teacher", "candidate", "expected"),
    [
        (BAD, BAD, "falsified"),
        (GOOD + "\n" + BAD, BAD, "falsified"),
        (GOOD, BAD, "regime-dependent"),
        (GOOD, "I cannot.", "inconclusive"),
        (GOOD, "```\nplain\n```", "inconclusive"),
        (GOOD, GOOD + "\n```python\nprint(", "inconclusive"),
        (GOOD, BAD.removesuffix("```\n\nDone."), "inconclusive"),
        ("", "", "inadmissible"),
    ],
)
def test_other_answers_change_the_verdict(
    case: SmallCase, monkeypatch: pytest.MonkeyPatch, teacher: str, candidate: str, expected: str
) -> None:
    answers(monkeypatch, case, teacher, candidate)
    assert judged(case)["verdict"] == expected


def test_a_tokenizer_that_loses_line_breaks_changes_the_verdict(
    case: SmallCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, case, GOOD, GOOD)
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decode(self, ids).replace(":\n", ": \n:"))
    assert judged(case)["verdict"] == "falsified"


def test_logits_that_are_not_finite_are_no_answer(case: SmallCase, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, case, GOOD, GOOD, ended="not-finite")
    assert judged(case)["verdict"] == "inadmissible"


def test_a_model_without_a_template_is_not_run(tmp_path: Path) -> None:
    bare = SmallCase(speaking_models(tmp_path, chat_template=None))
    document = judged(bare)
    assert document["verdict"] == "not-run"
    assert "no chat template" in document["found"]
    assert judged(NOWHERE)["verdict"] == "not-run"
    assert judged(SmallCase(small_models(tmp_path / "mute")))["verdict"] == "not-run"


def test_the_model_itself_is_asked(case: SmallCase) -> None:
    """Random weights write no Python: what they do write is kept, and decides nothing."""
    measurement = measured(case, new_tokens=6)
    for regime in measurement["regimes"].values():
        assert regime["tokens"] <= 6
        assert regime["prompt_tokens"] > 20
        assert "parsed_share" not in regime
    assert verdict("chat", "code-completion", measurement)["verdict"] == "inconclusive"
    assert json.dumps(measurement, allow_nan=False) == json.dumps(measured(case, new_tokens=6))


def test_an_architecture_may_have_its_own_number_of_tokens(case: SmallCase) -> None:
    found = measured(case, new_tokens=2, new_tokens_by_architecture={"llama": 4, "qwen2": 256})
    assert max(regime["tokens"] for regime in found["regimes"].values()) in (3, 4)


def test_the_null_model_says_how_weak_parsing_is() -> None:
    null = module._null([1, 2], module.Resampling(100, 0.95))
    assert null["shuffled_lines"]["high"] < 0.1
    assert null["one_character_less"]["low"] > 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_tokens": 0}, "`new_tokens`"),
        ({"new_tokens_by_architecture": 3}, "`new_tokens_by_architecture`"),
        ({"roles": None}, "`roles`"),
        ({"roles": ["teacher"]}, "expected one of teacher"),
        ({"system": 3}, "`system`"),
    ],
)
def test_a_bad_parameter_is_named(case: SmallCase, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measured(case, **{"new_tokens": 1, **changes})
