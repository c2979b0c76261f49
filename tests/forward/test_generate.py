"""Greedy generation against recomputing the whole prefix, and against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.forward.models import SWITCHES, write_model

from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.engines import transformers as engine
from driftscope.errors import InputError
from driftscope.forward import generate as module
from driftscope.forward.batch import TokenBatch
from driftscope.forward.generate import CachedPass, Continuation, generate
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9], [7], [2, 7, 1, 8, 2])
TEACHER = Policy.uniform("teacher")


@pytest.fixture(scope="module", params=sorted(SWITCHES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", request.param)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(write_model(tmp_path_factory.mktemp("qwen2") / "model", "qwen2"))


def recomputed(artifact: Artifact, prompt: Sequence[int], policy: Policy, limit: int) -> list[int]:
    """Greedy tokens with the whole sequence run again for each."""
    ids = list(prompt)
    for _ in range(limit):
        logits = ForwardPass({"teacher": artifact}, policy).run(TokenBatch.of([ids]))
        ids.append(int(np.argmax(logits[-1])))
    return ids[len(prompt) :]


def test_every_step_has_the_bits_of_the_whole_prefix(folder: Path) -> None:
    artifact = open_artifact(folder)
    whole = [np.arange(7, 30).tolist(), [5, 4, 3, 2, 1, 0, 9, 8]]
    expected = [ForwardPass({"teacher": artifact}, TEACHER).run(TokenBatch.of([ids])) for ids in whole]
    model = CachedPass({"teacher": artifact}, TEACHER, sequences=2, capacity=23)
    cuts = ([(0, 4), (0, 1)], [(4, 5), (1, 2)], [(5, 15), (2, 8)], [(15, 16)], [(16, 23)])
    for step in cuts:
        logits = model.feed({s: whole[s][a:b] for s, (a, b) in enumerate(step)})
        for s, (_, end) in enumerate(step):
            assert np.array_equal(logits[s], expected[s][end - 1])


def test_a_sequence_that_outgrows_its_training_turns_by_other_angles(tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path / "model", "phi3-longrope"))
    whole = [np.arange(100, 150).tolist(), np.arange(200, 230).tolist()]
    model = CachedPass({"teacher": artifact}, TEACHER, sequences=2, capacity=50)
    for begin, end in ((0, 20), (20, 31), (31, 32), (32, 33), (33, 34), (34, 50)):
        logits = model.feed({s: ids[begin:end] for s, ids in enumerate(whole) if ids[begin:end]})
        for s, found in enumerate(logits):
            ids = whole[s][:end]
            expected = ForwardPass({"teacher": artifact}, TEACHER).run(TokenBatch.of([ids]))[-1]
            assert np.array_equal(found, expected)
        assert model.lengths == [end, min(end, 30)]


@pytest.mark.parametrize("path", ["f32", "int8-dot"])
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_cached_tokens_are_the_recomputed_ones(qwen2: Artifact, path: str, kv_type: str) -> None:
    policy = dataclasses.replace(Policy.uniform("teacher", path), kv_type=kv_type)
    found = generate({"teacher": qwen2}, policy, PROMPTS, limit=9)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        assert list(generation.tokens) == recomputed(qwen2, prompt, policy, 9)
        assert generation.ended == "limit"
        assert len(generation.margins) == 9
        assert min(generation.margins) >= 0.0


def test_transformers_generates_the_same(folder: Path) -> None:
    model = engine.load(folder)
    model.generation_config.eos_token_id = None
    found = generate({"teacher": open_artifact(folder)}, TEACHER, PROMPTS, limit=24)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
            )
        assert list(generation.tokens) == whole[0, len(prompt) :].tolist()


def test_prompts_side_by_side_and_threads_change_nothing(qwen2: Artifact) -> None:
    together = generate({"teacher": qwen2}, TEACHER, PROMPTS, limit=6, threads=3)
    alone = [generate({"teacher": qwen2}, TEACHER, [prompt], limit=6)[0] for prompt in PROMPTS]
    assert together == alone


def test_a_stop_token_ends_one_prompt_and_is_not_kept(qwen2: Artifact) -> None:
    free = generate({"teacher": qwen2}, TEACHER, PROMPTS, limit=8)
    stop = free[0].tokens[3]
    stopped = generate({"teacher": qwen2}, TEACHER, PROMPTS, limit=8, stop={stop})
    for whole, part in zip(free, stopped, strict=True):
        ends = whole.tokens.index(stop) if stop in whole.tokens else 8
        assert part.tokens == whole.tokens[:ends]
        assert part.ended == ("stop-token" if ends < 8 else "limit")
        assert part.margins == whole.margins[: ends + 1]


def test_a_full_context_ends_a_prompt(qwen2: Artifact) -> None:
    short = dataclasses.replace(qwen2, config=dataclasses.replace(qwen2.config, context_length=14))
    found = generate({"teacher": short}, TEACHER, PROMPTS, limit=8)
    assert [generation.ended for generation in found] == ["context", "limit", "limit"]
    # The token behind the last that fits is still known.
    assert len(found[0].tokens) == 14 - len(PROMPTS[0]) + 1
    assert found[0].tokens == generate({"teacher": qwen2}, TEACHER, PROMPTS[:1], limit=2)[0].tokens


def test_ties_go_to_the_lowest_token() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0], dtype=np.float32)
    assert module._choose(logits) == (1, 0.0)
    assert module._choose(np.array([-5.0], dtype=np.float32)) == (0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_it(
    qwen2: Artifact, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    head = CachedPass.head

    def broken(self: CachedPass, hidden: np.ndarray) -> np.ndarray:
        logits = head(self, hidden)
        if len(logits) == 3 and self.lengths[1] == 3:
            logits[1, 5] = value
        return logits

    monkeypatch.setattr(CachedPass, "head", broken)
    found = generate({"teacher": qwen2}, TEACHER, PROMPTS, limit=4)
    assert [generation.ended for generation in found] == ["limit", "not-finite", "limit"]
    assert len(found[1].tokens) == 2


@pytest.mark.parametrize(
    ("prompts", "limit", "message"),
    [
        ([[1]], 0, "at least 1 new token"),
        ([[1], []], 1, "sequence 1 is empty"),
        ([[320]], 1, "outside of the vocabulary"),
        ([[1] * 257], 1, "longer than the model's context"),
    ],
)
def test_what_cannot_be_continued_is_said(
    qwen2: Artifact, prompts: list[list[int]], limit: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate({"teacher": qwen2}, TEACHER, prompts, limit=limit)


def test_no_prompt_is_nothing_to_do(qwen2: Artifact) -> None:
    assert generate({"teacher": qwen2}, TEACHER, [], limit=1) == []


def test_a_continuation_knows_its_positions() -> None:
    plain = TokenBatch.of([[1, 2], [3]])
    batch = Continuation(plain.ids, plain.starts, (1, 0), (5, 9))
    assert batch.positions.tolist() == [5, 6, 9]
    assert batch.longest == 10


@pytest.mark.model
@pytest.mark.slow
def test_default_model_against_transformers(default_gguf: Path, tmp_path: Path) -> None:
    source = open_artifact(default_gguf)
    write_teacher(source, tmp_path / "teacher")
    teacher = open_artifact(tmp_path / "teacher")
    ids = load_tokenizer(teacher).encode("What is 2+2? The answer is ")
    model = engine.load(tmp_path / "teacher")
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        tensor = torch.tensor([ids])
        whole = model.generate(
            tensor, attention_mask=torch.ones_like(tensor), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
    found = generate({"teacher": teacher}, TEACHER, [ids], limit=16)[0]
    assert list(found.tokens) == whole[0, len(ids) :].tolist()
    # The source stores rows of q and k in another order; the weights are the same values.
    assert generate({"teacher": source}, TEACHER, [ids], limit=4)[0].tokens == found.tokens[:4]
