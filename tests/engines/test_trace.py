from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from tests.forward.models import write_model

from driftscope.artifacts.open import open_artifact
from driftscope.engines.trace import (
    RAGGED,
    Trace,
    TraceManifest,
    TraceWriter,
    write_manifest,
)
from driftscope.errors import InputError
from driftscope.forward.architecture import LAYER_TAPS, WHOLE_TAPS, embedding_op, head_ops, layer_ops
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.policy import WHOLE_MODEL

PROMPTS = (("a", (5, 9, 7)), ("b", (1,)))

MINIMAL: dict[str, Any] = {
    "format": "driftscope-trace",
    "version": 1,
    "prompts": [{"id": prompt, "ids": list(ids)} for prompt, ids in PROMPTS],
}


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def written(folder: Path, arrays: Mapping[str, Any], **changes: Any) -> Path:
    """A trace as another engine's author would write it."""
    folder.mkdir(exist_ok=True)
    save_file({name: np.array(array, order="C") for name, array in arrays.items()}, folder / "a.safetensors")
    (folder / "trace.json").write_text(json.dumps({**MINIMAL, **changes}))
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen2-yarn", "mistral-window", "qwen3"])
def test_the_taps_are_those_of_the_architecture(name: str, tmp_path: Path) -> None:
    config = open_artifact(write_model(tmp_path, name)).config
    everything = dataclasses.replace(config, post_norms=True)
    assert tuple(op.tap for op in layer_ops(everything)) == LAYER_TAPS
    own = [tap for tap in LAYER_TAPS if tap not in ("post_attn_norm", "post_ffn_norm")]
    assert [op.tap for op in layer_ops(config)] == own
    assert tuple(op.tap for op in (embedding_op(config), *head_ops(config))) == WHOLE_TAPS
    assert {op.tap for op in layer_ops(config) if op.ragged} == set(RAGGED)


def test_one_array_for_all_prompts(tmp_path: Path) -> None:
    x = values(4, 6)
    trace = Trace(written(tmp_path, {"layers.3.ffn_out": x, "embedding": x + 1}))
    assert np.array_equal(trace.tap(3, "ffn_out"), x)
    assert np.array_equal(trace.tap(WHOLE_MODEL, "embedding"), x + 1)
    assert trace.places == {(3, "ffn_out"), (WHOLE_MODEL, "embedding")}
    assert trace.batch.ids.tolist() == [5, 9, 7, 1]
    assert trace.name == "unknown"
    assert [tap for tap in ("ffn_out", "ffn_up") if not trace.has(3, tap)] == ["ffn_up"]


def test_one_array_a_prompt(tmp_path: Path) -> None:
    x = values(4, 6)
    trace = Trace(written(tmp_path, {"layers.0.ffn_out[b]": x[3:], "layers.0.ffn_out[a]": x[:3]}))
    assert np.array_equal(trace.tap(0, "ffn_out"), x)


def test_q_k_and_v_in_parts(tmp_path: Path) -> None:
    q, k, v = values(4, 8), values(4, 2), values(4, 2, seed=1)
    whole = {f"layers.0.qkv_bias.{part}": array for part, array in (("k", k), ("v", v), ("q", q))}
    by_prompt = {
        f"layers.0.qkv_matmul.{part}[{prompt}]": array[rows]
        for part, array in (("k", k), ("v", v), ("q", q))
        for prompt, rows in (("a", slice(3)), ("b", slice(3, 4)))
    }
    trace = Trace(written(tmp_path, {**whole, **by_prompt}))
    for tap in ("qkv_bias", "qkv_matmul"):
        assert np.array_equal(trace.tap(0, tap), np.concatenate([q, k, v], axis=1))


def test_a_tap_of_which_something_is_missing_is_not_there(tmp_path: Path) -> None:
    x = values(4, 6)
    trace = Trace(written(tmp_path, {"layers.0.ffn_out[a]": x[:3], "layers.0.qkv_bias.q": x}))
    assert not trace.places
    for tap in ("ffn_out", "qkv_bias"):
        with pytest.raises(InputError, match=rf"no layers\.0\.{tap} in full: a prompt or a part is missing"):
            trace.tap(0, tap)
    with pytest.raises(InputError, match=r"the trace has no layers\.1\.ffn_out$"):
        trace.tap(1, "ffn_out")


@pytest.mark.parametrize("layout", ["rows", "heads"])
def test_scores_in_both_layouts(layout: str, tmp_path: Path) -> None:
    """As torch has them, [heads, queries, keys], or a row a query, head by head."""
    found = {}
    for prompt, length in (("a", 3), ("b", 1)):
        heads = values(5, length, length)
        rows = np.concatenate(list(heads), axis=1)
        found[prompt] = (heads, rows)
    arrays = {f"layers.0.attn_scores[{p}]": pair[layout == "rows"] for p, pair in found.items()}
    trace = Trace(written(tmp_path, arrays))
    for part, (_, rows) in zip(trace.ragged(0, "attn_scores"), found.values(), strict=True):
        assert np.array_equal(part, rows)
    with pytest.raises(InputError, match=r"attn_scores is one array a prompt"):
        trace.tap(0, "attn_scores")


def test_scores_of_a_single_prompt_need_no_brackets(tmp_path: Path) -> None:
    one = {"prompts": MINIMAL["prompts"][:1]}
    trace = Trace(written(tmp_path / "one", {"layers.0.attn_softmax": values(2, 3, 3)}, **one))
    assert trace.ragged(0, "attn_softmax")[0].shape == (3, 6)
    trace = Trace(written(tmp_path / "two", {"layers.0.attn_softmax": values(2, 3, 3)}))
    assert not trace.has(0, "attn_softmax")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_dtypes_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.from_numpy(values(4, 6).astype(np.float64) / 3).to(dtype)
    save_torch_file({"embedding": x}, tmp_path / "a.safetensors")
    (tmp_path / "trace.json").write_text(json.dumps(MINIMAL))
    found = Trace(tmp_path).tap(WHOLE_MODEL, "embedding")
    assert found.dtype == np.float32
    assert np.array_equal(found, x.float().numpy())


def test_what_is_not_finite_stays(tmp_path: Path) -> None:
    x = values(4, 6)
    x[0, 0], x[1, 1], x[2, 2] = np.nan, np.inf, -np.inf
    found = Trace(written(tmp_path, {"embedding": x})).tap(WHOLE_MODEL, "embedding")
    assert np.array_equal(found, x, equal_nan=True)


def test_the_writer_and_the_reader_agree(tmp_path: Path) -> None:
    manifest = TraceManifest(
        prompts=PROMPTS,
        engine={"name": "mine", "version": "1"},
        model={"architecture": "llama"},
        arithmetic=Arithmetic.of("int8-dot", dtype="f32"),
        capture_points={"embedding": "rows"},
        absent={"lm_head": "not asked for"},
    )
    writer = TraceWriter(tmp_path / "trace")
    writer.write("one", {"embedding": values(4, 6)})
    writer.write("none", {})
    writer.write("two", {"final_norm": values(4, 6).astype(np.float16)})
    trace = writer.finish(manifest)
    found = trace.manifest
    assert found.files == ("one.safetensors", "two.safetensors")
    assert len(found.arrays_sha256) == 64
    for key in ("prompts", "engine", "model", "arithmetic", "capture_points", "absent"):
        assert getattr(found, key) == getattr(manifest, key), key
    assert trace.places == {(WHOLE_MODEL, "embedding"), (WHOLE_MODEL, "final_norm")}
    assert trace.name == "mine"
    digest = found.token_digests["b"]
    assert digest == hashlib.sha256(b"\1\0\0\0").hexdigest()


def test_a_folder_without_a_manifest_is_unfinished(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path)
    writer.write("one", {"embedding": values(4, 6)})
    with pytest.raises(InputError, match=r"there is no trace\.json; expected the folder of a trace"):
        Trace(tmp_path)


def test_a_new_trace_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path)
    writer.write("one", {"embedding": values(4, 6)})
    writer = TraceWriter(tmp_path)  # the first one was not finished
    assert not list(tmp_path.iterdir())
    writer.write("two", {"embedding": values(4, 6)})
    writer.finish(TraceManifest(PROMPTS))
    TraceWriter(tmp_path)
    assert not list(tmp_path.iterdir())
    written(tmp_path, {"embedding": values(4, 6)}, files=["a.safetensors"])
    TraceWriter(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_overwritten(tmp_path: Path) -> None:
    save_file({"model.norm.weight": values(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"model\.safetensors: not a trace's; expected a folder for a trace"):
        TraceWriter(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_the_writer_does_not_take(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path)
    writer.write("one", {"embedding": values(4, 6)})
    for stem in ("one", "../two", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="no plain file name, or was written already"):
            writer.write(stem, {"embedding": values(4, 6)})
    with pytest.raises(ValueError, match="has the dtype float64; expected float32 or float16"):
        writer.write("two", {"embedding": values(4, 6).astype(np.float64)})


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        TraceWriter(tmp_path / "trace")
    with pytest.raises(InputError, match=r"there is no trace\.json"):
        Trace(tmp_path / "trace")


BAD_ARRAYS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "one dimension": ({"embedding": values(4)}, r"has the shape \[4\]; expected \[4, channels\]"),
    "none": ({"embedding": values()}, r"has the shape \[\]; expected \[4, channels\]"),
    "three dimensions": ({"embedding": values(1, 4, 6)}, r"the shape \[1, 4, 6\]; expected \[4, channels\]"),
    "the last token only": ({"embedding": values(1, 6)}, r"the shape \[1, 6\]; expected \[4, channels\]"),
    "no channels": ({"embedding": values(4, 0)}, r"the shape \[4, 0\]; expected \[4, channels\]"),
    "rows of the other prompt": (
        {"embedding[a]": values(1, 6), "embedding[b]": values(3, 6)},
        r"embedding\[a\] has the shape \[1, 6\]; expected \[3, channels\]",
    ),
    "other channels": (
        {"embedding[a]": values(3, 6), "embedding[b]": values(1, 5)},
        "embedding has 6 channels in one prompt and 5 in another",
    ),
    "integers": ({"embedding": np.ones((4, 6), np.int32)}, "has the dtype I32; expected one of F32, F16"),
}


@pytest.mark.parametrize("case", sorted(BAD_ARRAYS))
def test_an_array_that_does_not_fit(case: str, tmp_path: Path) -> None:
    arrays, message = BAD_ARRAYS[case]
    trace = Trace(written(tmp_path, arrays))
    with pytest.raises(InputError, match=message) as caught:
        trace.tap(WHOLE_MODEL, "embedding")
    assert "\n" not in str(caught.value)


def test_parts_of_other_rows(tmp_path: Path) -> None:
    parts = {"q": values(4, 6), "k": values(3, 2), "v": values(4, 2)}
    trace = Trace(written(tmp_path, {f"layers.0.qkv_bias.{part}": x for part, x in parts.items()}))
    with pytest.raises(InputError, match=r"qkv_bias\.k has the shape \[3, 2\]; expected \[4, channels\]"):
        trace.tap(0, "qkv_bias")


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((3, 4, 3), (3, 1, 1)),
        ((3, 7), (1, 2)),
        ((2, 6), (1, 2)),
        ((1, 2, 3, 3), (2, 1, 1)),
        ((0, 3, 3), (1, 1)),
    ],
)
def test_scores_that_do_not_fit(shape: tuple[int, ...], other: tuple[int, ...], tmp_path: Path) -> None:
    arrays = {"layers.0.attn_scores[a]": values(*shape), "layers.0.attn_scores[b]": values(*other)}
    trace = Trace(written(tmp_path, arrays))
    with pytest.raises(InputError, match=r"expected \[heads, 3, 3\] or \[3, heads \* 3\]"):
        trace.ragged(0, "attn_scores")


def test_scores_of_other_heads(tmp_path: Path) -> None:
    arrays = {"layers.0.attn_scores[a]": values(2, 3, 3), "layers.0.attn_scores[b]": values(4, 1, 1)}
    with pytest.raises(InputError, match=r"attn_scores has 2 heads in one prompt and 4 in another"):
        Trace(written(tmp_path, arrays)).ragged(0, "attn_scores")


@pytest.mark.parametrize(
    "names",
    [
        ("embedding", "embedding[a]"),
        ("layers.0.qkv_bias", "layers.0.qkv_bias.q"),
        ("layers.0.qkv_bias.k[a]", "layers.0.qkv_bias[a]"),
    ],
)
def test_a_tap_that_is_there_in_two_ways(names: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is there twice"):
        Trace(written(tmp_path, {name: values(4, 6) for name in names}))


def test_a_tap_in_two_files(tmp_path: Path) -> None:
    written(tmp_path, {"embedding": values(4, 6)})
    save_file({"embedding": values(4, 6)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors: embedding is there twice"):
        Trace(tmp_path)


def test_files_that_are_not_listed_are_not_read(tmp_path: Path) -> None:
    written(tmp_path, {"embedding": values(4, 6)}, files=["a.safetensors"])
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    assert Trace(tmp_path).places == {(WHOLE_MODEL, "embedding")}


@pytest.mark.parametrize(
    "name",
    [
        "layers.x.ffn_out",
        "layers.-1.ffn_out",
        "layers.01.ffn_out",
        "layers.²" + ".ffn_out",
        f"layers.{'9' * 5000}.ffn_out",
        "layers.0.",
        "layers.0",
        "embedding.q",
        "layers.0.qkv_bias.w",
        "embedding[a",
        "embedding[a]b",
        "embedding[]",
        "model.norm.weight",
        "layers.0.fnn_out",
        "layers.0.embedding",
        "ffn_out",
        "",
        "a\nb",
    ],
)
def test_a_name_that_is_no_taps(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not that of a tap; expected embedding") as caught:
        Trace(written(tmp_path, {name: values(4, 6)}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_prompt_that_is_not_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"embedding\[c\] is of a prompt that trace\.json does not list"):
        Trace(written(tmp_path, {"embedding[c]": values(4, 6)}))


BAD_MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "trace"}, "format 'trace', version 1; expected 'driftscope-trace'"),
    "another version": ({"version": 2}, "version 2; expected 'driftscope-trace', version 1"),
    "an unknown key": ({"prompt": []}, "unknown key 'prompt'; expected one of"),
    "no prompts": ({"prompts": []}, "must list at least one prompt"),
    "a prompt without tokens": ({"prompts": [{"id": "a", "ids": []}]}, "a prompt needs an id"),
    "a prompt without id": ({"prompts": [{"ids": [1]}]}, "a prompt needs an id"),
    "a prompt with brackets": ({"prompts": [{"id": "a[0]", "ids": [1]}]}, "without brackets"),
    "a prompt of two lines": ({"prompts": [{"id": "a\nb", "ids": [1]}]}, "printable"),
    "half a character": ({"prompts": [{"id": "\ud800", "ids": [1]}]}, "printable"),
    "a negative token": ({"prompts": [{"id": "a", "ids": [-1]}]}, "0 to 2147483647"),
    "a large token": ({"prompts": [{"id": "a", "ids": [2**31]}]}, "0 to 2147483647"),
    "a token that is true": ({"prompts": [{"id": "a", "ids": [True]}]}, "0 to 2147483647"),
    "a fractional token": ({"prompts": [{"id": "a", "ids": [1.0]}]}, "0 to 2147483647"),
    "one prompt twice": ({"prompts": MINIMAL["prompts"][:1] * 2}, "two prompts have the same id"),
    "a path upwards": ({"files": ["../a.safetensors"]}, "without a path"),
    "an absolute path": ({"files": ["/a.safetensors"]}, "without a path"),
    "a backslash": ({"files": ["..\\a.safetensors"]}, "without a path"),
    "a zero byte": ({"files": ["a\0.safetensors"]}, "without a path"),
    "a hidden file": ({"files": ["..safetensors"]}, "without a path"),
    "another kind of file": ({"files": ["trace.json"]}, "without a path"),
    "no list of files": ({"files": "a.safetensors"}, "without a path"),
    "a file twice": ({"files": ["a.safetensors"] * 2}, "files names one file twice"),
    "a file that is not there": ({"files": ["b.safetensors"]}, "b.safetensors: cannot be opened"),
    "taps as a list": ({"taps": ["embedding"]}, "taps must be an object"),
    "a tap as text": ({"taps": {"embedding": "rows"}}, "'embedding' must give capture_point or absent"),
    "a misspelt key": ({"taps": {"embedding": {"capture": "x"}}}, "capture_point or absent as text"),
    "engine as text": ({"engine": "mine"}, "engine must be an object"),
    "arithmetic as text": ({"arithmetic": "f32"}, "arithmetic must be an object or null"),
    "an unknown path": ({"arithmetic": {"path": "f99"}}, "f99"),
    "an unknown dtype": ({"arithmetic": {"path": "f32", "dtype": "f8"}}, "dtype 'f8' is unknown"),
    "digest as a number": ({"arrays_sha256": 1}, "arrays_sha256 must be text"),
}


@pytest.mark.parametrize("case", sorted(BAD_MANIFESTS))
def test_a_malformed_manifest(case: str, tmp_path: Path) -> None:
    changes, message = BAD_MANIFESTS[case]
    with pytest.raises(InputError) as caught:
        Trace(written(tmp_path, {"embedding": values(4, 6)}, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"format": 1, "format": 1}', b"[" * 100_000])
def test_a_manifest_that_is_no_json_object(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_bytes(text)
    with pytest.raises(InputError, match=r"trace\.json"):
        Trace(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_a_cut_file(size: int, tmp_path: Path) -> None:
    path = written(tmp_path, {"embedding": values(4, 6)}) / "a.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"a\.safetensors"):
        Trace(tmp_path)


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = written(tmp_path, {"embedding": values(4, 600)}) / "a.safetensors"
    trace = Trace(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"a\.safetensors"):
        trace.tap(WHOLE_MODEL, "embedding")


def test_a_device_in_place_of_a_file(tmp_path: Path) -> None:
    written(tmp_path, {"embedding": values(4, 6)})
    (tmp_path / "b.safetensors").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="a character device; expected a regular file"):
        Trace(tmp_path)


def test_the_manifest_changes_with_the_arrays(tmp_path: Path) -> None:
    digests = []
    for scale in (1, 2, 1):
        save_file({"embedding": scale * values(4, 6)}, tmp_path / "a.safetensors")
        write_manifest(tmp_path, TraceManifest(PROMPTS), ["a.safetensors"])
        digests.append(Trace(tmp_path).manifest.arrays_sha256)
    assert digests[0] == digests[2] != digests[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("format", "version", "engine", "model", "arithmetic", "prompts", "taps", "files", "arrays_sha256")


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(KEYS), value=JSON)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key: str, value: Any) -> None:
    check_one_line({**MINIMAL, key: value})


@settings(max_examples=300, deadline=None)
@given(
    value=st.fixed_dictionaries(
        {"path": st.just("f32") | JSON},
        optional=dict.fromkeys(("activation", "kv_type", "dtype", "overrides", "artifact"), JSON),
    )
)
def test_any_arithmetic_is_taken_or_refused_in_one_line(value: Any) -> None:
    check_one_line({**MINIMAL, "arithmetic": value})


def check_one_line(document: dict[str, Any]) -> None:
    try:
        manifest = TraceManifest.from_dict(document, "here")
    except InputError as error:
        message = str(error)
    else:
        message = ""
        assert TraceManifest.from_dict(json.loads(json.dumps(manifest.to_dict())), "here").batch.n_tokens
    assert "\n" not in message


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    arrays = {"embedding": values(4, 2), "layers.0.attn_scores[a]": values(2, 3, 3)}
    path = written(tmp_path, arrays) / "a.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    message = ""
    try:
        trace = Trace(tmp_path)
        for layer, tap in sorted(trace.places):
            if tap == "attn_scores":
                trace.ragged(layer, tap)
            else:
                trace.tap(layer, tap)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
