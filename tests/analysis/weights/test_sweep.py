from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from driftscope.analysis.weights.sweep import (
    Band,
    compare_tensor,
    inventory,
    pairs,
    plan_shards,
    published_status,
    relation_of,
    summarise,
)
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.evidence.schemas import frame_of, validate

BAND = Band(0.5, 1.6)
CONFIG = ModelConfig(
    architecture="llama",
    hidden_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=32,
    context_length=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
EMBEDDING, HEAD, QUERY = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
)


def values(seed: int, rows: int = 32, columns: int = 256) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(seed))
    return np.float32(0.02) * generator.standard_normal((rows, columns), dtype=np.float32)


def put(folder: Path, name: str, array: NDArray[Any], dtype: str = "F32", **fields: Any) -> TensorRef:
    stored = array
    if dtype != "F32":
        stored = libgguf.quantize_rows(array, libgguf.GGMLQuantizationType[dtype])
    file = folder / f"{name}.{dtype}"
    file.write_bytes(stored.tobytes())
    return TensorRef(name, name, array.shape, dtype, file, 0, stored.nbytes, **fields)


def artifact(*tensors: TensorRef, unmapped: tuple[str, ...] = (), **config: Any) -> Artifact:
    return Artifact(
        Path("model"),
        "gguf",
        replace(CONFIG, **config),
        {tensor.name: tensor for tensor in tensors},
        unmapped,
    )


def judged(a: Artifact, b: Artifact) -> dict[str, Any]:
    rows = [compare_tensor(pair.a, pair.b, tensor=pair.tensor) for pair in pairs(a, b)]
    frame = frame_of(rows, "sweep")
    if rows:
        frame = validate(frame, "sweep", Path("sweep.parquet"))
    return summarise(frame, inventory(a, b), BAND)


@given(
    sizes=st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 10**9)),
    n=st.integers(1, 9),
)
def test_shards_are_balanced_and_do_not_depend_on_order(sizes: dict[str, int], n: int) -> None:
    shards = plan_shards(sizes, n)
    assert sorted(name for shard in shards for name in shard) == sorted(sizes)
    assert shards == plan_shards(dict(reversed(sizes.items())), n)
    loads = [sum(sizes[name] for name in shard) for shard in shards]
    lower_bound = max([sum(sizes.values()) / n, *sizes.values()])
    assert len(shards) == n
    assert max(loads) <= 2 * lower_bound


def test_no_shards_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        plan_shards({"a": 1}, 0)


@pytest.mark.parametrize(
    ("max_diff", "compared", "non_finite", "status"),
    [
        (0.0, 5, 0, "Identical"),
        (9.99e-4, 5, 0, "NearlyIdentical"),
        (1e-3, 5, 0, "SmallDiff"),
        (1e-2, 5, 0, "MediumDiff"),
        (0.1, 5, 0, "LargeDiff"),
        (1.0, 5, 0, "Critical"),
        (0.0, 5, 1, "NonFinite"),
        (math.nan, 0, 5, "NonFinite"),
        (math.nan, 0, 0, "NotCompared"),
    ],
)
def test_published_status(max_diff: float, compared: int, non_finite: int, status: str) -> None:
    assert published_status(max_diff, compared, non_finite) == status


def test_a_clean_quantization_is_told_from_a_fault(tmp_path: Path) -> None:
    x = values(1)
    teacher = artifact(put(tmp_path, QUERY, x))
    clean = judged(teacher, artifact(put(tmp_path, QUERY, x, "Q4_K")))
    assert (clean["conclusion"], clean["holds"]) == ("quantized-from", True)
    assert clean["relations"] == {QUERY: "quantized-from"}
    scaled = judged(teacher, artifact(put(tmp_path, QUERY, np.float32(1.3) * x, "Q4_K")))
    assert (scaled["conclusion"], scaled["holds"]) == ("transformed", False)
    assert scaled["relations"] == {QUERY: "quantized-from-under:scaled(1.3)"}
    assert scaled["coverage"]["elements_compared"] == x.size


def test_a_row_has_the_figures_of_numpy(tmp_path: Path) -> None:
    a, b = values(1), values(2)
    row = compare_tensor(put(tmp_path, "a", a), put(tmp_path, "b", b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    d = np.abs(x - y)
    worst = np.unravel_index(d.argmax(), d.shape)
    assert row["max_index"] == f"{worst[0]},{worst[1]}"
    assert (row["max_value_a"], row["max_value_b"]) == (a[worst], b[worst])
    expected = {
        "mean_diff": d.mean(),
        "max_diff": d.max(),
        "rmse": np.sqrt((d**2).mean()),
        "nmse": (d**2).sum() / (x**2).sum(),
        "relative_l2": np.linalg.norm(d) / np.linalg.norm(x),
        "cosine_similarity": (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y),
        "std_ratio": y.std(ddof=1) / x.std(ddof=1),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert row["status"] == "LargeDiff"


def test_a_row_says_what_decoded_each_side(tmp_path: Path) -> None:
    """IQ3_S has no kernel of ours: its values are the gguf package's."""
    x = values(1)
    teacher, native = put(tmp_path, QUERY, x), put(tmp_path, QUERY, x, "Q4_K")
    file = tmp_path / "iq3"
    file.write_bytes(bytes(32 * 110))
    other = TensorRef(QUERY, QUERY, x.shape, "IQ3_S", file, 0, 32 * 110)
    decoders = [
        (row["decoder_a"], row["decoder_b"])
        for row in (compare_tensor(teacher, native), compare_tensor(teacher, other))
    ]
    assert decoders == [("native", "native"), ("native", "gguf")]


def test_permuted_rows_are_compared_in_canonical_order(tmp_path: Path) -> None:
    x = values(3, 256)
    canonical = put(tmp_path, "q", x)
    stored = put(tmp_path, "stored", x, rope_heads=4)
    order = stored.row_order()
    assert order is not None
    permuted = np.empty_like(x)
    permuted[order] = x
    stored.file.write_bytes(permuted.tobytes())
    assert compare_tensor(canonical, stored)["status"] == "Identical"
    assert compare_tensor(canonical, replace(stored, rope_heads=0))["status"] != "Identical"


@pytest.mark.parametrize(("shape", "status"), [((256, 32), "Transposed"), ((31, 256), "ShapeMismatch")])
def test_unlike_shapes_are_not_compared(tmp_path: Path, shape: tuple[int, int], status: str) -> None:
    a = artifact(put(tmp_path, EMBEDDING, values(1)), put(tmp_path, HEAD, values(2)))
    b = artifact(put(tmp_path, "b", values(1, *shape)), put(tmp_path, HEAD, values(2)))
    b = replace(b, tensors={EMBEDDING: b.tensors["b"], HEAD: b.tensors[HEAD]})
    row = compare_tensor(a.tensors[EMBEDDING], b.tensors[EMBEDDING])
    assert (row["status"], row["compared_count"], row["nmse"]) == (status, 0, None)
    assert relation_of(row, BAND).name == "different"
    assert judged(a, b)["conclusion"] == "incomplete"


def test_nan_is_counted_and_never_a_pass(tmp_path: Path) -> None:
    x = values(4)
    broken = x.copy()
    broken[3, 5] = np.nan
    a = artifact(put(tmp_path, QUERY, x), put(tmp_path, HEAD, x))
    (tmp_path / "b").mkdir()
    b = artifact(put(tmp_path / "b", QUERY, broken), put(tmp_path / "b", HEAD, x))
    row = compare_tensor(a.tensors[QUERY], b.tensors[QUERY])
    assert (row["nan_a"], row["nan_b"], row["compared_count"]) == (0, 1, x.size - 1)
    assert row["status"] == "NonFinite"
    found = judged(a, b)
    assert (found["conclusion"], found["holds"]) == ("non-finite", False)
    assert found["relation_counts"] == {"identical": 1, "non-finite": 1}


def test_nothing_compared_is_a_failure(tmp_path: Path) -> None:
    a = artifact(put(tmp_path, EMBEDDING, values(1)))
    found = judged(a, artifact(put(tmp_path, QUERY, values(1))))
    assert (found["conclusion"], found["holds"]) == ("failure", False)
    assert found["coverage"] == {"expected": 1, "compared": 0, "elements": 0, "elements_compared": 0}


def test_missing_extra_and_unmapped_tensors_are_listed(tmp_path: Path) -> None:
    shared = put(tmp_path, QUERY, values(1))
    a = artifact(shared, put(tmp_path, EMBEDDING, values(2)), unmapped=("z", "a"))
    b = artifact(shared, put(tmp_path, HEAD, values(3)), rms_norm_eps=1e-6, rope_scaling={"factor": 8.0})
    found = inventory(a, b)
    assert (found["missing"], found["extra"]) == ([EMBEDDING], [HEAD])
    assert (found["unmapped_a"], found["unmapped_b"]) == (["a", "z"], [])
    assert found["coverage"] == {"expected": 2, "compared": 1}
    assert found["metadata_differences"] == [
        {"key": "rms_norm_eps", "a": 1e-5, "b": 1e-6, "changes": "forward-pass", "matters": True},
        {"key": "rope_scaling", "a": None, "b": {"factor": 8.0}, "changes": "forward-pass", "matters": True},
    ]
    assert judged(a, b)["conclusion"] == "incomplete"


def test_hyperparameters_that_differ_by_f32_rounding_are_equal() -> None:
    rounded = float(np.float32(1e-5))
    assert rounded != 1e-5
    assert inventory(artifact(), artifact(rms_norm_eps=rounded))["metadata_differences"] == []


@pytest.mark.parametrize("tied_side", ["a", "b"])
def test_a_tied_head_is_compared_with_a_stored_one(tmp_path: Path, tied_side: str) -> None:
    embedding = put(tmp_path, EMBEDDING, values(1))
    head = put(tmp_path, HEAD, values(1))
    tied = artifact(embedding, tie_word_embeddings=True)
    untied = artifact(embedding, head)
    a, b = (tied, untied) if tied_side == "a" else (untied, tied)
    assert [pair.tensor for pair in pairs(a, b)] == [EMBEDDING, HEAD]
    found = inventory(a, b)
    assert (found["missing"], found["extra"]) == ([], [])
    assert found["coverage"] == {"expected": 2, "compared": 2}
    assert judged(a, b)["conclusion"] == "identical"


def test_two_tied_heads_are_complete_and_an_untied_absence_is_missing(tmp_path: Path) -> None:
    embedding, head = put(tmp_path, EMBEDDING, values(1)), put(tmp_path, HEAD, values(2))
    tied = artifact(embedding, tie_word_embeddings=True)
    assert inventory(tied, tied)["coverage"] == {"expected": 1, "compared": 1}
    assert inventory(artifact(embedding, head), artifact(embedding))["missing"] == [HEAD]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (2.0, 1.0), (0.0, math.inf)])
def test_a_band_that_bounds_nothing_is_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="band"):
        Band(low, high)
