"""Every check: silent on published values, and fires on one odd thing put in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from driftscope.analysis.metadata.facts import TokenizerFacts
from driftscope.analysis.metadata.oddities import CHECKS, PUBLISHED, Oddity, oddities
from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.tensor import TensorRef

# Llama 2 7B as published, but for its layers.
LLAMA = ModelConfig(
    architecture="llama",
    hidden_size=4096,
    num_layers=1,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32000,
    context_length=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
TOKENS = (*(f"t{i}" for i in range(31997)), "<s>", "</s>", "<|im_end|>")
FACTS = TokenizerFacts(
    kind="SentencePiece (llama)",
    tokens=TOKENS,
    special={"bos_token": 31997, "eos_token": 31998},
    add_bos=True,
    chat_template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
)
GGUF = {"general.file_type": 15, "general.quantization_version": 2}

Change = Callable[[Artifact, TokenizerFacts], tuple[Artifact, TokenizerFacts]]


def model(config: ModelConfig, metadata: Mapping[str, Any] = GGUF, dtype: str = "Q4_K") -> Artifact:
    """A complete model; nothing of it is on disk, for nothing of it is read."""
    tensors = {
        name: TensorRef(name, name, shape, dtype if len(shape) == 2 else "F32", Path("m"), 0, 1)
        for name, shape in expected_shapes(config).items()
    }
    return Artifact(Path("m.gguf"), "gguf", config, tensors, metadata=dict(metadata))


def configured(**changes: Any) -> Change:
    return lambda artifact, facts: (model(replace(artifact.config, **changes)), facts)


def relabelled(**changes: Any) -> Change:
    return lambda artifact, facts: (artifact, replace(facts, **changes))


def keyed(key: str, value: Any) -> Change:
    return lambda artifact, facts: (model(artifact.config, {**GGUF, key: value}), facts)


def with_tensors(change: Callable[[dict[str, TensorRef]], object]) -> Change:
    def apply(artifact: Artifact, facts: TokenizerFacts) -> tuple[Artifact, TokenizerFacts]:
        tensors = dict(artifact.tensors)
        change(tensors)
        return replace(artifact, tensors=tensors), facts

    return apply


def stored(name: str, shape: tuple[int, ...], dtype: str = "F32") -> TensorRef:
    return TensorRef(name, name, shape, dtype, Path("m"), 0, 1)


NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.o_proj.bias"

ODD: dict[str, tuple[Change, str, str]] = {
    "eps of another order": (configured(rms_norm_eps=1e-12), "norm-eps", "warning"),
    "eps between two": (configured(rms_norm_eps=5e-6), "norm-eps", "note"),
    "theta": (configured(rope_theta=12345.0), "rope-theta", "note"),
    "theta below one": (configured(rope_theta=0.5), "rope-theta", "warning"),
    "long context, small base": (configured(context_length=131072), "rope-context", "warning"),
    "llama 3.1 without its scaling": (
        configured(rope_theta=5e5, context_length=131072),
        "rope-scaling-lost",
        "warning",
    ),
    "context past the scaling": (
        configured(
            context_length=65536,
            rope_scaling={"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096},
        ),
        "rope-scaling-context",
        "warning",
    ),
    "window past the context": (configured(sliding_window=8192), "sliding-window", "note"),
    "heads wider than the model": (configured(head_dim=160), "head-size", "note"),
    "a tensor is missing": (with_tensors(lambda t: t.pop(NORM)), "missing-tensors", "warning"),
    "a tensor of another shape": (
        with_tensors(lambda t: t.update({NORM: stored(NORM, (4095,))})),
        "tensor-shapes",
        "warning",
    ),
    "a bias too many": (
        with_tensors(lambda t: t.update({BIAS: stored(BIAS, (4096,))})),
        "unexpected-biases",
        "warning",
    ),
    "a name without a place": (
        lambda artifact, facts: (replace(artifact, unmapped=("blk.0.extra.weight",)), facts),
        "unmapped-tensors",
        "warning",
    ),
    "tied, and a head of its own": (
        lambda artifact, facts: (
            replace(artifact, config=replace(artifact.config, tie_word_embeddings=True)),
            facts,
        ),
        "tied-head",
        "warning",
    ),
    "no tokenizer": (relabelled(kind=None, tokens=(), chat_template=None), "tokenizer", "note"),
    "a tokenizer that cannot be read": (relabelled(problem="why"), "tokenizer", "warning"),
    "more tokens than rows": (relabelled(tokens=(*TOKENS, "one more")), "tokens-beyond", "warning"),
    "a few rows without a token": (
        relabelled(tokens=("<s>", "</s>", "<|im_end|>", *TOKENS[3:31900])),
        "rows-without-token",
        "note",
    ),
    "embedding of other rows": (
        with_tensors(
            lambda t: t.update({"model.embed_tokens.weight": stored("e", (32001, 4096), "Q4_K")}),
        ),
        "embedding-rows",
        "warning",
    ),
    "special id out of range": (
        relabelled(special={"bos_token": 31997, "eos_token": 32000}),
        "special-range",
        "warning",
    ),
    "no end": (relabelled(special={"bos_token": 31997}), "eos-missing", "warning"),
    "no beginning": (relabelled(special={"eos_token": 31998}, add_bos=None), "bos-missing", "warning"),
    "a beginning that is not named": (relabelled(special={"eos_token": 31998}), "bos-unnamed", "warning"),
    "beginning is end": (relabelled(special={"bos_token": 31998, "eos_token": 31998}), "bos-is-eos", "note"),
    "the template's tokens": (
        relabelled(chat_template="<|im_start|>{{ messages[0].content }}<|im_end|>"),
        "template-tokens",
        "warning",
    ),
    "two beginnings": (relabelled(chat_template="{{- bos_token }}{{ 1 }}"), "double-bos", "note"),
    "label of another type": (keyed("general.file_type", 7), "file-type", "warning"),
    "label of no type": (keyed("general.file_type", 999), "file-type", "note"),
    "another version of the formats": (
        keyed("general.quantization_version", 1),
        "quantization-version",
        "warning",
    ),
    "alignment": (keyed("general.alignment", 64), "alignment", "note"),
    "a quantized norm": (
        with_tensors(lambda t: t.update({NORM: stored(NORM, (4096,), "Q8_0")})),
        "quantized-vectors",
        "warning",
    ),
}


def found(change: Change | None = None) -> list[Oddity]:
    artifact, facts = model(LLAMA), FACTS
    if change is not None:
        artifact, facts = change(artifact, facts)
    return oddities(artifact, facts)


def test_a_published_model_has_nothing_odd() -> None:
    assert found() == []


@pytest.mark.parametrize("name", ODD)
def test_one_odd_thing_is_found(name: str) -> None:
    change, check, severity = ODD[name]
    by_check = {oddity.check: oddity for oddity in found(change)}
    assert by_check[check].severity == severity
    assert all((by_check[check].where, by_check[check].what, by_check[check].why))


def test_every_check_is_tried() -> None:
    source = Path(CHECKS[0].__code__.co_filename).read_text("utf-8")
    ids = {check for _, check, _ in ODD.values()}
    # Each check names what it finds in a literal of its own.
    assert set(re.findall(r"Oddity\(\s*\"([a-z-]+)\"", source)) == ids


def test_warnings_come_first() -> None:
    def two(artifact: Artifact, facts: TokenizerFacts) -> tuple[Artifact, TokenizerFacts]:
        return configured(rope_theta=12345.0, rms_norm_eps=1e-12)(artifact, facts)

    assert [oddity.severity for oddity in found(two)] == ["warning", "note"]


def test_a_format_that_rows_cannot_hold_explains_the_label() -> None:
    narrow = replace(LLAMA, hidden_size=576, num_heads=9, head_dim=64, num_kv_heads=9, intermediate_size=1504)
    (oddity,) = [o for o in oddities(model(narrow, dtype="Q5_0"), FACTS) if o.check == "file-type"]
    assert oddity.severity == "note"
    assert "another took its place" in oddity.why


@pytest.mark.parametrize("architecture", sorted(PUBLISHED))
def test_the_published_values_of_an_architecture_are_not_odd(architecture: str) -> None:
    usual = PUBLISHED[architecture]
    for eps in usual.eps:
        for theta in usual.theta:
            config = replace(LLAMA, architecture=architecture, rms_norm_eps=eps, rope_theta=theta)
            checks = {oddity.check for oddity in oddities(model(config), FACTS)}
            assert not checks & {"norm-eps", "rope-theta", "rope-context", "head-size"}
