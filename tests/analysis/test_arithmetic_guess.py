"""Traces whose arithmetic nobody declares: every policy of ours, transformers, llama.cpp, planted sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.analysis.test_comparison import rewritten
from tests.forward.models import write_model

from driftscope.analysis.arithmetic_guess import Guess, answer_of, guess_arithmetic
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import llama_cpp, own, transformers
from driftscope.engines.trace import Trace
from driftscope.forward.architecture import site_tensor
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass

PROMPTS = [("a", [5, 9, 200, 7, 7, 41, 300, 2]), ("b", [3, 17, 90, 12])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """One model with biases and rows of 256, as float32 and in two block formats."""
    folder = tmp_path_factory.mktemp("models")
    changes = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}
    teacher = open_artifact(write_model(folder / "teacher", "qwen2", **changes))
    found = {"F32": teacher}
    for scheme in ("Q8_0", "Q4_K_M"):
        write_candidate(teacher, folder / f"{scheme}.gguf", scheme=scheme)
        found[scheme] = open_artifact(folder / f"{scheme}.gguf")
    return found


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize(
    ("weights", "path", "activation"),
    [
        ("F32", "f32", None),
        ("F32", "f32", "f16"),
        ("F32", "f32", "bf16"),
        ("F32", "f32", "q8_0"),
        ("F32", "f32", "q8_K"),
        ("F32", "f32", "apr_q8k"),
        ("Q8_0", "f32", None),
        ("Q8_0", "int8-dot", None),
        ("Q8_0", "f32", "bf16"),
        ("Q4_K_M", "f32", None),
        ("Q4_K_M", "int8-dot", None),
        ("Q4_K_M", "int8-dot", "apr_q8k"),
        ("Q4_K_M", "f32", "apr_q8k"),
    ],
)
def test_our_own_policies(
    weights: str, path: str, activation: str | None, kv_type: str, models: dict[str, Artifact], tmp_path: Path
) -> None:
    arithmetic = Arithmetic.of(path, activation=activation, kv_type=kv_type)
    found = guess_arithmetic(own.trace(models[weights], PROMPTS, tmp_path, arithmetic), models[weights])
    assert found.products.status == found.kv_type.status == "decided", found.statement
    assert found.arithmetic == arithmetic
    assert found.dtype == "f32"
    assert found.accumulation.winner == "f32"
    assert all(answer.winner == "standard" for answer in found.capture_points.values())
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_transformers(dtype: str, name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    trace = transformers.trace(
        folder, PROMPTS, tmp_path / "trace", transformers.TransformersOptions(dtype=dtype)
    )
    found = guess_arithmetic(trace, open_artifact(folder))
    assert found.arithmetic == Arithmetic.of("f32", dtype=dtype), found.statement
    assert found.dtype == dtype
    assert found.products.status == "decided"
    assert (found.products.margin or 0) > 1
    assert all(answer.winner == "standard" for answer in found.capture_points.values()), found.statement


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_K_M"])
def test_llama_cpp(scheme: str, kv_type: str, models: dict[str, Artifact], tmp_path: Path) -> None:
    options = llama_cpp.LlamaCppOptions(kv_type=kv_type)
    trace = llama_cpp.trace(models[scheme].path, PROMPTS, tmp_path, options)
    found = guess_arithmetic(trace, models[scheme])
    assert found.arithmetic == Arithmetic.of("int8-dot", kv_type=kv_type), found.statement
    assert (found.products.margin or 0) > 2


@pytest.mark.model
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_llama_cpp_on_the_default_model(kv_type: str, default_gguf: Path, tmp_path: Path) -> None:
    options = llama_cpp.LlamaCppOptions(kv_type=kv_type)
    trace = llama_cpp.trace(default_gguf, [("a", [1, 1780, 314, 216, 34, 27, 34, 47])], tmp_path, options)
    found = guess_arithmetic(trace, open_artifact(default_gguf))
    assert found.arithmetic == Arithmetic.of("int8-dot", kv_type=kv_type)
    assert (found.products.margin or 0) > 4


class Summed(ForwardPass):
    """Products of another program: numpy's, in the type of `total`."""

    total: Callable[[Any, Any], Any]

    def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        ref = self._weights["model"].artifact.tensors[site_tensor(self.config, layer, site)]
        return type(self).total(x, ref.raw().view(np.float32))


class InFloat32(Summed):
    total = staticmethod(lambda x, w: x @ w.T)


class InFloat64(Summed):
    total = staticmethod(lambda x, w: (x.astype(np.float64) @ w.T.astype(np.float64)).astype(np.float32))


def _one_by_one(x: Any, w: Any) -> Any:
    total = np.zeros((len(x), len(w)), np.float16)
    for k in range(x.shape[1]):
        total = (total.astype(np.float32) + x[:, k, None] * w[None, :, k]).astype(np.float16)
    return total.astype(np.float32)


class InFloat16(Summed):
    total = staticmethod(_one_by_one)


@pytest.mark.parametrize(
    ("kind", "accumulation"), [(InFloat32, "f32"), (InFloat64, "wider"), (InFloat16, "f16")]
)
def test_the_type_of_sums(
    kind: type[Summed], accumulation: str, models: dict[str, Artifact], tmp_path: Path
) -> None:
    trace = own.record(kind({"model": models["F32"]}, Arithmetic.of().policy), PROMPTS, tmp_path)
    found = guess_arithmetic(trace, models["F32"])
    assert (found.accumulation.status, found.accumulation.winner) == ("decided", accumulation), (
        found.statement
    )
    assert found.products.winner == "f32"


@pytest.mark.parametrize(
    ("tap", "change", "winner"),
    [
        ("attn_scores", lambda a, key, t: a * np.float32(32**0.5), "not scaled"),
        ("q_post_rope", lambda a, key, t: a * np.float32(32**-0.5), "times the scale"),
        ("qkv_bias", lambda a, key, t: t.tap(_layer(key), "qkv_matmul"), "before the bias"),
        ("qkv_matmul", lambda a, key, t: t.tap(_layer(key), "qkv_bias"), "after the bias"),
        ("post_attn_residual", lambda a, key, t: t.tap(_layer(key), "attn_out"), "before the residual"),
        ("ffn_gate", lambda a, key, t: t.tap(_layer(key), "ffn_silu"), "after the activation"),
        ("ffn_silu", lambda a, key, t: t.tap(_layer(key), "ffn_gate"), "before the activation"),
        ("attn_norm", lambda a, key, t: _before(key, t), "the input of the norm"),
    ],
)
def test_a_tap_that_was_captured_elsewhere(
    tap: str,
    change: Callable[[Any, str, Trace], Any],
    winner: str,
    models: dict[str, Artifact],
    tmp_path: Path,
) -> None:
    plain = own.trace(models["F32"], PROMPTS, tmp_path / "plain", Arithmetic.of())

    def changed(key: str, array: Any) -> Any:
        return change(array, key, plain) if key.split("[")[0].endswith(f".{tap}") else array

    found = guess_arithmetic(rewritten(plain, tmp_path / "changed", changed), models["F32"])
    answer = found.capture_points[tap]
    assert (answer.status, answer.winner) == ("decided", winner)
    assert f"{tap} {winner}" in found.statement


def _layer(key: str) -> int:
    return int(key.split(".")[1])


def _before(key: str, trace: Trace) -> Any:
    layer = _layer(key)
    return trace.tap(layer - 1, "post_ffn_residual") if layer else trace.tap(-1, "embedding")


def test_what_nothing_explains(models: dict[str, Artifact], tmp_path: Path) -> None:
    """The weights are not those that the engine ran."""
    other = open_artifact(
        write_model(
            tmp_path / "other", "qwen2", seed=1, hidden_size=256, num_attention_heads=8, intermediate_size=512
        )
    )
    found = guess_arithmetic(own.trace(other, PROMPTS, tmp_path / "trace", Arithmetic.of()), models["F32"])
    assert found.products.status == "unexplained"
    assert found.arithmetic is None
    assert found.statement.startswith("no arithmetic explains the matmuls")


def test_one_wrong_op_moves_no_margin(models: dict[str, Artifact], tmp_path: Path) -> None:
    class Louder(ForwardPass):
        def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
            found = super().project(layer, site, x)
            return found * np.float32(1.1) if (layer, site) == (1, "gate") else found

    policy = Arithmetic.of("int8-dot", kv_type="f16").policy
    trace = own.record(Louder({"model": models["Q8_0"]}, policy), PROMPTS, tmp_path)
    found = guess_arithmetic(trace, models["Q8_0"])
    assert found.arithmetic == Arithmetic.of("int8-dot", kv_type="f16")


def test_a_trace_without_matmuls(models: dict[str, Artifact], tmp_path: Path) -> None:
    trace = own.trace(
        models["F32"], PROMPTS, tmp_path, Arithmetic.of(), wanted=lambda layer, tap: tap == "ffn_out"
    )
    found: Guess = guess_arithmetic(trace, models["F32"])
    assert found.products.status == "not-tested"
    assert found.arithmetic is None


def test_equal_hypotheses_are_undecided() -> None:
    assert answer_of({"a": [-12.0, -12.0], "b": [-12.2, -12.0], "c": [-12.0]}).status == "undecided"
    found = answer_of({"a": [-12.0, -12.0], "b": [-6.0, -6.0]})
    assert (found.status, found.winner, found.margin) == ("decided", "a", pytest.approx(6.0))
    assert answer_of({"a": [-1.0]}).status == "unexplained"
    assert answer_of({}).status == "not-tested"
