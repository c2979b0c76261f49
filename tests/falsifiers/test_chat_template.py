"""Chat templates: ChatML to the byte, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict
from tests.falsifiers.small_case import CHATML, SmallCase, small_models, speaking_models

from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import Tokenizer, load_tokenizer
from driftscope.contracts.loading import load_contract
from driftscope.falsifiers import chat_template as module


def case(folder: Path, template: str | None = CHATML) -> SmallCase:
    return SmallCase(speaking_models(folder, chat_template=template))


def measured(evidence: Any) -> dict[str, Any]:
    asked = load_contract(CONTRACTS / "chat.yaml").falsifier("chat-template").measurement
    parameters = {**asked.parameters, "resamples": 100, "conversations": 4}
    return module.measure(parameters, asked.regimes, [1, 2], evidence)


def judged(evidence: Any) -> dict[str, Any]:
    return verdict("chat", "chat-template", measured(evidence))


def test_chatml_is_supported(tmp_path: Path) -> None:
    measurement = measured(case(tmp_path))
    document = verdict("chat", "chat-template", measurement)
    assert document["verdict"] == "supported"
    assert all(control["as_required"] for control in document["controls"].values())
    assert measurement["without_system"] == ""
    # A marker in a message is read as a marker: the format has no way to quote.
    assert measurement["injected_markers"] == 2
    assert measurement["regimes"]["one-turn"]["first_difference"] is None


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(CHATML.replace("m.content", "m.content | trim"), id="trims"),
        pytest.param(CHATML.replace("assistant\n", "assistant"), id="no line break at the end"),
        pytest.param(CHATML.replace("<|im_end|>", "<|endoftext|>"), id="another end"),
        pytest.param(CHATML.replace("m.role", "m.role | upper"), id="roles in capitals"),
    ],
)
def test_another_template_changes_the_verdict(tmp_path: Path, template: str) -> None:
    measurement = measured(case(tmp_path, template))
    assert verdict("chat", "chat-template", measurement)["verdict"] == "falsified"
    assert measurement["regimes"]["several-turns"]["first_difference"]["byte"] > 0


def test_a_template_that_breaks_behind_the_first_turn_is_regime_dependent(tmp_path: Path) -> None:
    template = CHATML.replace("{% for m", "{% if messages | length > 2 %}x{% endif %}{% for m")
    document = judged(case(tmp_path, template))
    assert document["verdict"] == "regime-dependent"
    assert "only in one-turn" in document["reason"]


def test_markers_that_are_read_as_text_change_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, **options: encode(self, text, parse_special=False)
    )
    # Without the markers no template passes, so that nothing is decided.
    assert judged(case(tmp_path))["verdict"] in ("vacuous", "inconclusive")


def test_a_model_without_a_template_is_not_run(tmp_path: Path) -> None:
    assert judged(case(tmp_path, None))["verdict"] == "not-run"
    assert judged(NOWHERE)["verdict"] == "not-run"
    assert judged(SmallCase(small_models(tmp_path / "mute")))["verdict"] == "not-run"


def test_the_same_evidence_gives_the_same_bytes(tmp_path: Path) -> None:
    evidence = case(tmp_path)
    one, other = (json.dumps(measured(evidence), allow_nan=False) for _ in range(2))
    assert one == other


@pytest.mark.model
def test_transformers_renders_the_default_model_s_template_alike(default_gguf: Path) -> None:
    tokenizer = load_tokenizer(open_artifact(default_gguf))
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        bos_token=tokenizer.special["bos_token"],
        eos_token=tokenizer.special["eos_token"],
    )
    messages = [
        {"role": "system", "content": "You are a helpful coding assistant."},
        {"role": "user", "content": "Write a Python function to compute the nth Fibonacci number."},
    ]
    text = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == module.chatml(messages)
    assert tokenizer.encode(text) == list(other(text, add_special_tokens=False)["input_ids"])
