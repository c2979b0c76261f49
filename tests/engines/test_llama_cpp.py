"""Our ops and the ``int8-dot`` path against llama.cpp on the same GGUF file.

Op by op, from llama.cpp's own inputs, the two agree to rounding. Whole passes cannot: one activation that
rounds to the other side of a step is an error of a step, so any difference in the last bit grows within a few
layers to the size of the quantization noise itself. How far llama.cpp is from itself with another
type of key-value cache is the yardstick for that.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.artifacts.chat import render_chat
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.engines import llama_cpp as engine
from driftscope.errors import InputError
from driftscope.forward.architecture import site_shape, site_tensor
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL, Choice, Policy
from driftscope.forward.rotary import rope_frequencies
from driftscope.forward.taps import Collector
from driftscope.forward.weights import Weights
from driftscope.kernels import forward as kernels

LAYERS = (0, 7, 29)
INT8, F32 = Choice("candidate", "int8-dot"), Choice("candidate", "f32")
TEXT = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp, and every morning he came "
    "down to write the weather into a book that nobody read. On the third of March the lamp went out."
)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.model) for name in ("Q4_1", "Q4_K_M")]
)
def candidate(
    request: pytest.FixtureRequest, default_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The default model as it comes, and quantized to Q4_K_M (so q8_0, q8_1, q8_K activations)."""
    if request.param == "Q4_1":
        return open_artifact(default_gguf)
    path = tmp_path_factory.mktemp("candidate") / "model.gguf"
    write_candidate(open_artifact(default_gguf), path, scheme="Q4_K_M")
    return open_artifact(path)


@pytest.fixture(scope="module")
def batch(default_gguf: Path) -> TokenBatch:
    """The prompts of the default configuration, and a longer text."""
    source = open_artifact(default_gguf)
    tokenizer = load_tokenizer(source)
    chat = render_chat(
        source.metadata["tokenizer.chat_template"],
        [
            {"role": "system", "content": "You are a helpful coding assistant."},
            {"role": "user", "content": "Write a Python function to compute the nth Fibonacci number."},
        ],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    texts = ("What is 2+2?", "Hello, my name is", "def fibonacci(n):", chat, TEXT)
    return TokenBatch.of([tokenizer.encode(text) for text in texts])


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = expected.astype(np.float64), found.astype(np.float64)
    return float(np.square(a - b).sum() / np.square(a).sum())


def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(a || b) of the next-token distributions at every position, in nats."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        values = logits.astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        result: np.ndarray = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
        return result

    p, q = log_softmax(a), log_softmax(b)
    result: np.ndarray = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def traced(
    path: Path, batch: TokenBatch, kv_type: str = "f32", *, repack: bool = True
) -> dict[str, list[np.ndarray]]:
    """Every tensor of llama.cpp's graph for the last sequence of the batch."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    engine.logits(
        path,
        TokenBatch.of([batch.ids[batch.slices[-1]].tolist()]),
        engine.LlamaCppOptions(kv_type=kv_type, repack=repack),
        observer=lambda name, array: found[name].append(array.copy()),
    )
    return found


@pytest.fixture(scope="module")
def trace(candidate: Artifact, batch: TokenBatch) -> dict[str, list[np.ndarray]]:
    return traced(candidate.path, batch)


def test_every_matmul_is_llama_cpps(
    candidate: Artifact,
    batch: TokenBatch,
    trace: dict[str, list[np.ndarray]],
    record_property: pytest.RecordProperty,
) -> None:
    """From llama.cpp's own input; the f32 path, for comparison, is off by the activation's rounding.

    With the weights repacked where llama.cpp has a layout for it, its default, and as they are stored.
    How far the two routes are apart from one input (the first layer's, before they can differ) is recorded.
    """
    weights, config = Weights(candidate), candidate.config
    inputs = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "o": "kqv_out"}
    inputs |= {"gate": "ffn_norm", "up": "ffn_norm", "down": "ffn_swiglu"}
    outputs = {"q": "Qcur", "k": "Kcur", "v": "Vcur", "o": "attn_out"}
    outputs |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_out"}
    plain = traced(candidate.path, batch, repack=False)
    for route, found in (("default", trace), ("stored", plain)):
        errors = []
        for layer in range(config.num_layers):
            for site, source in inputs.items():
                name, shape = site_tensor(config, layer, site), site_shape(config, site)
                x, expected = found[f"{source}-{layer}"][0], found[f"{outputs[site]}-{layer}"][0]
                order = candidate.tensors[name].row_order()
                if order is not None:
                    expected = expected[:, order]
                errors.append(nmse(weights.matmul(x, name, shape, INT8), expected))
                assert errors[-1] <= 1e-12, (route, layer, site, errors[-1])
                if layer in LAYERS and found is trace:
                    path_a = nmse(weights.matmul(x, name, shape, F32), expected)
                    assert errors[-1] * 1e4 <= path_a, (layer, site, errors[-1])
        name, shape = site_tensor(config, WHOLE_MODEL, "lm_head"), site_shape(config, "lm_head")
        logits = weights.matmul(found["result_norm"][0], name, shape, INT8)
        errors.append(nmse(logits, found["result_output"][0]))
        assert errors[-1] <= 1e-12, (route, errors[-1])
        record_property(f"nmse_from_{route}_route", max(errors))
    assert np.array_equal(trace["attn_norm-0"][0], plain["attn_norm-0"][0])
    apart = [nmse(trace[f"{outputs[site]}-0"][0], plain[f"{outputs[site]}-0"][0]) for site in "qkv"]
    record_property("nmse_between_routes", max(apart))
    assert max(apart) <= 1e-12


def test_what_is_between_the_matmuls_is_llama_cpps(
    candidate: Artifact, batch: TokenBatch, trace: dict[str, list[np.ndarray]]
) -> None:
    config = candidate.config
    heads = {"n_heads": config.num_heads, "n_kv_heads": config.num_kv_heads}
    half = traced(candidate.path, batch, "f16")
    tokens = batch.slices[-1].stop - batch.slices[-1].start
    tables = kernels.rope_tables(rope_frequencies(config), tokens)
    for layer in LAYERS:
        weight = Weights(candidate).vector(f"model.layers.{layer}.input_layernorm.weight", config.hidden_size)
        before = trace["embd"][0] if layer == 0 else trace[f"l_out-{layer - 1}"][0]
        found = kernels.rms_norm(before, weight, config.rms_norm_eps)
        assert nmse(found, trace[f"attn_norm-{layer}"][0]) <= 1e-13
        for site, name in (("q", "Qcur"), ("k", "Kcur")):
            order = candidate.tensors[site_tensor(config, layer, site)].row_order()
            assert order is not None
            flat, *_, turned = trace[f"{name}-{layer}"]
            found = kernels.rope(flat[:, order], *tables, np.arange(tokens))
            # llama.cpp multiplies its way up the frequencies, which costs it a few float32 steps.
            assert nmse(found, turned.reshape(flat.shape)[:, order]) <= 1e-11
        for kv_type, recorded, bound in (("f32", trace, 1e-12), ("f16", half, 1e-7)):
            # In whichever order the channels are: q and k have the same.
            q, k = (recorded[f"{name}-{layer}"][-1].reshape(tokens, -1) for name in ("Qcur", "Kcur"))
            v = recorded[f"Vcur-{layer}"][0]
            found = kernels.attention(
                q, k, v, np.array([0, tokens]), scale=config.head_dim**-0.5, kv_type=kv_type, **heads
            )
            assert nmse(found, recorded[f"kqv_out-{layer}"][0]) <= bound
            if kv_type == "f16":
                plain = kernels.attention(
                    q, k, v, np.array([0, tokens]), scale=config.head_dim**-0.5, **heads
                )
                assert nmse(plain, recorded[f"kqv_out-{layer}"][0]) > 2 * nmse(
                    found, recorded[f"kqv_out-{layer}"][0]
                )
        found = kernels.swiglu(trace[f"ffn_gate-{layer}"][0], trace[f"ffn_up-{layer}"][0])
        assert nmse(found, trace[f"ffn_swiglu-{layer}"][0]) <= 1e-13


def test_the_int8_path_starts_out_much_nearer_than_the_f32_path(
    candidate: Artifact, batch: TokenBatch, trace: dict[str, list[np.ndarray]]
) -> None:
    last = TokenBatch.of([batch.ids[batch.slices[-1]].tolist()])
    errors = {}
    for choice in (INT8, F32):
        tap = Collector(lambda name: name == "layers.0.post_attn_residual")
        forward = ForwardPass({"candidate": candidate}, Policy(choice))
        forward.run_layers(forward.embed(last), last, [0], tap)
        errors[choice.path] = nmse(tap.arrays["layers.0.post_attn_residual"], trace["ffn_inp-0"][0])
    assert errors["int8-dot"] * 5 <= errors["f32"]


@pytest.mark.slow
def test_whole_passes(candidate: Artifact, batch: TokenBatch, record_property: pytest.RecordProperty) -> None:
    """The same greedy token for every prompt, and no farther from llama.cpp than llama.cpp is from itself."""
    half = engine.logits(candidate.path, batch, engine.LlamaCppOptions(kv_type="f16"))
    full = engine.logits(candidate.path, batch, engine.LlamaCppOptions(kv_type="f32"))
    policy = Policy(INT8)
    ours = {
        "f32": ForwardPass({"candidate": candidate}, policy).run(batch),
        "f16": ForwardPass({"candidate": candidate}, dataclasses.replace(policy, kv_type="f16")).run(batch),
    }
    lasts = [tokens.stop - 1 for tokens in batch.slices]
    itself = kl(half, full)
    record_property("kl_llama_f16_llama_f32", itself.tolist())
    for kv_type, theirs in (("f16", half), ("f32", full)):
        divergence = kl(theirs, ours[kv_type])
        record_property(f"kl_llama_int8_{kv_type}", divergence.tolist())
        assert np.array_equal(theirs[lasts].argmax(axis=1), ours[kv_type][lasts].argmax(axis=1))
        assert divergence.mean() <= 2 * itself.mean() <= 0.04
        assert (theirs.argmax(axis=1) == ours[kv_type].argmax(axis=1)).mean() >= 0.9


@pytest.mark.parametrize(
    "name", ["llama", "llama-3-scaling", "llama-linear-scaling", "qwen2", "qwen2-yarn", "qwen3"]
)
def test_float32_weights_agree_through_the_whole_pass(name: str, tmp_path: Path) -> None:
    """Nothing is rounded to steps, so nothing grows. (Windows are left out: llama.cpp ignores them here.)"""
    teacher = open_artifact(write_model(tmp_path / "teacher", name))
    write_candidate(teacher, tmp_path / "model.gguf", scheme="F32")
    candidate = open_artifact(tmp_path / "model.gguf")
    ids = np.random.Generator(np.random.Philox(3)).integers(0, candidate.config.vocab_size, 180).tolist()
    batch = TokenBatch.of([ids[:3], ids])
    expected = engine.logits(candidate.path, batch, engine.LlamaCppOptions(kv_type="f32"))
    for choice in (INT8, F32):
        found = ForwardPass({"candidate": candidate}, Policy(choice)).run(batch)
        assert nmse(found, expected) <= 1e-10
        assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    found = ForwardPass({"teacher": teacher}, Policy.uniform("teacher")).run(batch)
    assert nmse(found, expected) <= 1e-10


def test_options_reach_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_candidate(open_artifact(write_model(tmp_path / "teacher", "llama")), path, scheme="F32")
    batch = TokenBatch.of([list(range(40))])
    full = engine.LlamaCppOptions(kv_type="f32")
    plain = engine.logits(path, batch, full)
    assert np.array_equal(plain, engine.logits(path, batch, full))
    assert 1e-9 < nmse(engine.logits(path, batch), plain) < 1e-4
    flash = engine.logits(path, batch, engine.LlamaCppOptions(flash_attention=True))
    assert 1e-9 < nmse(flash, plain) < 1e-4


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(InputError, match=r"model\.gguf: llama\.cpp cannot load the file"):
        engine.logits(tmp_path / "model.gguf", TokenBatch.of([[1]]))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"pip install 'driftscope\[llama-cpp\]'"):
        engine.version()


def test_the_version_says_how_it_was_built() -> None:
    version = engine.version()
    assert version["llama-cpp-python"][0].isdigit()
    assert "CPU" in version["system"]
