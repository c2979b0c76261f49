"""Conversion between containers: bytes, values, tokenizers, and what llama.cpp makes of the result."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tests.helpers.tiny_models import save_tiny_model
from tests.helpers.tiny_vocabulary import SIZE, tiny_vocabulary
from transformers import AutoModelForCausalLM

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.convert import container_of, convert
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.folder_vocabulary import PRE_NAME_KEY
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer, tokenizer_from_vocabulary
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _values(artifact: Artifact, name: str) -> NDArray[np.float32]:
    ref = artifact.tensors[name]
    order = ref.row_order()
    raw = ref.raw() if order is None else ref.raw()[order]
    found = dequantize(np.ascontiguousarray(raw), ref.dtype).reshape(ref.shape)
    return found - np.float32(ref.value_offset)


def _assert_same(a: Artifact, b: Artifact, *, formats: bool = True) -> None:
    """Values bit for bit, formats of matrices, and hyperparameters."""
    check_complete(b)
    for name, ref in a.tensors.items():
        if formats and len(ref.shape) == 2:
            assert b.tensors[name].dtype == ref.dtype, name
        np.testing.assert_array_equal(_values(b, name), _values(a, name), err_msg=name)
    assert a.config == b.config


def _stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of each tensor of a folder, as the safetensors package reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                found[name] = (str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
)
def test_around_and_back(tmp_path: Path, architecture: str) -> None:
    save_tiny_model(tmp_path / "source", architecture, dtype=torch.bfloat16)
    source = open_artifact(tmp_path / "source")
    for name, before in (
        ("a.apr", "source"),
        ("b.gguf", "a.apr"),
        ("c.apr", "b.gguf"),
        ("d", "c.apr"),
        ("e", "b.gguf"),
    ):
        convert(open_artifact(tmp_path / before), tmp_path / name)
        _assert_same(source, open_artifact(tmp_path / name))
    # .apr keeps norms in BF16 as well; so all comes back, byte for byte and under the same names.
    convert(open_artifact(tmp_path / "a.apr"), tmp_path / "back")
    assert _stored(tmp_path / "back") == _stored(tmp_path / "source")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny_model(tmp_path / "source", "qwen2", dtype=dtype)
    convert(open_artifact(tmp_path / "source"), tmp_path / "a.apr")
    convert(open_artifact(tmp_path / "a.apr"), tmp_path / "back")
    assert _stored(tmp_path / "back") == _stored(tmp_path / "source")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "back"))
    assert after == before


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_k_quants_around_and_back(tmp_path: Path, architecture: str) -> None:
    """GGUF to .apr and back: each tensor's bytes, and each key."""
    save_tiny_model(tmp_path / "source", architecture, **WIDE)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme="Q4_K_M")
    convert(open_artifact(tmp_path / "a.gguf"), tmp_path / "b.apr")
    convert(open_artifact(tmp_path / "b.apr"), tmp_path / "c.gguf")
    before, after = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "c.gguf")
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    for x, y in zip(before.tensors, after.tensors, strict=True):
        assert x.tensor_type == y.tensor_type
        np.testing.assert_array_equal(x.data, y.data, err_msg=x.name)
    assert {name: field.contents() for name, field in before.fields.items()} == {
        name: field.contents() for name, field in after.fields.items()
    }


@pytest.mark.parametrize("scheme", ["Q4_0", "Q5_1", "Q8_0", "Q5_K_M", "Q6_K"])
def test_gguf_to_gguf_keeps_every_format(tmp_path: Path, scheme: str) -> None:
    save_tiny_model(tmp_path / "source", "llama", **WIDE)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme=scheme)
    convert(open_artifact(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, architecture: str) -> None:
    """Safetensors to .apr to GGUF, through llama.cpp: names, row order and hyperparameters are all used."""
    model = save_tiny_model(tmp_path / "source", architecture, **WIDE)
    convert(open_artifact(tmp_path / "source"), tmp_path / "a.apr")
    convert(open_artifact(tmp_path / "a.apr"), tmp_path / "b.gguf")
    ids = [3, 14, 15, 92, 65, 35, 89, 79]
    engine = llama_cpp.Llama(str(tmp_path / "b.gguf"), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    engine.eval(ids)
    found = np.array(engine.scores[: len(ids)], dtype=np.float64)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].double().numpy()
    assert np.sum((found - expected) ** 2) / np.sum(expected**2) < 1e-6


def test_transformers_loads_what_comes_from_an_apr_file_of_gguf(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "source", "llama")
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme="F32")
    convert(open_artifact(tmp_path / "a.gguf"), tmp_path / "b.apr")
    convert(open_artifact(tmp_path / "b.apr"), tmp_path / "c")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("scheme", ["Q4_K_M", "Q8_0"])
def test_quantized_into_safetensors(tmp_path: Path, scheme: str) -> None:
    save_tiny_model(tmp_path / "source", "llama", **WIDE)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme=scheme)
    candidate = open_artifact(tmp_path / "a.gguf")
    with pytest.raises(InputError, match="which a safetensors file cannot hold; --dequantize writes such"):
        convert(candidate, tmp_path / "b")
    with pytest.raises(InputError, match="--dequantize"):
        convert(candidate, tmp_path / "b", dtype="F32")
    convert(candidate, tmp_path / "b", dequantize=True)
    _assert_same(candidate, open_artifact(tmp_path / "b"), formats=False)
    with pytest.raises(InputError, match="has values that F16 cannot hold; use F32"):
        convert(candidate, tmp_path / "c", dequantize=True, dtype="F16")
    assert not (tmp_path / "c").exists()


def test_one_dtype_for_a_folder(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "llama", dtype=torch.bfloat16)
    convert(open_artifact(tmp_path / "source"), tmp_path / "a.gguf")
    convert(open_artifact(tmp_path / "a.gguf"), tmp_path / "mixed")
    assert {kind for kind, _ in _stored(tmp_path / "mixed").values()} == {"torch.bfloat16", "torch.float32"}
    convert(open_artifact(tmp_path / "a.gguf"), tmp_path / "back", dtype="BF16")
    assert _stored(tmp_path / "back") == _stored(tmp_path / "source")


@pytest.mark.parametrize("quantize", ["AprQ4", "AprQ8"])
def test_formats_of_apr_elsewhere(tmp_path: Path, quantize: str) -> None:
    """AprQ4 goes into GGUF as Q4_0 with the same values; AprQ8 goes nowhere but to F32."""
    save_tiny_model(tmp_path / "source", "llama", **WIDE)
    convert(open_artifact(tmp_path / "source"), tmp_path / "a.apr", quantize=quantize)
    quantized = open_artifact(tmp_path / "a.apr")
    convert(quantized, tmp_path / "b.apr")
    assert (tmp_path / "a.apr").read_bytes() == (tmp_path / "b.apr").read_bytes()
    if quantize == "AprQ4":
        convert(quantized, tmp_path / "c.gguf")
        convert(open_artifact(tmp_path / "c.gguf"), tmp_path / "d.apr")
        _assert_same(quantized, open_artifact(tmp_path / "d.apr"))
        kinds = {ref.stored_dtype for ref in open_artifact(tmp_path / "d.apr").tensors.values()}
        assert kinds == {"AprQ4", "F32"}
    else:
        with pytest.raises(InputError, match="is AprQ8, which a GGUF file cannot hold; --dequantize"):
            convert(quantized, tmp_path / "c.gguf")
        convert(quantized, tmp_path / "c.gguf", dequantize=True)
    _assert_same(quantized, open_artifact(tmp_path / "c.gguf"), formats=False)


def _with_tokenizer(folder: Path) -> None:
    """A model folder with a vocabulary, a template and special tokens."""
    vocabulary = tiny_vocabulary("qwen2", chat_template=TEMPLATE)
    save_tiny_model(folder, "qwen2", vocab_size=SIZE)
    tokenizer = tokenizer_from_vocabulary(vocabulary, "tiny")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    config = {**tokenizer.special, "chat_template": TEMPLATE, PRE_NAME_KEY: "qwen2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    _with_tokenizer(tmp_path / "source")
    text = "Hello, wörld! <|im_start|> 1234 <tool>\n"
    expected = load_tokenizer(open_artifact(tmp_path / "source"))
    for name, before in (("a.apr", "source"), ("b.gguf", "a.apr"), ("c.apr", "b.gguf"), ("d", "c.apr")):
        convert(open_artifact(tmp_path / before), tmp_path / name)
        found = load_tokenizer(open_artifact(tmp_path / name))
        assert found.encode(text) == expected.encode(text)
        assert found.chat_template == TEMPLATE
        assert found.special == expected.special
    # As the writers of the format name them.
    metadata = json.loads((tmp_path / "a.apr").read_bytes()[64:].split(b"\0")[0])
    assert metadata["chat_template"] == TEMPLATE
    assert len(metadata["tokenizer.vocabulary"]) == SIZE
    assert metadata["tokenizer.pre_type"] == "qwen2"
    assert metadata["tokenizer.bos_token_id"] == 1
    assert int.from_bytes((tmp_path / "a.apr").read_bytes()[6:8], "little") & 512
    convert(open_artifact(tmp_path / "source"), tmp_path / "none.apr", tokenizer=False)
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(open_artifact(tmp_path / "none.apr"))


def test_what_the_destination_says() -> None:
    assert container_of(Path("a.gguf"), None) == "gguf"
    assert container_of(Path("a.apr"), None) == "apr"
    assert container_of(Path("a"), None) == "safetensors"
    assert container_of(Path("a.bin"), "apr") == "apr"
    with pytest.raises(InputError, match="--to onnx: expected one of safetensors, gguf, apr"):
        container_of(Path("a"), "onnx")
    with pytest.raises(InputError, match=r"a\.safetensors: a safetensors model is a folder"):
        container_of(Path("a.safetensors"), None)


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "llama")
    source = open_artifact(tmp_path / "source")
    convert(source, tmp_path / "a.apr")
    apr = open_artifact(tmp_path / "a.apr")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("kept")
    for artifact, destination, match in (
        (apr, tmp_path / "a.apr", "is where .* is read from; expected another place"),
        (source, tmp_path / "source", "is where .* is read from"),
        (source, tmp_path, "is where .* is read from"),
        (apr, tmp_path / "taken", "exists; expected a new or an empty folder"),
        (apr, tmp_path / "taken" / "file", "exists; expected a new or an empty folder"),
    ):
        with pytest.raises(InputError, match=match):
            convert(artifact, destination)
    with pytest.raises(InputError, match="a folder; expected a file for gguf"):
        convert(apr, tmp_path / "taken", to="gguf")
    assert (tmp_path / "taken" / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"to": "gguf", "quantize": "AprQ4"},
            "--quantize and --no-tokenizer are for .apr files; gguf has neither",
        ),
        ({"to": "safetensors", "tokenizer": False}, "safetensors has neither"),
        ({"to": "apr", "dtype": "F16"}, "--dtype is for safetensors; apr has no such option"),
        (
            {"to": "safetensors", "dtype": "F64"},
            "dtype 'F64' is not supported; expected one of F32, F16, BF16",
        ),
    ],
)
def test_options_of_another_container(tmp_path: Path, options: dict[str, object], match: str) -> None:
    save_tiny_model(tmp_path / "source", "llama")
    with pytest.raises(InputError, match=match):
        convert(open_artifact(tmp_path / "source"), tmp_path / "new", **options)  # type: ignore[arg-type]
