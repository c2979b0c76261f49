from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.forward.models import SWITCHES, write_model

from driftscope.artifacts.open import open_artifact
from driftscope.engines import own
from driftscope.engines import transformers as engine
from driftscope.engines.trace import RAGGED, Trace
from driftscope.engines.transformers import TransformersOptions
from driftscope.engines.transformers_taps import _WATCHERS
from driftscope.errors import InputError
from driftscope.forward.architecture import taps
from driftscope.forward.arithmetic import Arithmetic, round_to
from driftscope.forward.evaluate import DeclaredOps, Value
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL, Policy

PROMPTS = [("long", list(range(5, 45))), ("one", [7]), ("short", [300, 2, 2])]

BIASED = ("qwen2", "qwen2-yarn", "qwen2-window")


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = expected.astype(np.float64), found.astype(np.float64)
    return float(np.square(a - b).sum() / np.square(a).sum())


def value(trace: Trace, layer: int, tap: str) -> Value:
    return trace.ragged(layer, tap) if tap in RAGGED else trace.tap(layer, tap)


def flat(trace: Trace, layer: int, tap: str) -> np.ndarray:
    found = value(trace, layer, tap)
    return np.concatenate([part.ravel() for part in found]) if isinstance(found, list) else found.ravel()


def hook_count(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture(scope="module")
def clean(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return engine.trace(qwen2, PROMPTS, tmp_path_factory.mktemp("clean"))


def test_fused_attention_of_torch_cannot_cap(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "gemma2")
    with pytest.raises(InputError, match="does not support an attention implementation"):
        engine.trace(folder, PROMPTS, tmp_path / "trace", TransformersOptions(attention="sdpa"))


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in sorted(SWITCHES)]
    + [(name, "sdpa") for name in sorted(SWITCHES) if name != "gemma2"],
)
def test_every_tap_is_that_of_our_path(name: str, attention: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    ours = own.trace(open_artifact(folder), PROMPTS, tmp_path / "ours", Arithmetic.of())
    found = engine.trace(folder, PROMPTS, tmp_path / "trace", TransformersOptions(attention=attention))
    unseen = {"qkv_matmul"} if name in BIASED else set()
    unseen |= set(RAGGED) if attention == "sdpa" else set()
    assert {place for place in ours.places if place[1] not in unseen} == found.places
    assert set(found.manifest.absent) == unseen
    for layer, tap in found.places:
        assert nmse(flat(found, layer, tap), flat(ours, layer, tap)) <= 1e-10, (layer, tap)
    assert {tap: found.manifest.capture_points[tap] for _, tap in found.places} == {
        place.op.tap: place.op.capture_point
        for place in taps(open_artifact(folder).config)
        if place.op.tap not in unseen
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window", "qwen3"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_the_taps_are_the_bits_that_transformers_gives_itself(dtype: str, name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    found = engine.trace(folder, PROMPTS, tmp_path / "trace", TransformersOptions(dtype=dtype))
    model = engine.load(folder, dtype=dtype)
    layers = model.config.num_hidden_layers
    states = [(WHOLE_MODEL, "embedding"), *((layer, "post_ffn_residual") for layer in range(layers - 1))]
    states.append((WHOLE_MODEL, "final_norm"))
    for (_, ids), tokens, index in zip(PROMPTS, found.batch.slices, range(len(PROMPTS)), strict=True):
        with torch.inference_mode():
            output = model(
                torch.tensor([ids]), use_cache=False, output_hidden_states=True, output_attentions=True
            )
        assert np.array_equal(found.tap(WHOLE_MODEL, "lm_head")[tokens], output.logits[0].float().numpy())
        for place, state in zip(states, output.hidden_states, strict=True):
            assert np.array_equal(found.tap(*place)[tokens], state[0].float().numpy()), place
        for layer, weights in enumerate(output.attentions):
            length = len(ids)
            rows = found.ragged(layer, "attn_softmax")[index].reshape(length, -1, length)
            assert np.array_equal(rows.swapaxes(0, 1), weights[0].float().numpy()), layer


@pytest.mark.parametrize(("dtype", "unit"), [("bf16", 2.0**-8), ("f16", 2.0**-11)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_half_precision_is_off_by_its_roundings(name: str, dtype: str, unit: float, tmp_path: Path) -> None:
    """Each op from the trace's own inputs, with the weights that the model has in that dtype.

    An op of transformers rounds a few times where the declared arithmetic rounds once.
    """
    folder = write_model(tmp_path / "model", name)
    found = engine.trace(folder, PROMPTS, tmp_path / "trace", TransformersOptions(dtype=dtype))
    assert found.manifest.arithmetic == Arithmetic.of(dtype=dtype)
    engine.load(folder, dtype=dtype).float().save_pretrained(tmp_path / "rounded")
    artifact = open_artifact(tmp_path / "rounded")
    ops = DeclaredOps(ForwardPass({"model": artifact}, Policy.uniform("model")), dtype)
    last = artifact.config.num_layers - 1
    errors = []
    for place in taps(artifact.config):
        if not found.has(place.layer, place.op.tap):
            continue
        recorded = flat(found, place.layer, place.op.tap)
        assert np.array_equal(round_to(recorded, dtype), recorded)
        inputs = {}
        for tap in place.op.inputs:
            if tap == "layer_input":
                before = last if place.layer == WHOLE_MODEL else place.layer - 1
                inputs[tap] = value(found, before, "embedding" if before < 0 else "post_ffn_residual")
            elif found.has(place.layer, tap):
                inputs[tap] = value(found, place.layer, tap)
        if set(inputs) < set(place.op.inputs):
            assert place.op.tap == "qkv_bias"
            continue
        declared = ops.evaluate(place.layer, place.op.tap, inputs, found.batch)
        joined = np.concatenate([np.ravel(part) for part in declared])
        errors.append(nmse(recorded, joined))
        assert errors[-1] <= 4 * unit**2, (place.name, errors[-1] / unit**2)
    assert max(errors) > 0


def test_one_layer_of_one_prompt_a_file(clean: Trace) -> None:
    from safetensors import safe_open

    for path in sorted(clean.folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as stream:
            names = list(stream.keys())
        layers = {name.split(".")[1] for name in names if name.startswith("layers.")}
        assert len({name.partition("[")[2] for name in names}) == 1
        assert len(layers) == (0 if "whole" in path.name else 1)


def test_the_manifest_says_what_ran(clean: Trace) -> None:
    assert clean.manifest.engine == {
        "name": "transformers",
        "version": engine.version(),
        "options": {"dtype": "f32", "attention": "eager", "device": "cpu", "threads": 1},
    }
    assert clean.manifest.arithmetic == Arithmetic.of()
    assert clean.manifest.model["architecture"] == "qwen2"
    assert "inside of torch's linear" in clean.manifest.absent["qkv_matmul"]


def test_the_same_bytes_again(qwen2: Path, clean: Trace, tmp_path: Path) -> None:
    again = engine.trace(qwen2, PROMPTS, tmp_path / "again", model=engine.load(qwen2))
    for path in sorted(clean.folder.iterdir()):
        assert (again.folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_what_is_wanted(qwen2: Path, tmp_path: Path) -> None:
    found = engine.trace(
        qwen2, PROMPTS, tmp_path / "trace", wanted=lambda layer, tap: tap == "attn_out" and layer == 1
    )
    assert found.places == {(1, "attn_out")}
    assert not found.manifest.absent


def test_nothing_stays_on_the_model(qwen2: Path, tmp_path: Path) -> None:
    model = engine.load(qwen2, attention="sdpa").train()
    seen: list[Any] = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    threads = torch.get_num_threads()
    engine.trace(qwen2, PROMPTS[1:], tmp_path / "trace", TransformersOptions(threads=2), model=model)
    assert hook_count(model) == 1
    assert len(seen) == 2
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert torch.get_num_threads() == threads
    assert not _WATCHERS


def test_nothing_stays_after_an_exception(qwen2: Path, tmp_path: Path) -> None:
    model = engine.load(qwen2)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        engine.trace(qwen2, PROMPTS, tmp_path / "trace", model=model)
    handle.remove()
    assert hook_count(model) == 0
    assert model.config._attn_implementation == "eager"
    assert not _WATCHERS
    with pytest.raises(InputError, match=r"there is no trace\.json"):
        Trace(tmp_path / "trace")
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[0][1]]), use_cache=False).logits
    assert torch.isfinite(logits).all()


def apart(found: Trace, clean: Trace) -> set[tuple[int, str]]:
    """Places whose values differ."""
    places = found.places & clean.places
    return {place for place in places if not np.array_equal(flat(found, *place), flat(clean, *place))}


def double_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def drop_bias(model: Any) -> None:
    torch.nn.init.zeros_(model.model.layers[1].self_attn.q_proj.bias)


def swap_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()


def negate_after(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, inputs, output: -output)


@pytest.mark.parametrize(
    ("patch", "first"),
    [
        (double_scale, "attn_scores"),
        (drop_bias, "qkv_bias"),
        (swap_activation, "ffn_silu"),
        (negate_after, "ffn_out"),
    ],
)
def test_a_patched_model_is_traced_as_it_is(
    patch: Callable[[Any], None], first: str, qwen2: Path, clean: Trace, tmp_path: Path
) -> None:
    model = engine.load(qwen2)
    patch(model)
    found = engine.trace(qwen2, PROMPTS, tmp_path / "trace", model=model)
    assert found.places == clean.places
    order = [place.op.tap for place in taps(open_artifact(qwen2).config) if place.layer == 1]
    places = apart(found, clean)
    assert next(tap for tap in order if (1, tap) in places) == first
    assert not any(layer == 0 for layer, _ in places)
    if patch is double_scale:
        assert np.array_equal(flat(found, 1, "attn_scores"), 2 * flat(clean, 1, "attn_scores"))


def test_an_attention_function_of_the_caller_is_watched(qwen2: Path, clean: Trace, tmp_path: Path) -> None:
    def half_scores(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        group = module.num_key_value_groups
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = (query.half() @ key.half().transpose(2, 3)).float() * scaling
        scores += attention_mask[:, :, :, : key.shape[2]]
        return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("test_half_scores", half_scores)
    transformers.AttentionMaskInterface.register(
        "test_half_scores", transformers.AttentionMaskInterface()["eager"]
    )
    model = engine.load(qwen2)
    model.set_attn_implementation("test_half_scores")
    found = engine.trace(qwen2, PROMPTS, tmp_path / "trace", model=model)
    assert found.manifest.engine["options"]["attention"] == "test_half_scores"
    assert model.config._attn_implementation == "test_half_scores"
    assert found.places == clean.places
    assert 1e-9 < nmse(flat(found, 0, "attn_scores"), flat(clean, 0, "attn_scores")) < 1e-5
    weights = found.ragged(0, "attn_softmax")[0].reshape(40, -1, 40).astype(np.float64)
    assert np.allclose(weights.sum(axis=2), 1, atol=1e-6)


def test_scores_are_not_guessed_where_the_mask_is_not_added(qwen2: Path, tmp_path: Path) -> None:
    def filled(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        group = module.num_key_value_groups
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = (query @ key.transpose(2, 3)) * scaling
        weights = scores.masked_fill(attention_mask < 0, -torch.inf).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), weights

    transformers.AttentionInterface.register("test_filled", filled)
    transformers.AttentionMaskInterface.register(
        "test_filled", transformers.AttentionMaskInterface()["eager"]
    )
    model = engine.load(qwen2)
    model.set_attn_implementation("test_filled")
    found = engine.trace(qwen2, PROMPTS[:1], tmp_path / "trace", model=model)
    assert not found.has(0, "attn_scores")
    assert "does not compute it where it is looked for" in found.manifest.absent["attn_scores"]
    assert found.has(2, "attn_softmax")


def test_a_layer_that_is_not_run_has_no_taps(qwen2: Path, tmp_path: Path) -> None:
    model = engine.load(qwen2)
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    found = engine.trace(qwen2, PROMPTS, tmp_path / "trace", model=model)
    assert {tap for layer, tap in found.places if layer == 1} == {"post_ffn_residual"}
    assert found.manifest.absent["ffn_out"].endswith("(layers 1)")


def test_a_module_that_two_layers_share_is_told_apart(qwen2: Path, clean: Trace, tmp_path: Path) -> None:
    model = engine.load(qwen2)
    for layer in model.model.layers:
        layer.mlp.act_fn = model.model.layers[0].mlp.act_fn
    found = engine.trace(qwen2, PROMPTS, tmp_path / "trace", model=model)
    assert not apart(found, clean)
    assert found.places == clean.places


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="'gpt2' has no taps; expected one of llama, mistral, qwen2, qwen3"):
        engine.trace(tmp_path, PROMPTS, tmp_path / "trace", model=model)


def test_another_layout_is_refused(qwen2: Path, tmp_path: Path) -> None:
    model = engine.load(qwen2)
    del model.model.layers[2].mlp.up_proj
    with pytest.raises(InputError, match=r"no module model\.layers\.2\.mlp\.up_proj"):
        engine.trace(qwen2, PROMPTS, tmp_path / "trace", model=model)
    assert hook_count(model) == 0


def test_a_weight_that_is_missing_is_not_made_up(qwen2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((qwen2 / "config.json").read_bytes())
    weights = load_file(qwen2 / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"
    ):
        engine.load(tmp_path)


def test_a_name_is_not_looked_up_in_a_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder; expected a safetensors model"):
        engine.load(tmp_path / "organisation" / "model")


def test_loading_is_silent_and_later_bars_are_not(qwen2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers.utils.logging.is_progress_bar_enabled()
    engine.load(qwen2)
    assert transformers.utils.logging.is_progress_bar_enabled() == before
    assert capfd.readouterr().err == ""


def test_a_cut_file_is_refused(qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((qwen2 / "config.json").read_bytes())
    data = (qwen2 / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="transformers cannot load the model"):
        engine.load(tmp_path)


def test_no_code_of_the_folder_is_run(qwen2: Path, tmp_path: Path) -> None:
    import json

    for path in qwen2.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "planted.Planted", "AutoConfig": "planted.Planted"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    engine.trace(tmp_path, PROMPTS[1:2], tmp_path / "trace")
    assert not (tmp_path / "ran").exists()


def test_options_that_are_none() -> None:
    with pytest.raises(InputError, match="attention 'flash' is unknown; expected one of eager, sdpa"):
        TransformersOptions(attention="flash")
    with pytest.raises(InputError, match="dtype 'f64' is unknown"):
        TransformersOptions(dtype="f64")
    with pytest.raises(InputError, match="threads is 0"):
        TransformersOptions(threads=0)


def test_a_model_of_another_dtype_than_declared(qwen2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model has torch\.bfloat16; the options say f32"):
        engine.trace(qwen2, PROMPTS, tmp_path / "trace", model=engine.load(qwen2, dtype="bf16"))


def test_a_token_outside_of_the_vocabulary(qwen2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="token id 320 is outside of the vocabulary of 320 tokens"):
        engine.trace(qwen2, [("a", [1, 320])], tmp_path / "trace")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(qwen2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch finds no CUDA device"):
        engine.trace(qwen2, PROMPTS, tmp_path / "trace", TransformersOptions(device="cuda"))
