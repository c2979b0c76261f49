"""The exact safetensors copy, against the source's values and against transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.helpers.tiny_gguf import HEADS, KV_HEADS, tiny_tensors, write_gguf
from tests.helpers.tiny_gguf import add_hyperparameters as add_plain
from tests.helpers.tiny_models import ARCHITECTURES, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from driftscope.artifacts.derive import rows
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.errors import InputError

Q4_1, Q8_0, F16, BF16 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F16", "BF16"))


def _no_vocabulary(writer: gguf.GGUFWriter) -> None:
    add_plain(writer, vocabulary=False)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    return model


def _deinterleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a GGUF q or k projection in Hugging Face's order, by their definition."""
    half = values.shape[0] // heads // 2
    out = np.empty_like(values)
    for head in range(heads):
        for j in range(half):
            for s in range(2):
                out[head * 2 * half + s * half + j] = values[head * 2 * half + 2 * j + s]
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_values_are_those_that_the_gguf_package_dequantizes(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    tensors = tiny_tensors(architecture, tied=tied)
    formats = {"token_embd.weight": Q8_0, "blk.0.attn_q.weight": Q4_1, "blk.1.ffn_up.weight": F16}
    source = write_gguf(tmp_path / "a.gguf", architecture, tensors, formats=formats, keys=_no_vocabulary)
    write_teacher(open_artifact(source), tmp_path / "teacher", max_shard_bytes=30_000)
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 2
    state = dict(_load(tmp_path / "teacher").named_parameters())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    assert len(state) == len(tensors)
    names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "ffn_up": "up_proj"}
    for key, name in names.items():
        for layer in range(2):
            tensor = stored[f"blk.{layer}.{key}.weight"]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if architecture == "llama" and key in ("attn_q", "attn_k"):
                expected = _deinterleaved(expected, HEADS if key == "attn_q" else KV_HEADS)
            part = "mlp" if key == "ffn_up" else "self_attn"
            found = state[f"model.layers.{layer}.{part}.{name}.weight"].detach().numpy()
            np.testing.assert_array_equal(found, expected)
    embedding = stored["token_embd.weight"]
    np.testing.assert_array_equal(
        state["model.embed_tokens.weight"].detach().numpy(),
        gguf.quants.dequantize(embedding.data, embedding.tensor_type),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_safetensors_model_is_copied_value_by_value(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model = save_tiny_model(tmp_path / "source", architecture, dtype=dtype)
    write_teacher(open_artifact(tmp_path / "source"), tmp_path / "teacher", max_shard_bytes=50_000)
    copy = _load(tmp_path / "teacher").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(copy[name], value.to(torch.float32)), name
    assert open_artifact(tmp_path / "teacher").config == open_artifact(tmp_path / "source").config


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_half_formats_where_they_are_exact(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    model = save_tiny_model(tmp_path / "source", "llama", dtype=torch_dtype)
    write_teacher(open_artifact(tmp_path / "source"), tmp_path / "teacher", dtype=dtype)
    copy = _load(tmp_path / "teacher", torch_dtype).state_dict()
    assert all(torch.equal(copy[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_formats_refuse_what_they_cannot_hold(tmp_path: Path, dtype: str) -> None:
    save_tiny_model(tmp_path / "source", "llama")
    with pytest.raises(InputError, match=f"has values that {dtype} cannot hold; use F32"):
        write_teacher(open_artifact(tmp_path / "source"), tmp_path / "teacher", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_same_source_same_bytes_whatever_the_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "a.gguf", "llama", tiny_tensors("llama"), keys=_no_vocabulary)
    write_teacher(open_artifact(source), tmp_path / "one")
    monkeypatch.setattr(rows.slabs, "__defaults__", (100,))
    write_teacher(open_artifact(source), tmp_path / "two")
    assert _digests(tmp_path / "one") == _digests(tmp_path / "two")


def test_the_index_names_every_tensor(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", "qwen3", tiny_tensors("qwen3"), keys=_no_vocabulary)
    write_teacher(open_artifact(source), tmp_path / "teacher", max_shard_bytes=1)
    index = json.loads((tmp_path / "teacher" / "model.safetensors.index.json").read_text())
    tensors = open_artifact(source).tensors
    assert index["weight_map"].keys() == tensors.keys()
    assert len(set(index["weight_map"].values())) == len(tensors)
    assert index["metadata"]["total_size"] == sum(4 * tensor.n_elements for tensor in tensors.values())


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", "llama", tiny_tensors("llama"), keys=_no_vocabulary)
    calls: list[tuple[int, int]] = []
    write_teacher(
        open_artifact(source), tmp_path / "t", progress=lambda done, total: calls.append((done, total))
    )
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


def test_a_tensor_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors("llama") | {"blk.0.ffn_gate_exps.weight": np.zeros((4, 64), np.float32)}
    source = write_gguf(tmp_path / "a.gguf", "llama", tensors, keys=_no_vocabulary)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_gate_exps\.weight would be missing from a copy"):
        write_teacher(open_artifact(source), tmp_path / "teacher")


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors("llama")
    del tensors["blk.1.attn_v.weight"]
    source = write_gguf(tmp_path / "a.gguf", "llama", tensors, keys=_no_vocabulary)
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight is missing"):
        write_teacher(open_artifact(source), tmp_path / "teacher")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "Q8_0"}, "dtype 'Q8_0' is not supported"), ({"max_shard_bytes": 0}, "expected a positive")],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    source = write_gguf(tmp_path / "a.gguf", "llama", tiny_tensors("llama"), keys=_no_vocabulary)
    with pytest.raises(InputError, match=message):
        write_teacher(open_artifact(source), tmp_path / "teacher", **options)  # type: ignore[arg-type]


@pytest.mark.model
def test_transformers_runs_the_default_model(default_gguf: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    source = open_artifact(default_gguf)
    write_teacher(source, tmp_path / "teacher")
    model = _load(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == load_tokenizer(source).encode(text)
    assert ids == load_tokenizer(open_artifact(tmp_path / "teacher")).encode(text)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
