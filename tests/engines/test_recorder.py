from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.forward.models import write_model

from driftscope.engines import transformers as engine
from driftscope.engines.recorder import Recorder
from driftscope.engines.trace import Trace
from driftscope.errors import InputError
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.policy import WHOLE_MODEL

PROMPTS = [("a", [5, 9, 7]), ("b", [1])]

TAPS = {
    "model.embed_tokens": "embedding",
    "model.layers.{layer}.input_layernorm": "attn_norm",
    "model.layers.{layer}.self_attn.q_proj": "qkv_bias.q",
    "model.layers.{layer}.self_attn.k_proj": "qkv_bias.k",
    "model.layers.{layer}.self_attn.v_proj": "qkv_bias.v",
    "model.layers.{layer}.self_attn.o_proj:input": "attention",
    "model.layers.{layer}.self_attn.o_proj": "attn_out",
    "model.layers.{layer}.mlp.down_proj": "ffn_out",
    "model.layers.{layer}": "post_ffn_residual",
    "lm_head": "lm_head",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture
def model(folder: Path) -> Any:
    return engine.load(folder)


def hook_count(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def run(model: Any, ids: list[int]) -> None:
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=False)


def test_a_model_of_transformers(model: Any, folder: Path, tmp_path: Path) -> None:
    """The same taps as the engine that knows the model."""
    with Recorder(
        model,
        TAPS,
        out=tmp_path / "recorded",
        prompts=PROMPTS,
        engine={"name": "mine"},
        about={"architecture": "qwen2"},
        arithmetic=Arithmetic.of(),
        capture_points={"attn_out": "after o_proj"},
    ) as recorder:
        for _, ids in PROMPTS:
            run(model, ids)
    assert hook_count(model) == 0
    found = recorder.trace
    expected = engine.trace(folder, PROMPTS, tmp_path / "traced")
    layers = model.config.num_hidden_layers
    assert len(found.places) == 2 + layers * 6
    for layer, tap in found.places:
        assert np.array_equal(found.tap(layer, tap), expected.tap(layer, tap)), (layer, tap)
    assert found.manifest.engine == {"name": "mine"}
    assert found.manifest.model == {"architecture": "qwen2"}
    assert found.manifest.arithmetic == Arithmetic.of()
    assert found.manifest.capture_points == {"attn_out": "after o_proj"}
    assert not found.manifest.absent


class Home(torch.nn.Module):
    """A model of one's own, without a batch axis and with scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 4)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4).bfloat16() for _ in range(12)])
        self.scores = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).bfloat16()
        for block in self.blocks:
            x = block(x)
        self.scores[0](torch.stack([x @ x.T, x @ x.T + 1]))
        return x


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = Home()
    taps = {"blocks.{layer}": "post_ffn_residual", "scores.{layer}": "attn_scores"}
    outputs = []
    with Recorder(model, taps, out=tmp_path, prompts=PROMPTS) as recorder, torch.no_grad():
        for _, ids in PROMPTS:
            outputs.append(model(ids=torch.tensor(ids)).float().numpy())
    trace = recorder.trace
    assert trace.places == {*((i, "post_ffn_residual") for i in range(12)), (0, "attn_scores")}
    assert np.array_equal(trace.tap(11, "post_ffn_residual"), np.concatenate(outputs))
    rows = trace.ragged(0, "attn_scores")[0]
    assert np.allclose(rows[:, :3] + 1, rows[:, 3:], rtol=0.02)
    assert trace.name == "pytorch"


def test_one_layer_of_one_pass_a_file(model: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    record(model, tmp_path, PROMPTS)
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as stream:
            names = list(stream.keys())
        assert len({name.partition("[")[2] for name in names}) == 1
        assert len({name.split(".")[1] for name in names if name.startswith("layers.")}) <= 1


def record(model: Any, out: Path, runs: list[tuple[str, list[int]]], *, fail: bool = False) -> Trace:
    with Recorder(model, TAPS, out=out, prompts=PROMPTS) as recorder:
        for _, ids in runs:
            run(model, ids)
        if fail:
            raise ZeroDivisionError
    return recorder.trace


def test_after_an_exception_nothing_stays_and_nothing_is_finished(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        record(model, tmp_path, PROMPTS, fail=True)
    assert hook_count(model) == 0
    with pytest.raises(InputError, match=r"there is no trace\.json"):
        Trace(tmp_path)


def test_a_module_that_does_not_run(tmp_path: Path) -> None:
    model = Home()
    model.spare = torch.nn.Linear(4, 4)
    with Recorder(
        model, {"spare": "lm_head", "embed": "embedding"}, out=tmp_path, prompts=PROMPTS
    ) as recorder:
        for _, ids in PROMPTS:
            model(torch.tensor(ids))
    assert recorder.trace.places == {(WHOLE_MODEL, "embedding")}
    assert recorder.trace.manifest.absent == {"lm_head": "its module did not run in every pass"}


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (
            {"model.layers.{layer}.mlp.proj": "ffn_out"},
            "no module of .* is called model.layers.{layer}.mlp.proj",
        ),
        ({"": "lm_head"}, "no module of"),
        ({"model.layers.{layer}.mlp.up_proj": "fnn_up"}, "'fnn_up' is not a tap of a layer; expected one of"),
        ({"model.norm": "ffn_out"}, "'ffn_out' is not a tap of the whole model; expected one of embedding"),
        ({"model.layers.{layer}.self_attn.q_proj": "ffn_out.q"}, "'ffn_out.q' is not a tap"),
        ({"model.norm:output": "final_norm"}, "is no path; expected module or module:input"),
        ({"model.{layer}.{layer}": "ffn_out"}, "is no path"),
        ({"model.norm": "final norm"}, "'final norm' is not a tap"),
        ({"model.norm": "layers.3.final_norm"}, "is not a tap"),
        ({"model.norm": "final_norm[a]"}, "is not a tap"),
    ],
)
def test_taps_that_are_none(taps: dict[str, str], message: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Recorder(model, taps, out=tmp_path, prompts=PROMPTS)


@pytest.mark.parametrize("prompts", [[("a[0]", [1])], [("", [1])], [("a", [])], [("a", [-1])], []])
def test_prompts_that_are_none(prompts: list[Any], model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        Recorder(model, TAPS, out=tmp_path, prompts=prompts)


def test_other_tokens_than_said(model: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="given other tokens than those of the prompt 'a'"),
        Recorder(model, TAPS, out=tmp_path, prompts=PROMPTS),
    ):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert hook_count(model) == 0


@pytest.mark.parametrize("times", [0, 1, 3])
def test_another_number_of_passes(times: int, model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model ran (more than )?\d times"):
        record(model, tmp_path, [*PROMPTS, PROMPTS[0]][:times])


def test_a_batch_of_sequences_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(16, 4))
    with (
        pytest.raises(InputError, match=r"embedding has the shape \[2, 3, 4\] in the prompt 'a' of 6 tokens"),
        Recorder(model, {"0": "embedding"}, out=tmp_path, prompts=[("a", [1] * 6)]),
    ):
        model(torch.ones(2, 3, dtype=torch.int64))


def test_a_module_that_runs_twice(tmp_path: Path) -> None:
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 4), shared, shared)
    with (
        pytest.raises(InputError, match="the module of lm_head ran twice in one pass"),
        Recorder(model, {"1": "lm_head"}, out=tmp_path, prompts=[("a", [1, 2])]),
    ):
        model(torch.tensor([1, 2]))
