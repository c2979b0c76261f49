"""The generated models: valid for llama.cpp and for our readers, and the same bytes for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.derive.recipe import tensor_formats
from driftscope.artifacts.names import to_gguf
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.engines import llama_cpp
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch
from driftscope.kernels.compare import TensorComparison, compare
from driftscope.kernels.dequantize import dequantize

SMALL = synthetic.Shape(layers=8, hidden=256, ffn=512, heads=4, kv_heads=2, vocab=300, context=64)
IDS = np.array([1, 40, 7, 258, 299], np.int32)


def compared(a: TensorRef, b: TensorRef) -> TensorComparison:
    return compare(a.raw(), a.dtype, b.raw(), b.dtype, rows_a=a.row_order(), rows_b=b.row_order())


@pytest.mark.parametrize("scheme", ["Q4_K_M", "Q8_0", "Q4_1", "Q3_K", "IQ4_XS", "BF16", "F16", "F32"])
def test_llama_cpp_and_the_reader_accept_a_candidate(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "candidate.gguf"
    synthetic.write_candidate(path, SMALL, scheme=scheme)
    artifact = open_artifact(path)
    check_complete(artifact)
    assert load_tokenizer(artifact).encode("th") == [257]
    logits = llama_cpp.logits(path, TokenBatch(IDS, (0,)))
    assert logits.shape == (5, 300)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01


def test_a_model_of_seven_billion_has_the_tensors_of_qwen2() -> None:
    formats = synthetic.candidate_formats(synthetic.Shape(), "Q4_K_M")
    assert len(formats) == 339
    assert formats["lm_head.weight"] == "Q6_K"
    assert formats["model.embed_tokens.weight"] == "Q4_K"
    downs = [formats[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(28)]
    # llama.cpp's use_more_bits: the first and the last eighth, and every third between.
    assert [i for i, fmt in enumerate(downs) if fmt == "Q6_K"] == [
        0,
        1,
        2,
        5,
        8,
        11,
        14,
        17,
        20,
        23,
        *range(24, 28),
    ]


def test_tensors_have_the_formats_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "candidate.gguf"
    synthetic.write_candidate(path, SMALL)
    artifact = open_artifact(path)
    names = {name: to_gguf(name, "qwen2") or "" for name in artifact.tensors}
    expected = tensor_formats(
        {names[t.name]: t.shape for t in artifact.tensors.values()},
        "Q4_K_M",
        architecture="qwen2",
        n_heads=4,
        n_kv_heads=2,
    )
    assert {names[t.name]: t.dtype for t in artifact.tensors.values()} == expected
    assert {"Q4_K", "Q6_K", "F32"} == set(expected.values())


@pytest.mark.parametrize(
    ("name", "dtype"), [("teacher", "BF16"), ("teacher", "F32"), ("teacher.gguf", "BF16")]
)
def test_a_teacher_is_near_its_candidate(tmp_path: Path, name: str, dtype: str) -> None:
    synthetic.write_teacher(tmp_path / name, SMALL, dtype=dtype, max_shard_bytes=1_000_000)
    synthetic.write_candidate(tmp_path / "candidate.gguf", SMALL)
    teacher, candidate = open_artifact(tmp_path / name), open_artifact(tmp_path / "candidate.gguf")
    check_complete(teacher)
    assert list(teacher.tensors) == list(candidate.tensors)
    for key, a in teacher.tensors.items():
        result = compared(a, candidate.tensors[key])
        if len(a.shape) == 1:
            assert result.identical_count == result.element_count, key
        else:
            assert a.dtype == dtype
            assert result.expected_energy is not None
            assert 0.9 < result.sum_dd / result.expected_energy < 1.1, key
            assert result.std_a == pytest.approx(synthetic.SIGMA, rel=0.1), key


def test_a_teacher_in_shards_has_an_index(tmp_path: Path) -> None:
    synthetic.write_teacher(tmp_path / "teacher", SMALL, max_shard_bytes=1_000_000)
    assert len(list((tmp_path / "teacher").glob("model-*.safetensors"))) > 3


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((3, 3, 4)):
        files.append(tmp_path / f"{number}.gguf")
        synthetic.tile.cache_clear()
        synthetic.write_candidate(files[-1], SMALL, seed=seed)
    first, again, other = (path.read_bytes() for path in files)
    assert first == again
    assert len(first) == len(other)
    assert first != other


@pytest.mark.parametrize("fmt", [*synthetic._SCALES, "F32", "F16", "BF16"])
def test_blocks_are_finite_and_spread_as_asked(fmt: str) -> None:
    values = dequantize(synthetic.random_matrix(fmt, 64, 4096), fmt)
    assert values.shape == (64, 4096)
    assert values.std() == pytest.approx(synthetic.SIGMA, rel=0.1)
    assert abs(values.mean()) < 0.1 * synthetic.SIGMA


def test_a_matrix_may_be_larger_than_a_tile() -> None:
    a, b = synthetic.random_pair("BF16", "Q4_K", 300, 4096)
    assert a.shape == (300, 8192)
    assert b.shape == (300, 2304)
    assert np.array_equal(b[256:], b[:44])
    assert compare(a, "BF16", b, "Q4_K").cosine_similarity == pytest.approx(0.998, abs=0.002)


@pytest.mark.parametrize(
    ("change", "part"),
    [({"vocab": 100}, "at least 258"), ({"heads": 3}, "heads"), ({"scheme": "Q9"}, "Q9")],
)
def test_impossible_sizes_are_refused(tmp_path: Path, change: dict, part: str) -> None:
    sizes = {"layers": 1, "hidden": 256, "ffn": 256, "heads": 4, "kv_heads": 2, "vocab": 300} | change
    scheme = sizes.pop("scheme", "Q4_K_M")
    with pytest.raises(InputError, match=part):
        synthetic.write_candidate(tmp_path / "x.gguf", synthetic.Shape(**sizes), scheme=scheme)
