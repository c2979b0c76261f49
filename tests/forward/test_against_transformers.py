"""The ``f32`` path against transformers on the same safetensors: logits and the output of every layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.forward.models import SWITCHES, write_model

from driftscope.artifacts.chat import render_chat
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.engines import transformers as engine
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy
from driftscope.forward.taps import Collector

TEXTS = (
    "What is 2+2?",
    "Hello, my name is",
    "def fibonacci(n):",
    "The lighthouse keeper climbed the stairs every evening to light the lamp, and every morning he came "
    "down to write the weather into a book that nobody read. On the third of March the lamp went out. "
    "He wrote: wind from the north-west, force 9; visibility poor; lamp out at 02:14, lit again at 02:31. "
    "A ship had passed in those seventeen minutes, and he did not know its name. Years later, a letter "
    "arrived, addressed to the man who keeps the light, with a drawing of a ship and the words: we saw it.",
)


def random_batch(lengths: tuple[int, ...], vocab_size: int, seed: int) -> TokenBatch:
    generator = np.random.Generator(np.random.Philox(seed))
    return TokenBatch.of([generator.integers(0, vocab_size, length).tolist() for length in lengths])


def nmse(found: np.ndarray, expected: np.ndarray, axis: int | None = None) -> np.ndarray:
    a, b = expected.astype(np.float64), found.astype(np.float64)
    result: np.ndarray = np.square(a - b).sum(axis=axis) / np.square(a).sum(axis=axis)
    return result


def check(folder: Path, artifact: Artifact, batch: TokenBatch) -> None:
    """Logits, their argmax, and the hidden states between the layers."""
    layers = artifact.config.num_layers
    names = ["embedding", *(f"layers.{layer}.post_ffn_residual" for layer in range(layers - 1)), "final_norm"]
    tap = Collector(lambda name: name in names)
    found = ForwardPass({"teacher": artifact}, Policy.uniform("teacher")).run(batch, tap)
    model = engine.load(folder)
    for tokens in batch.slices:
        ids = torch.tensor(batch.ids[tokens].astype(np.int64))[None]
        with torch.inference_mode():
            output = model(ids, use_cache=False, output_hidden_states=True)
        expected = output.logits[0].numpy()
        assert nmse(found[tokens], expected, axis=1).max() <= 1e-9
        assert np.array_equal(found[tokens].argmax(axis=1), expected.argmax(axis=1))
        for name, hidden in zip(names, output.hidden_states, strict=True):
            assert nmse(tap.arrays[name][tokens], hidden[0].numpy()) <= 1e-10, name


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_tiny_model(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    artifact = open_artifact(folder)
    check(folder, artifact, random_batch((1, 150, 40), artifact.config.vocab_size, seed=1))


@pytest.mark.model
@pytest.mark.slow
def test_default_model(default_gguf: Path, tmp_path: Path) -> None:
    source = open_artifact(default_gguf)
    write_teacher(source, tmp_path / "teacher")
    teacher = open_artifact(tmp_path / "teacher")
    tokenizer = load_tokenizer(teacher)
    chat = render_chat(
        source.metadata["tokenizer.chat_template"],
        [{"role": "user", "content": "Write a Python function to compute the nth Fibonacci number."}],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    batch = TokenBatch.of([tokenizer.encode(text) for text in (*TEXTS, chat)])
    assert batch.longest > 100
    check(tmp_path / "teacher", teacher, batch)


def test_the_engine_gives_its_own_logits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2")
    artifact = open_artifact(folder)
    batch = random_batch((5, 9), artifact.config.vocab_size, seed=2)
    found = ForwardPass({"teacher": artifact}, Policy.uniform("teacher")).run(batch)
    assert nmse(found, engine.logits(folder, batch)) <= 1e-11
