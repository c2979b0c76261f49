"""Where an answer ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.stop_tokens import stop_tokens
from driftscope.artifacts.tokenizer import load_tokenizer
from driftscope.errors import InputError

pytestmark = pytest.mark.model


def test_the_default_model_ends_at_im_end_in_either_container(default_gguf: Path, tmp_path: Path) -> None:
    source = open_artifact(default_gguf)
    assert stop_tokens(source, load_tokenizer(source)) == {2}
    write_teacher(source, tmp_path / "teacher")
    teacher = open_artifact(tmp_path / "teacher")
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.decode([2]) == "<|im_end|>"
    assert stop_tokens(teacher, tokenizer) == {2}

    listed = tmp_path / "teacher" / "generation_config.json"
    listed.write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert stop_tokens(teacher, tokenizer) == {0, 2}
    for wrong, message in (("two", "expected a token id"), (49152, "outside of the vocabulary")):
        listed.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(InputError, match=message):
            stop_tokens(teacher, tokenizer)
