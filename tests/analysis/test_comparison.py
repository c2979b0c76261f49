"""Two traces side by side: what is compared, what is refused, and where they part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.forward.models import write_model

from driftscope.analysis.comparison import broken_identities, compare_traces, standard_point
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import own, transformers
from driftscope.engines.trace import Trace, TraceWriter
from driftscope.forward.architecture import taps
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass

PROMPTS = [("a", [5, 9, 200, 7, 7, 41, 300, 2]), ("b", [3, 17])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(write_model(tmp_path_factory.mktemp("model"), "qwen2"))


@pytest.fixture(scope="module")
def plain(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return own.trace(model, PROMPTS, tmp_path_factory.mktemp("trace"), Arithmetic.of())


def rewritten(trace: Trace, folder: Path, change: Callable[[str, Any], Any], **manifest: Any) -> Trace:
    """A copy of a trace with other arrays."""
    writer = TraceWriter(folder)
    for name in trace.manifest.files:
        arrays = {key: change(key, array) for key, array in load_file(trace.folder / name).items()}
        writer.write(name.removesuffix(".safetensors"), arrays)
    return writer.finish(dataclasses.replace(trace.manifest, **manifest))


def test_a_trace_is_equal_to_itself(plain: Trace) -> None:
    found = compare_traces({"a": plain, "b": plain})
    assert found["admissibility"]["admissible"]
    (pair,) = found["pairs"]
    assert len(pair["taps"]) == 3 + 3 * 17
    assert pair["first"] is None
    assert all(tap["nmse"] == 0 and not tap["differs"] for tap in pair["taps"])
    assert found["identities"] == found["left_out"] == []
    assert found["vote"] is None
    json.dumps(found, allow_nan=False)


def test_the_first_tap_that_differs(plain: Trace, tmp_path: Path) -> None:
    def change(key: str, array: Any) -> Any:
        if key.startswith(("layers.1.ffn_up", "layers.2.attn_norm")):
            array = array.copy()
            array[3, 7] += 2.0
        return array

    found = compare_traces({"a": plain, "b": rewritten(plain, tmp_path, change)})
    (pair,) = found["pairs"]
    first = pair["first"]
    assert (first["layer"], first["tap"]) == (1, "ffn_up")
    assert first["max_abs_diff"] == pytest.approx(2.0, rel=1e-5)
    up = plain.tap(1, "ffn_up").astype(np.float64)
    assert first["nmse"] == pytest.approx(4 / np.square(up).sum(), rel=1e-5)
    assert first["nmse_all_but_first"] == pytest.approx(4 / np.square(up[[*range(1, 8), 9]]).sum(), rel=1e-5)
    assert (first["worst"]["prompt"], first["worst"]["position"]) == ("a", 3)
    assert sum(tap["differs"] for tap in pair["taps"]) == 2


def test_the_worst_token_is_told_by_its_prompt(plain: Trace, tmp_path: Path) -> None:
    def change(key: str, array: Any) -> Any:
        return (
            array * np.where(np.arange(10) == 9, 2, 1)[:, None].astype(np.float32)
            if key == "final_norm"
            else array
        )

    (pair,) = compare_traces({"a": plain, "b": rewritten(plain, tmp_path, change)}, layers=[-1])["pairs"]
    (tap,) = (tap for tap in pair["taps"] if tap["differs"])
    assert tap["worst"] == {"prompt": "b", "position": 1, "nmse": pytest.approx(1.0)}


def test_values_that_are_not_finite_differ(plain: Trace, tmp_path: Path) -> None:
    def change(key: str, array: Any) -> Any:
        if key == "layers.0.ffn_gate":
            array = array.copy()
            array[2, 2] = np.nan
        return array

    (pair,) = compare_traces({"a": plain, "b": rewritten(plain, tmp_path, change)})["pairs"]
    assert (pair["first"]["tap"], pair["first"]["not_finite"], pair["first"]["nmse"]) == ("ffn_gate", 1, 0.0)


def test_other_tokens_are_inadmissible(model: Artifact, plain: Trace, tmp_path: Path) -> None:
    other = own.trace(
        model, [("a", [5, 9, 200, 7, 7, 41, 300, 3]), ("b", [3, 17])], tmp_path, Arithmetic.of()
    )
    found = compare_traces({"a": plain, "b": other})
    failed = [check["id"] for check in found["admissibility"]["checks"] if check["status"] == "fails"]
    assert failed[0] == "same-token-ids"
    assert found["pairs"][0]["taps"] == []
    json.dumps(found, allow_nan=False)


def test_one_token_of_a_dump_is_no_comparison(plain: Trace, tmp_path: Path) -> None:
    """Statistics of the last token against those of all tokens: refused, not called a divergence."""
    found = compare_traces({"a": plain, "b": rewritten(plain, tmp_path, lambda key, array: array[-1:])})
    assert not found["admissibility"]["admissible"]
    assert "has the shape [1, 112]; expected [10, channels]" in found["left_out"][0]["reason"]
    assert found["pairs"][0]["taps"] == []


def test_a_tap_that_was_captured_elsewhere_is_left_out(plain: Trace, tmp_path: Path) -> None:
    other = rewritten(
        plain, tmp_path, lambda key, array: array, capture_points={"attn_norm": "before its weight"}
    )
    found = compare_traces({"a": plain, "b": other})
    assert found["admissibility"]["admissible"]
    assert found["left_out"] == [
        {"tap": "attn_norm", "reason": "captured at different points: standard; before its weight"}
    ]
    assert all(tap["tap"] != "attn_norm" for tap in found["pairs"][0]["taps"])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-window", "llama-yarn"])
def test_every_wording_of_a_standard_capture_point_is_known(name: str, tmp_path: Path) -> None:
    for tap in taps(open_artifact(write_model(tmp_path, name)).config):
        assert standard_point(tap.op.tap, tap.op.capture_point), tap.op.capture_point
    assert not standard_point("attn_scores", "not scaled")


def test_our_pass_and_transformers(model: Artifact, plain: Trace, tmp_path: Path) -> None:
    """Both in float32: the same but for the order of sums; what torch does not show is named."""
    other = transformers.trace(model.path, PROMPTS, tmp_path)
    found = compare_traces({"ours": plain, "torch": other})
    assert found["admissibility"]["admissible"]
    (pair,) = found["pairs"]
    assert len(pair["taps"]) == 3 + 3 * 16
    assert max(tap["nmse"] for tap in pair["taps"]) < 1e-9
    assert found["left_out"] == [
        {
            "tap": "qkv_matmul",
            "reason": "torch has none: the bias is added inside of torch's linear: only qkv_bias is seen",
        }
    ]
    assert found["identities"] == []


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_identities_hold_in_half_precision(dtype: str, model: Artifact, tmp_path: Path) -> None:
    trace = transformers.trace(model.path, PROMPTS, tmp_path, transformers.TransformersOptions(dtype=dtype))
    assert broken_identities(trace) == []


def test_broken_identities_are_put_together(plain: Trace, tmp_path: Path) -> None:
    """The tap holds attn_out instead of the sum: two identities fail in all layers."""
    folder = tmp_path / "trace"
    changed = rewritten(plain, folder, lambda key, array: array)
    for layer in range(3):
        file = folder / f"layer-{layer:03d}.safetensors"
        arrays = load_file(file)
        arrays[f"layers.{layer}.post_attn_residual"] = arrays[f"layers.{layer}.attn_out"].copy()
        save_file(arrays, file)
    found = broken_identities(Trace(changed.folder))
    assert [(item["tap"], item["layers"]) for item in found] == [
        ("post_attn_residual", [0, 1, 2]),
        ("post_ffn_residual", [0, 1, 2]),
    ]
    assert all(item["nmse"] > item["tolerance"] for item in found)
    assert found[0]["reading"]
    compared = compare_traces({"a": plain, "b": Trace(changed.folder)})
    assert [(item["trace"], item["tap"]) for item in compared["identities"]] == [
        ("b", "post_attn_residual"),
        ("b", "post_ffn_residual"),
    ]


class Louder(ForwardPass):
    def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        found = super().project(layer, site, x)
        return found * np.float32(1.1) if (layer, site) == (1, "gate") else found


def test_three_traces_vote(model: Artifact, plain: Trace, tmp_path: Path) -> None:
    faulty = own.record(Louder({"model": model}, Arithmetic.of().policy), PROMPTS, tmp_path / "faulty")
    found = compare_traces(
        {"a": plain, "b": faulty, "c": transformers.trace(model.path, PROMPTS, tmp_path / "c")}
    )
    assert [pair["b"] for pair in found["pairs"]] == ["b", "c"]
    (odd,) = found["vote"]["odd"]
    assert (odd["source"], odd["layer"], odd["tap"]) == ("b", 1, "ffn_gate")
