"""Every architecture as GGUF and back, against llama.cpp, its quantizer, and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from tests.helpers.llama_quantizer import quantize_with_llama_cpp
from tests.helpers.tiny_models import ARCHITECTURES, canonical_state, save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.recipe import SCHEMES
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.transforms import applied
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize

# NMSE of llama.cpp's logits, from weights in the format, against those of transformers from the exact
# ones. llama.cpp rounds keys, values and, in half formats, activations; the models are random and small.
SCHEME_BOUNDS = {"F32": 1e-5, "BF16": 2e-3, "Q8_0": 2e-2, "Q4_K_M": 0.6}
# Rows of whole blocks of 256.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
# Longer than the windows of gemma.
IDS = [int(i) for i in np.random.Generator(np.random.Philox(1)).integers(0, 96, 40)]


def wide(architecture: str, *, original_length: int = 48) -> dict[str, Any]:
    """Options of a wide model; phi3's lists fit 48 of the 64 channels of a head."""
    if architecture != "phi3":
        return WIDE
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1 + i / 50 for i in range(24)],
        "long_factor": [1.1 + i / 5 for i in range(24)],
    }
    lengths = {"original_max_position_embeddings": original_length, "max_position_embeddings": 512}
    return WIDE | {"rope_parameters": rope} | lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder an architecture, and beside each its GGUF files."""
    folder = tmp_path_factory.mktemp("architectures")
    for architecture in ARCHITECTURES:
        save_tiny_model(folder / architecture, architecture, **wide(architecture))
        for scheme in SCHEME_BOUNDS:
            teacher = open_artifact(folder / architecture)
            write_candidate(teacher, folder / f"{architecture}.{scheme}.gguf", scheme=scheme)
    return folder


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """``float64[n_tokens, vocabulary]`` of llama.cpp, whose context is 256 tokens."""
    engine = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    engine.eval(ids)
    return np.array(engine.scores[: len(ids)], dtype=np.float64)


def logits(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((found - expected) ** 2) / np.sum(expected**2))


def stored_values(ref: TensorRef) -> np.ndarray:
    """What a tensor stores, with its rows in canonical order."""
    order = ref.row_order()
    raw = ref.raw() if order is None else ref.raw()[order]
    return dequantize(raw, ref.dtype).reshape(ref.shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_from_each_file_what_transformers_does(folder: Path, architecture: str) -> None:
    """40 tokens, past the windows of gemma, which are on some layers; phi3 turns by its long list."""
    model = AutoModelForCausalLM.from_pretrained(folder / architecture, dtype=torch.float32)
    # transformers takes the long list where the text is longer than 48 tokens, llama.cpp where its context.
    ids = IDS + IDS[:20] if architecture == "phi3" else IDS
    expected = logits(model, ids)
    for scheme, bound in SCHEME_BOUNDS.items():
        path = folder / f"{architecture}.{scheme}.gguf"
        assert nmse(llama_logits(path, ids), expected) < bound, scheme


def test_llama_cpp_turns_short_texts_by_the_short_list(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "phi3", "phi3", **wide("phi3", original_length=256))
    write_candidate(open_artifact(tmp_path / "phi3"), tmp_path / "f32.gguf", scheme="F32")
    assert nmse(llama_logits(tmp_path / "f32.gguf", IDS), logits(model, IDS)) < SCHEME_BOUNDS["F32"]


@pytest.mark.slow
def test_llama_cpp_scales_the_scores_of_the_largest_gemma(tmp_path: Path) -> None:
    """It knows the model by its 46 layers, and divides by the root of hidden size over heads."""
    sizes = {"num_hidden_layers": 46, "layer_types": None, "head_dim": 32, "query_pre_attn_scalar": 16}
    sizes |= {"max_shard_size": "1GB", "intermediate_size": 64}
    model = save_tiny_model(tmp_path / "gemma2", "gemma2", **sizes)
    write_candidate(open_artifact(tmp_path / "gemma2"), tmp_path / "f32.gguf", scheme="F32")
    assert open_artifact(tmp_path / "f32.gguf").config == open_artifact(tmp_path / "gemma2").config
    assert nmse(llama_logits(tmp_path / "f32.gguf", IDS), logits(model, IDS)) < SCHEME_BOUNDS["F32"]
    write_teacher(open_artifact(tmp_path / "f32.gguf"), tmp_path / "back")
    assert open_artifact(tmp_path / "back").config == open_artifact(tmp_path / "gemma2").config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scheme", SCHEME_BOUNDS)
def test_bytes_are_those_of_llama_cpp(folder: Path, tmp_path: Path, architecture: str, scheme: str) -> None:
    ours = {t.name: t for t in gguf.GGUFReader(folder / f"{architecture}.{scheme}.gguf").tensors}
    theirs = quantize_with_llama_cpp(
        folder / f"{architecture}.F32.gguf", tmp_path / "theirs.gguf", SCHEMES[scheme].file_type
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_file_holds_the_model_bit_for_bit(folder: Path, architecture: str) -> None:
    """What the file says of its transforms is all that lies between it and the folder."""
    artifact, teacher = (
        open_artifact(folder / f"{architecture}.F32.gguf"),
        open_artifact(folder / architecture),
    )
    check_complete(artifact)
    model = AutoModelForCausalLM.from_pretrained(folder / architecture, dtype=torch.float32)
    expected = {name: values.detach().numpy() for name, values in canonical_state(model).items()}
    found = {name: ref for name, ref in artifact.tensors.items() if not name.startswith("rope_")}
    assert found.keys() == expected.keys() == teacher.tensors.keys()
    for name, ref in found.items():
        assert set(applied(ref)) <= {"rows-interleaved", "split", "offset+1"}
        values = expected[name] + np.float32(1) if "offset+1" in applied(ref) else expected[name]
        np.testing.assert_array_equal(stored_values(ref), values, err_msg=name)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "mistral"])
@pytest.mark.parametrize("scheme", SCHEME_BOUNDS)
def test_hyperparameters_come_back(folder: Path, architecture: str, scheme: str) -> None:
    found = open_artifact(folder / f"{architecture}.{scheme}.gguf").config
    assert found == open_artifact(folder / architecture).config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_made_from_the_file_is_the_file(folder: Path, tmp_path: Path, architecture: str) -> None:
    source = folder / f"{architecture}.F32.gguf"
    write_candidate(open_artifact(source), tmp_path / "again.gguf", scheme="F32")
    assert (tmp_path / "again.gguf").read_bytes() == source.read_bytes()


WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2},
    "gemma2": {"layer_types": ["full_attention"] * 3},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 3, "final_logit_softcapping": 9.0},
    "phi3": {"sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.mark.parametrize("architecture", WINDOWS)
def test_windows_come_back_from_gguf_and_from_the_folder_made_of_it(
    tmp_path: Path, architecture: str
) -> None:
    model = save_tiny_model(tmp_path / "source", architecture, **WINDOWS[architecture])
    source = open_artifact(tmp_path / "source")
    write_candidate(source, tmp_path / "f32.gguf", scheme="F32")
    write_teacher(open_artifact(tmp_path / "f32.gguf"), tmp_path / "back")
    assert open_artifact(tmp_path / "f32.gguf").config == source.config
    assert open_artifact(tmp_path / "back").config == source.config
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert np.array_equal(logits(back, IDS), logits(model, IDS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_computes_the_same_from_a_folder_made_of_the_file(
    folder: Path, tmp_path: Path, architecture: str
) -> None:
    """Norms that were stored plus one come back so that the sum is the same, bit for bit."""
    write_teacher(open_artifact(folder / f"{architecture}.F32.gguf"), tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(folder / architecture, dtype=torch.float32)
    back, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, values in before.items():
        if architecture.startswith("gemma") and "norm" in name:
            assert torch.equal(1 + after[name], 1 + values), name
            assert torch.allclose(after[name], values, rtol=0, atol=1e-7)
        else:
            assert torch.equal(after[name], values), name
    assert np.array_equal(logits(back, IDS), logits(model, IDS))


def test_the_text_model_of_one_that_sees_images_is_what_is_copied(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    save_tiny_model(tmp_path / "text", "gemma3_text")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text.config,
            vision_config=vision | {"image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        )
    )
    both.model.language_model.load_state_dict(text.model.state_dict())
    both.save_pretrained(tmp_path / "both")
    source = open_artifact(tmp_path / "both")
    assert any(name.startswith("vision_tower.") for name in source.unmapped)
    write_teacher(source, tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert np.array_equal(logits(copy, IDS), logits(text, IDS))
    write_candidate(source, tmp_path / "f32.gguf", scheme="F32")
    assert open_artifact(tmp_path / "f32.gguf").config == open_artifact(tmp_path / "text").config


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (
            "gemma2",
            {"query_pre_attn_scalar": 256},
            "query_pre_attn_scalar is 256, which GGUF cannot hold; llama",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar is 20, which GGUF cannot hold"),
        (
            "gemma2",
            {"attn_logit_softcapping": None},
            "attn_logit_softcapping is null, which GGUF cannot hold",
        ),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is null, which GGUF cannot"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings is false, which GGUF cannot hold"),
        (
            "gemma2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "RoPE scaling 'yarn' cannot be written as GGUF in gemma2",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 64,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                }
            },
            "RoPE scaling 'longrope' cannot be written as GGUF",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    tmp_path: Path, architecture: str, options: dict[str, Any], message: str
) -> None:
    save_tiny_model(tmp_path / "source", architecture, **options)
    with pytest.raises(InputError, match=message):
        write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
