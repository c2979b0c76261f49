"""Replays of clean traces, of traces with one thing wrong, and of traces with taps missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.analysis.replay import OpReplay, Replayer, op_rows
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import llama_cpp, transformers
from driftscope.engines import own as own_engine
from driftscope.engines.trace import Trace
from driftscope.errors import InputError
from driftscope.evidence.schemas import frame_of, validate
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL

PROMPTS = [("a", [5, 9, 200, 7, 7, 41, 300, 2, 11, 90, 12]), ("b", [3]), ("c", [17, 4, 250, 8])]
NAMES = ["llama", "llama-3-scaling", "qwen2", "qwen3", "mistral-window"]

Keep = Callable[[int, str], bool]


@pytest.fixture(scope="module", params=NAMES)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(write_model(tmp_path_factory.mktemp("teacher"), request.param))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model with biases, whose rows fit every format."""
    folder = tmp_path_factory.mktemp("model")
    return open_artifact(write_model(folder, "qwen2", hidden_size=448, intermediate_size=512))


@pytest.fixture(scope="module")
def quantized(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("quantized") / "model.gguf"
    write_candidate(model, path, scheme="Q4_K_M")
    return open_artifact(path)


@pytest.fixture(scope="module")
def integer_trace(quantized: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("trace")
    return own_engine.trace(quantized, PROMPTS, folder, Arithmetic.of("int8-dot", kv_type="f16"))


def scores(rows: list[dict[str, Any]], component: str, *names: str) -> list[float]:
    return [
        row[name] for row in rows if row["component"] == component for name in names if row[name] is not None
    ]


def rows_of(op: OpReplay, trace: Trace, component: str = "engine") -> dict[str, dict[str, Any]]:
    return {row["prompt"]: row for row in op_rows(op, trace, [component], "test")}


@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic.of(),
        Arithmetic.of(activation="bf16", kv_type="f16"),
        Arithmetic.of("int8-dot"),
        Arithmetic.from_dict(
            {
                "path": "int8-dot",
                "kv_type": "f16",
                "overrides": [
                    {"artifact": "model", "path": "f32", "activation": None, "layers": [1], "sites": None},
                    {
                        "artifact": "model",
                        "path": "f32",
                        "activation": "bf16",
                        "layers": None,
                        "sites": ["o"],
                    },
                ],
            }
        ),
    ],
)
def test_our_own_traces_have_no_error_at_all(
    teacher: Artifact, arithmetic: Arithmetic, tmp_path: Path
) -> None:
    write_candidate(teacher, tmp_path / "model.gguf", scheme="Q8_0")
    own = open_artifact(tmp_path / "model.gguf")
    trace = own_engine.trace(own, PROMPTS, tmp_path / "trace", arithmetic)
    replayer = Replayer(trace, own, components=["engine"])
    rows = replayer.rows()
    assert len(replayer.places()) == 3 * 21 + 3
    assert len(rows) == 3 * len(replayer.places())
    assert {row["energy"] for row in rows} == {0.0}
    assert {row["non_finite"] for row in rows} == {0}
    assert all(row["predicted_energy"] > 0 or row["signal_energy"] == 0 for row in rows)


def test_places_are_in_the_order_of_the_pass(model: Artifact, tmp_path: Path) -> None:
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of())
    places = Replayer(trace, model).places()
    assert places[:3] == [(-1, "embedding", ""), (0, "attn_norm", ""), (0, "qkv_matmul", "q")]
    assert places[-2:] == [(-1, "final_norm", ""), (-1, "lm_head", "")]
    assert Replayer(trace, model).places([1])[0] == (1, "attn_norm", "")
    assert {layer for layer, _, _ in Replayer(trace, model).places([1, -1])} == {1, -1}


def test_components_add_up(model: Artifact, quantized: Artifact, integer_trace: Trace) -> None:
    replayer = Replayer(integer_trace, quantized, reference=model)
    for place in replayer.places():
        op = replayer.op(*place)
        parts = [op.recorded] if not isinstance(op.recorded, list) else op.recorded
        for index, recorded in enumerate(parts):

            def at(value: Any, index: int = index) -> Any:
                return value[index] if isinstance(value, list) else value

            total = sum(
                at(sides[0]).astype(np.float64) - at(sides[1])
                for sides in map(op.sides, ("engine", "arithmetic", "model"))
                if sides is not None
            )
            assert np.allclose(total, recorded - at(op.reference), rtol=0, atol=1e-12), place


def test_components_are_what_theory_says(model: Artifact, quantized: Artifact, integer_trace: Trace) -> None:
    rows = Replayer(integer_trace, quantized, reference=model).rows()
    products = [
        row for row in rows if row["tap"] in ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
    ]
    for component in ("arithmetic", "model"):
        found = scores([row for row in products if row["prompt"] == "a"], component, "score")
        assert len(found) == 3 * 7
        assert max(map(abs, found)) < 0.3
    for name, limit in (("score", 0.8), ("score_token", 1.2), ("score_channel", 2.0)):
        for component in ("arithmetic", "model"):
            assert max(scores(rows, component, name)) < limit, (component, name)


def test_rows_meet_the_schema(model: Artifact, quantized: Artifact, integer_trace: Trace) -> None:
    rows = Replayer(integer_trace, quantized, reference=model).rows([0, -1], path="candidate.int8-dot")
    frame = validate(frame_of(rows, "replay"), "replay", Path("replay.parquet"))
    assert set(frame["component"]) == {"engine", "arithmetic", "model"}
    assert set(frame["path"]) == {"candidate.int8-dot"}


def test_the_same_bytes_whatever_the_threads_and_the_chunks(
    model: Artifact, quantized: Artifact, integer_trace: Trace
) -> None:
    whole = Replayer(integer_trace, quantized, reference=model).rows()
    chunks: list[dict[str, Any]] = []
    for layers in ([0, 1], [2], [-1]):
        chunks += Replayer(integer_trace, quantized, reference=model, threads=3).rows(layers)

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("layer", "tap", "part", "component", "prompt"))

    assert sorted(whole, key=key) == sorted(chunks, key=key)


def test_equal_weights_have_no_error_of_the_model(model: Artifact, tmp_path: Path) -> None:
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of())
    replayer = Replayer(trace, model, reference=model, components=["model"])
    op = replayer.op(1, "ffn_up")
    assert op.identical
    assert op.exact is None
    rows = replayer.rows()
    assert {row["energy"] for row in rows} == {0.0}
    assert {row["score"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("change", "taps"),
    [
        ({"rms_norm_eps": 1e-2}, {"attn_norm", "ffn_norm", "final_norm"}),
        ({"rope_theta": 20000.0}, {"q_post_rope", "k_post_rope"}),
        ({"sliding_window": 3}, {"attn_softmax"}),
    ],
)
def test_hyperparameters_are_part_of_the_model(
    model: Artifact, tmp_path: Path, change: Mapping[str, Any], taps: set[str]
) -> None:
    own = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    trace = own_engine.trace(own, PROMPTS, tmp_path, Arithmetic.of())
    rows = Replayer(trace, own, reference=model, components=["engine", "model"]).rows()
    assert {row["tap"] for row in rows if row["component"] == "model" and row["energy"] > 0} == taps
    assert {row["energy"] for row in rows if row["component"] == "engine"} == {0.0}
    wrong = [
        row for row in rows if row["component"] == "model" and row["prompt"] == "a" and row["tap"] in taps
    ]
    assert min(row["score"] for row in wrong) > 2


def test_one_wrong_channel_and_one_wrong_token(model: Artifact, tmp_path: Path) -> None:
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of())
    clean = trace.tap(1, "ffn_out")
    channel, token = clean.copy(), clean.copy()
    channel[:, 31] *= np.float32(1.001)
    token[6] *= np.float32(1.001)
    for wrong, place, name in ((channel, "worst_channel", 31), (token, "worst_position", 6)):
        op = Replayer(trace, model, overrides={(1, "ffn_out"): wrong}).op(1, "ffn_out")
        row = rows_of(op, trace)["a"]
        assert row[place] == name
    assert row["score_token"] > 5
    assert row["score_token"] > row["score"] + 0.5
    row = rows_of(Replayer(trace, model, overrides={(1, "ffn_out"): channel}).op(1, "ffn_out"), trace)["a"]
    assert row["score_channel"] > row["score"] + 1


def test_an_override_is_also_what_later_ops_read(model: Artifact, tmp_path: Path) -> None:
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of())
    wrong = trace.tap(1, "ffn_silu") * np.float32(2)
    replayer = Replayer(trace, model, overrides={(1, "ffn_silu"): wrong})
    found = replayer.op(1, "ffn_swiglu")
    assert np.array_equal(np.asarray(found.declared), wrong * trace.tap(1, "ffn_up"))
    assert found.recomputed == ()


def test_what_is_missing_is_recomputed(quantized: Artifact, tmp_path: Path) -> None:
    gone = {"attn_norm", "ffn_silu", "ffn_swiglu", "attn_scores", "attn_softmax"}
    arithmetic = Arithmetic.of("int8-dot")
    trace = own_engine.trace(
        quantized, PROMPTS, tmp_path, arithmetic, wanted=lambda layer, tap: tap not in gone
    )
    replayer = Replayer(trace, quantized)
    assert not gone & {tap for _, tap, _ in replayer.places()}
    assert replayer.op(1, "qkv_matmul", "k").recomputed == ("attn_norm",)
    assert replayer.op(1, "attention").recomputed == ("attn_scores", "attn_softmax")
    op = replayer.op(1, "ffn_out")
    assert op.recomputed == ("ffn_silu", "ffn_swiglu")
    assert "ffn_swiglu" in op.inputs
    assert {row["energy"] for row in replayer.rows() if row["component"] == "engine"} == {0.0}
    assert {row["recomputed"] for row in replayer.rows([2]) if row["tap"] == "ffn_out"} == {
        "ffn_silu+ffn_swiglu"
    }


def test_a_trace_of_layers_outputs_alone(model: Artifact, tmp_path: Path) -> None:
    kept = ("embedding", "post_ffn_residual", "lm_head")
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of(), wanted=lambda layer, tap: tap in kept)
    rows = Replayer(trace, model, reference=model).rows()
    assert {row["tap"] for row in rows} == set(kept)
    assert {row["energy"] for row in rows if row["component"] == "engine"} == {0.0}


class WrongPass(ForwardPass):
    """An engine with one thing wrong in one layer."""

    def activated(self, layer: int, gate: np.ndarray) -> np.ndarray:
        found = super().activated(layer, gate)
        return np.maximum(gate, 0) if layer == 1 else found


def test_an_error_shows_where_it_is_made_and_nowhere_else(model: Artifact, tmp_path: Path) -> None:
    arithmetic = Arithmetic.of()
    wrong = WrongPass({"model": model}, arithmetic.policy)
    trace = own_engine.record(wrong, PROMPTS, tmp_path, declared=arithmetic)
    rows = Replayer(trace, model, components=["engine"]).rows()
    assert {(row["layer"], row["tap"]) for row in rows if row["energy"] > 0} == {(1, "ffn_silu")}


def test_what_is_not_finite_is_left_out_and_counted(model: Artifact, tmp_path: Path) -> None:
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of())
    broken = trace.tap(1, "ffn_up").copy()
    broken[2, 7], broken[3, 8] = np.nan, np.inf
    replayer = Replayer(trace, model, reference=model, overrides={(1, "ffn_up"): broken})
    row = rows_of(replayer.op(1, "ffn_up"), trace)["a"]
    assert (row["non_finite"], row["count"], row["energy"]) == (2, 11 * 512 - 2, 0.0)
    # The op after it gets the same from us as from the engine, save that the engine had sound values.
    row = rows_of(replayer.op(1, "ffn_swiglu"), trace)["a"]
    assert (row["non_finite"], row["count"]) == (0, 11 * 512 - 2)
    assert all(np.isfinite(row["predicted_energy"]) for row in replayer.rows())


def test_scores_of_keys_to_come_are_of_no_account(model: Artifact, tmp_path: Path) -> None:
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of())
    masked = [
        np.where(np.tile(np.tri(len(part), dtype=bool), 14), part, -np.inf).astype(np.float32)
        for part in trace.ragged(1, "attn_scores")
    ]
    replayer = Replayer(trace, model, overrides={(1, "attn_scores"): masked})
    rows = rows_of(replayer.op(1, "attn_scores"), trace)
    assert {(row["energy"], row["non_finite"]) for row in rows.values()} == {(0.0, 0)}
    assert {row["energy"] for row in rows_of(replayer.op(1, "attn_softmax"), trace).values()} == {0.0}


def test_models_that_do_not_fit(model: Artifact, teacher: Artifact, tmp_path: Path) -> None:
    trace = own_engine.trace(model, PROMPTS, tmp_path, Arithmetic.of())
    with pytest.raises(InputError, match="expected two artifacts of one model"):
        Replayer(trace, model, reference=teacher)
    with pytest.raises(InputError, match="of layer 0 has 448 channels"):
        Replayer(trace, teacher).op(0, "attn_norm")
    with pytest.raises(ValueError, match="'noise'"):
        Replayer(trace, model, components=["noise"])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_traces_of_transformers_are_clean(
    teacher: Artifact, dtype: str, attention: str, tmp_path: Path
) -> None:
    options = transformers.TransformersOptions(dtype=dtype, attention=attention)
    trace = transformers.trace(teacher.path, PROMPTS, tmp_path, options)
    rows = Replayer(trace, teacher, components=["engine", "arithmetic"]).rows()
    for component in ("engine", "arithmetic"):
        assert max(scores(rows, component, "score")) < 1.3
        assert max(scores(rows, component, "score_token")) < 1.7
        assert max(scores(rows, component, "score_channel")) < 2.2
    assert {row["non_finite"] for row in rows} == {0}


@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_K_M", "F16"])
@pytest.mark.parametrize("flash", [False, True])
def test_traces_of_llama_cpp_are_clean(model: Artifact, scheme: str, flash: bool, tmp_path: Path) -> None:
    write_candidate(model, tmp_path / "model.gguf", scheme=scheme)
    own = open_artifact(tmp_path / "model.gguf")
    options = llama_cpp.LlamaCppOptions(flash_attention=flash)
    trace = llama_cpp.trace(own.path, PROMPTS, tmp_path / "trace", options)
    rows = Replayer(trace, own, components=["engine"]).rows()
    assert max(scores(rows, "engine", "score")) < 1.3
    assert max(scores(rows, "engine", "score_token")) < 1.7
    assert max(scores(rows, "engine", "score_channel")) < 2.2


@pytest.mark.model
def test_llama_cpps_trace_of_the_default_model_is_clean(default_gguf: Path, tmp_path: Path) -> None:
    own = open_artifact(default_gguf)
    prompts = [("short", [1, 4093, 198, 1780, 314]), ("long", list(range(1000, 1040)))]
    trace = llama_cpp.trace(default_gguf, prompts, tmp_path)
    rows = Replayer(trace, own).rows()
    for component in ("engine", "arithmetic"):
        assert max(scores(rows, component, "score")) < 1.2, component
        assert max(scores(rows, component, "score_token")) < 2.0, component
        assert max(scores(rows, component, "score_channel")) < 2.5, component
    products = [
        row["nmse"]
        for row in rows
        if row["component"] == "engine" and row["tap"] in ("qkv_matmul", "attn_out", "ffn_out", "lm_head")
    ]
    assert max(products) < 1e-11
    assert {row["layer"] for row in rows} == {WHOLE_MODEL, *range(30)}
