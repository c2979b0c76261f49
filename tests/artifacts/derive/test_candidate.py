"""The quantized copy, against llama.cpp: its quantizer's bytes, and what it makes of the file."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from tests.helpers.llama_quantizer import quantize_with_llama_cpp
from tests.helpers.tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.recipe import SCHEMES
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.errors import InputError

# Rows that fit blocks of 256, and rows of which only some do.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
NARROW = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48, "num_hidden_layers": 3}


def _tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of two architectures and two widths."""
    folder = tmp_path_factory.mktemp("candidates")
    for architecture in ("llama", "qwen2"):
        save_tiny_model(folder / f"{architecture}-wide", architecture, **WIDE)
        save_tiny_model(folder / f"{architecture}-narrow", architecture, tie_word_embeddings=True, **NARROW)
    return folder


@pytest.mark.parametrize("model", ["llama-wide", "llama-narrow", "qwen2-wide", "qwen2-narrow"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_llama_cpp(folder: Path, tmp_path: Path, model: str, scheme: str) -> None:
    teacher = open_artifact(folder / model)
    write_candidate(teacher, tmp_path / "ours.gguf", scheme=scheme, threads=2)
    write_candidate(teacher, tmp_path / "f32.gguf", scheme="F32")
    theirs = quantize_with_llama_cpp(
        tmp_path / "f32.gguf", tmp_path / "theirs.gguf", SCHEMES[scheme].file_type
    )
    ours = _tensors(tmp_path / "ours.gguf")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)
    keys = {reader: gguf.GGUFReader(tmp_path / f"{reader}.gguf").fields for reader in ("ours", "theirs")}
    values = {
        reader: {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
        for reader, fields in keys.items()
    }
    assert values["ours"] == values["theirs"]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_values_and_hyperparameters_come_back(tmp_path: Path, architecture: str) -> None:
    model = save_tiny_model(tmp_path / "source", architecture)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "f32.gguf", scheme="F32")
    write_teacher(open_artifact(tmp_path / "f32.gguf"), tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    before, after = open_artifact(tmp_path / "source").config, open_artifact(tmp_path / "back").config
    assert after.rms_norm_eps == np.float32(before.rms_norm_eps)
    for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
        assert getattr(after, field) == getattr(before, field)
    for field in ("vocab_size", "context_length", "rope_theta", "tie_word_embeddings", "attention_bias"):
        assert getattr(after, field) == getattr(before, field)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, architecture: str) -> None:
    """The F32 copy through llama.cpp: the row order, the names and the hyperparameters are all used."""
    model = save_tiny_model(tmp_path / "source", architecture, **WIDE)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "f32.gguf", scheme="F32")
    ids = [3, 14, 15, 92, 65, 35, 89, 79]
    engine = llama_cpp.Llama(
        str(tmp_path / "f32.gguf"), n_ctx=32, n_threads=1, logits_all=True, verbose=False
    )
    engine.eval(ids)
    found = np.array(engine.scores[: len(ids)], dtype=np.float64)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].double().numpy()
    assert np.sum((found - expected) ** 2) / np.sum(expected**2) < 1e-6


def test_same_teacher_same_bytes_whatever_the_threads(folder: Path, tmp_path: Path) -> None:
    teacher = open_artifact(folder / "llama-wide")
    for threads in (1, 2, 3):
        write_candidate(teacher, tmp_path / f"{threads}.gguf", threads=threads)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_progress_ends_with_everything(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_candidate(
        open_artifact(folder / "qwen2-narrow"),
        tmp_path / "a.gguf",
        scheme="Q8_0",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    model = save_tiny_model(tmp_path / "source", "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = value
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    (tmp_path / "a.gguf").write_text("earlier")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "source"]


def test_an_overflow_of_f16_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "source", "llama")
    with torch.no_grad():
        model.lm_head.weight[1, 1] = 1e6
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    with pytest.raises(InputError, match=r"lm_head\.weight holds values beyond 65504"):
        write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme="F16")


def test_an_unknown_scheme_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scheme 'Q3_K' is not supported"):
        write_candidate(open_artifact(folder / "llama-wide"), tmp_path / "a.gguf", scheme="Q3_K")


@pytest.fixture(scope="module")
def default_teacher(default_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default") / "teacher"
    write_teacher(open_artifact(default_gguf), folder)
    return folder


@pytest.mark.model
@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_0"])
def test_llama_cpp_answers_from_the_default_model(default_teacher: Path, tmp_path: Path, scheme: str) -> None:
    write_candidate(open_artifact(default_teacher), tmp_path / "a.gguf", scheme=scheme, threads=2)
    _counts_on(tmp_path / "a.gguf")


def _counts_on(path: Path) -> None:
    """llama.cpp, from our token ids and from its own, continues a sequence that any sane model does."""
    text = "1, 2, 3, 4, 5, 6, 7,"
    engine = llama_cpp.Llama(str(path), n_ctx=64, n_threads=2, verbose=False)
    ids = load_tokenizer(open_artifact(path)).encode(text)
    assert engine.tokenize(text.encode(), add_bos=False, special=True) == ids
    answer = engine.create_completion(ids, max_tokens=5, temperature=0)["choices"][0]["text"]
    assert answer == " 8, 9"


@pytest.mark.model
def test_the_tokenizer_comes_back(default_gguf: Path, default_teacher: Path, tmp_path: Path) -> None:
    write_candidate(open_artifact(default_teacher), tmp_path / "a.gguf", scheme="Q8_0")
    before = open_artifact(default_gguf).metadata
    after = open_artifact(tmp_path / "a.gguf").metadata
    # An attribute of SentencePiece vocabularies, which byte-level ones do not have.
    ignored = {"tokenizer.ggml.add_space_prefix"}
    keys = {key for key in before if key.startswith("tokenizer.")} - ignored
    assert len(keys) == 11
    for key in sorted(keys):
        assert np.array_equal(after[key], before[key]), key


@pytest.mark.model
@pytest.mark.slow
def test_the_default_candidate_is_llama_cpps_own_file(default_teacher: Path, tmp_path: Path) -> None:
    teacher = open_artifact(default_teacher)
    write_candidate(teacher, tmp_path / "ours.gguf", scheme="Q4_K_M", threads=2)
    _counts_on(tmp_path / "ours.gguf")
    write_candidate(teacher, tmp_path / "f32.gguf", scheme="F32")
    theirs = quantize_with_llama_cpp(
        tmp_path / "f32.gguf", tmp_path / "theirs.gguf", SCHEMES["Q4_K_M"].file_type
    )
    ours = _tensors(tmp_path / "ours.gguf")
    assert {tensor.tensor_type.name for tensor in ours.values()} == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)
