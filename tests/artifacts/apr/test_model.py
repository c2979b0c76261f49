"""Whole models in .apr files that were packed by hand, as artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.helpers import apr_bytes
from tests.helpers.apr_bytes import Tensors, f32
from tests.helpers.tiny_gguf import (
    CONTEXT,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    tiny_tensors,
    write_gguf,
)

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import from_gguf
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize

METADATA: dict[str, Any] = {
    "model_type": "Auto",
    "architecture": "llama",
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "intermediate_size": INNER,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rope_type": 2,
    "rms_norm_eps": 1e-5,
    "head_dim": HEAD_DIM,
    "license": None,
}


def _hf_names(architecture: str, **options: Any) -> dict[str, NDArray[np.float32]]:
    values = tiny_tensors(architecture, **options)
    return {str(from_gguf(name, architecture)): value for name, value in values.items()}


def _model(
    folder: Path,
    tensors: Mapping[str, NDArray[np.float32]] | Tensors,
    *,
    without: str = "",
    **metadata: Any,
) -> Path:
    path = folder / "m.apr"
    stored = {name: f32(value) if isinstance(value, np.ndarray) else value for name, value in tensors.items()}
    keys = {key: value for key, value in (METADATA | metadata).items() if key not in without.split()}
    path.write_bytes(apr_bytes.apr_bytes(keys, stored))
    return path


def _values(artifact: Artifact, name: str) -> NDArray[np.float32]:
    ref = artifact.tensors[name]
    order = ref.row_order()
    raw = ref.raw() if order is None else ref.raw()[order]
    return dequantize(np.ascontiguousarray(raw), ref.dtype).reshape(ref.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_huggingface_names(tmp_path: Path, architecture: str) -> None:
    tensors = _hf_names(architecture)
    artifact = open_artifact(_model(tmp_path, tensors, architecture=architecture))
    check_complete(artifact)
    assert artifact.container == "apr"
    assert artifact.files == (tmp_path / "m.apr",)
    assert artifact.unmapped == ()
    assert artifact.config.architecture == architecture
    assert artifact.config.attention_bias == (architecture == "qwen2")
    assert artifact.config.qk_norm == (architecture == "qwen3")
    assert not artifact.config.tie_word_embeddings
    for name, values in tensors.items():
        assert np.array_equal(_values(artifact, name), values)


def test_gguf_names_and_rows(tmp_path: Path) -> None:
    """The same tensors in a GGUF file, which the gguf package wrote, are the same model."""
    tensors = tiny_tensors("llama")
    other = open_artifact(write_gguf(tmp_path / "m.gguf", "llama", tensors))
    for rope_type in ({"rope_type": 0}, {"without": "rope_type"}):
        artifact = open_artifact(_model(tmp_path, tensors, **rope_type))
        check_complete(artifact)
        assert artifact.config == other.config
        for name, ref in artifact.tensors.items():
            assert ref.rope_heads == other.tensors[name].rope_heads
            assert np.array_equal(_values(artifact, name), _values(other, name))


def test_rope_type_says_how_rows_lie_whatever_their_names(tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj.weight"
    for names in (tiny_tensors("llama"), _hf_names("llama")):
        for rope_type, heads in ((0, HEADS), (2, 0)):
            artifact = open_artifact(_model(tmp_path, names, rope_type=rope_type))
            assert artifact.tensors[q].rope_heads == heads
    without = open_artifact(_model(tmp_path, _hf_names("llama"), without="rope_type"))
    assert without.tensors[q].rope_heads == 0


def test_rows_that_would_take_their_biases_along(tmp_path: Path) -> None:
    path = _model(tmp_path, _hf_names("qwen2"), architecture="qwen2", rope_type=0)
    with pytest.raises(InputError, match=r"rope_type is 0 \(NORM\) for qwen2"):
        open_artifact(path)


@pytest.mark.parametrize("kind", [1, 3, "2", True])
def test_rope_types_that_mean_nothing(tmp_path: Path, kind: object) -> None:
    with pytest.raises(InputError, match=r"rope_type is .*; expected 0 \(NORM\) or 2 \(NEOX\)"):
        open_artifact(_model(tmp_path, _hf_names("llama"), rope_type=kind))


@pytest.mark.parametrize(
    "keys",
    [
        "head_dim",
        "num_kv_heads head_dim",
        "num_heads num_kv_heads",
        "hidden_size num_layers vocab_size intermediate_size num_kv_heads head_dim",
    ],
)
def test_what_the_shapes_tell(tmp_path: Path, keys: str) -> None:
    complete = open_artifact(_model(tmp_path, _hf_names("llama")))
    assert open_artifact(_model(tmp_path, _hf_names("llama"), without=keys)).config == complete.config


def test_a_norm_of_a_head_tells_its_size(tmp_path: Path) -> None:
    path = _model(
        tmp_path, _hf_names("qwen3"), architecture="qwen3", without="num_heads num_kv_heads head_dim"
    )
    config = open_artifact(path).config
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ("num_heads head_dim", "num_heads"),
        ("num_heads num_kv_heads head_dim", "num_heads"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("rope_theta", "rope_theta"),
        ("rms_norm_eps", "rms_norm_eps"),
    ],
)
def test_what_the_shapes_do_not_tell(tmp_path: Path, keys: str, missing: str) -> None:
    path = _model(tmp_path, _hf_names("llama"), without=keys)
    with pytest.raises(InputError, match=f"{missing} is missing, and the shapes of the tensors do not tell"):
        open_artifact(path)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"architecture": "Qwen2", "model_type": ""}, "qwen2"),
        ({"architecture": None, "model_type": "qwen2"}, "qwen2"),
        ({"architecture": "Qwen2ForCausalLM"}, "qwen2"),
        ({"architecture": "llama", "hf_model_type": "qwen2"}, "qwen2"),
        ({"architecture": "transformer", "model_type": "qwen2"}, "qwen2"),
    ],
)
def test_where_the_architecture_stands(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    artifact = open_artifact(_model(tmp_path, _hf_names("qwen2"), **keys))
    assert artifact.config.architecture == expected


@pytest.mark.parametrize("keys", [{"architecture": "bert"}, {"architecture": None, "model_type": ""}])
def test_architectures_that_are_unknown(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="architecture"):
        open_artifact(_model(tmp_path, _hf_names("llama"), **keys))


def test_numbers_stored_as_f32(tmp_path: Path) -> None:
    """Some writers print f32 values with the digits of f64."""
    config = open_artifact(
        _model(tmp_path, _hf_names("llama"), rms_norm_eps=9.999999747378752e-06, rope_theta=1e6)
    ).config
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 1e6)


def test_names_of_hyperparameters_of_huggingface(tmp_path: Path) -> None:
    path = _model(
        tmp_path,
        _hf_names("llama"),
        without="num_layers num_heads num_kv_heads",
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    assert open_artifact(path).config == open_artifact(_model(tmp_path, _hf_names("llama"))).config


def test_the_models_own_configuration_comes_first(tmp_path: Path) -> None:
    own = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "intermediate_size": INNER,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    artifact = open_artifact(_model(tmp_path, _hf_names("llama"), huggingface_config=own))
    assert artifact.config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(InputError, match=r"num_heads is 2, but huggingface_config says 4"):
        open_artifact(_model(tmp_path, _hf_names("llama"), huggingface_config=own, num_heads=2))
    with pytest.raises(InputError, match="huggingface_config is 3; expected an object"):
        open_artifact(_model(tmp_path, _hf_names("llama"), huggingface_config=3))


def test_a_head_that_is_a_copy_of_the_embedding(tmp_path: Path) -> None:
    tensors = _hf_names("llama", tied=True)
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    artifact = open_artifact(_model(tmp_path, tied, tied_embeddings=True))
    assert artifact.config.tie_word_embeddings
    assert "lm_head.weight" not in artifact.tensors
    check_complete(artifact)
    # Nothing says that the two are one; or they are not.
    assert not open_artifact(_model(tmp_path, tied)).config.tie_word_embeddings
    other = tied | {"lm_head.weight": tied["lm_head.weight"] + 1}
    artifact = open_artifact(_model(tmp_path, other, tied_embeddings=True))
    assert not artifact.config.tie_word_embeddings
    assert "lm_head.weight" in artifact.tensors
    assert open_artifact(_model(tmp_path, tensors)).config.tie_word_embeddings


def test_every_dtype_in_a_model(tmp_path: Path) -> None:
    tensors: dict[str, Any] = _hf_names("llama")
    q = "model.layers.0.self_attn.q_proj.weight"
    up = "model.layers.1.mlp.up_proj.weight"
    norm = "model.norm.weight"
    down = "model.layers.0.mlp.down_proj.weight"
    random = np.random.Generator(np.random.Philox(1)).integers(-3, 3, (HIDDEN, INNER))
    tensors[q] = apr_bytes.apr_q4(tensors[q])
    tensors[up] = apr_bytes.apr_q8(tensors[up])
    tensors[norm] = (apr_bytes.F16, (HIDDEN,), np.ones(HIDDEN, "<f2").tobytes())
    tensors[down] = (apr_bytes.I8, (HIDDEN, INNER), random.astype("i1").tobytes())
    artifact = open_artifact(_model(tmp_path, tensors))
    check_complete(artifact)
    stored = {name: (ref.stored_dtype, ref.dtype) for name, ref in artifact.tensors.items()}
    assert [stored[name] for name in (q, up, norm, down)] == [
        ("AprQ4", "Q4_0"), ("AprQ8", "F32"), ("F16", "F16"), ("I8", "F32"),
    ]  # fmt: skip
    assert np.array_equal(_values(artifact, down), random)
    step = np.abs(_hf_names("llama")[q]).max() / 7
    assert np.abs(_values(artifact, q) - _hf_names("llama")[q]).max() <= 0.51 * step


def test_interleaved_rows_of_a_decoded_tensor(tmp_path: Path) -> None:
    values = tiny_tensors("llama")
    plain = open_artifact(_model(tmp_path, values, rope_type=0))
    expected = {name: _values(plain, name) for name in plain.tensors if "q_proj" in name}
    quantized: dict[str, Any] = values | {
        f"blk.{layer}.attn_q.weight": apr_bytes.apr_q8(values[f"blk.{layer}.attn_q.weight"])
        for layer in range(LAYERS)
    }
    artifact = open_artifact(_model(tmp_path, quantized, rope_type=0))
    for name, value in expected.items():
        assert np.abs(_values(artifact, name) - value).max() <= np.abs(value).max() / 127


def test_names_without_a_canonical_one_are_kept(tmp_path: Path) -> None:
    extra = {"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32), "vocab": np.ones(3, np.float32)}
    artifact = open_artifact(_model(tmp_path, _hf_names("llama") | extra))
    assert artifact.unmapped == ("model.layers.2.mlp.up_proj.weight", "vocab")


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    both = _hf_names("llama") | {"output_norm.weight": np.ones(HIDDEN, np.float32)}
    with pytest.raises(InputError, match=r"both .* hold model\.norm\.weight"):
        open_artifact(_model(tmp_path, both))


def test_a_tensor_of_the_model_without_values(tmp_path: Path) -> None:
    empty = _hf_names("llama") | {"model.norm.weight": np.ones((0,), np.float32)}
    with pytest.raises(InputError, match=r"model\.norm\.weight has the shape \[0\]; expected values in it"):
        open_artifact(_model(tmp_path, empty))


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    """As a source that names a whole repository brings it."""
    path = _model(tmp_path, _hf_names("llama"))
    (tmp_path / "README.md").write_text("A model.")
    assert open_artifact(tmp_path).files == (path,)
    (tmp_path / "other.apr").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="no safetensors file"):
        open_artifact(tmp_path)


def test_a_corrupt_model_is_refused_unless_it_is_known_to_be_good(tmp_path: Path) -> None:
    path = _model(tmp_path, _hf_names("llama"))
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match="the checksum of the file is"):
        open_artifact(path)
    check_complete(open_artifact(path, verified=True))
