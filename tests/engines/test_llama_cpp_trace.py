"""Traces of llama.cpp against transformers and against our own path, tap by tap."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.forward.models import write_model

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.engines import llama_cpp as engine
from driftscope.engines import own
from driftscope.engines import transformers as torch_engine
from driftscope.engines.llama_cpp import LlamaCppOptions
from driftscope.engines.llama_cpp_recorder import Recorder
from driftscope.engines.llama_cpp_taps import TapMap
from driftscope.engines.trace import RAGGED, Trace
from driftscope.errors import InputError
from driftscope.forward.architecture import taps
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import DeclaredOps
from driftscope.forward.ops import Ops
from driftscope.forward.policy import WHOLE_MODEL

FULL = LlamaCppOptions(kv_type="f32")
MODELS = (
    "llama",
    "llama-3-scaling",
    "llama-linear-scaling",
    "mistral-window",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
)
# No longer than the shortest window: llama.cpp ignores windows of these architectures.
PROMPTS = [("ten", list(range(5, 15))), ("one", [7]), ("three", [300, 2, 2])]


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = expected.astype(np.float64), found.astype(np.float64)
    return float(np.square(a - b).sum() / np.square(a).sum())


def values(trace: Trace, layer: int, tap: str, *, causal: bool = False) -> np.ndarray:
    """All values of a tap in one row; `causal` leaves out scores of later keys."""
    if tap not in RAGGED:
        return trace.tap(layer, tap).ravel()
    parts = []
    for part in trace.ragged(layer, tap):
        heads = part.reshape(len(part), -1, len(part))
        parts.append((heads * np.tri(len(part), dtype=np.float32)[:, None] if causal else heads).ravel())
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Model:
    """A small model of F32 weights, and what others make of it."""

    gguf: Path
    ours: Trace
    torch: Trace

    def trace(self, folder: Path, options: LlamaCppOptions = FULL, **arguments: Any) -> Trace:
        return engine.trace(self.gguf, PROMPTS, folder, options, **arguments)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            teacher = open_artifact(write_model(folder / "teacher", name))
            write_candidate(teacher, folder / "model.gguf", scheme="F32")
            made[name] = Model(
                folder / "model.gguf",
                own.trace(teacher, PROMPTS, folder / "ours", Arithmetic.of()),
                torch_engine.trace(folder / "teacher", PROMPTS, folder / "torch"),
            )
        return made[name]

    return model


def check(model: Model, found: Trace, bound: float = 1e-9) -> None:
    expected = {(tap.layer, tap.op.tap) for tap in taps(open_artifact(model.gguf).config)}
    assert found.places == {place for place in expected if place[1] not in found.manifest.absent}
    for layer, tap in found.places:
        for other in (model.ours, model.torch):
            if other.has(layer, tap):
                left, right = (values(trace, layer, tap, causal=True) for trace in (found, other))
                assert nmse(left, right) <= bound, (layer, tap)


@pytest.mark.parametrize("name", MODELS)
def test_every_tap_is_that_of_transformers_and_ours(
    name: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    model = models(name)
    found = model.trace(tmp_path)
    check(model, found)
    assert set(found.manifest.absent) == {"ffn_silu"}
    # In one batch every score is computed, those of later keys too.
    for layer, tap in found.places:
        assert nmse(values(found, layer, tap), values(model.ours, layer, tap)) <= 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 10, 64])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_batches_of_any_size_are_put_together(
    name: str, size: int, models: Callable[[str], Model], tmp_path: Path
) -> None:
    model = models(name)
    found = model.trace(tmp_path, dataclasses.replace(FULL, batch_size=size))
    check(model, found)
    assert ("attn_scores" in found.manifest.capture_points) == (size < 10)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".safetensors") == [".json"]
    if size < 10:
        later = found.ragged(0, "attn_scores")[0].reshape(10, -1, 10)[0, :, size:]
        assert not later.any()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_neither_threads_nor_the_callback_change_a_value(
    name: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    model = models(name)
    batch = TokenBatch.of([ids for _, ids in PROMPTS])
    for options in (FULL, LlamaCppOptions(), LlamaCppOptions(flash_attention=True)):
        one = model.trace(tmp_path / "one", options)
        two = model.trace(tmp_path / "two", dataclasses.replace(options, threads=2))
        for layer, tap in one.places:
            assert np.array_equal(values(one, layer, tap), values(two, layer, tap)), (layer, tap)
        plain = engine.logits(model.gguf, batch, options)
        assert np.array_equal(one.tap(WHOLE_MODEL, "lm_head"), plain)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_flash_attention_has_no_scores_and_is_declared_with_f16(
    name: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    model = models(name)
    for kv_type in ("f32", "f16"):
        found = model.trace(tmp_path, LlamaCppOptions(flash_attention=True, kv_type=kv_type))
        assert set(found.manifest.absent) == {"ffn_silu", "attn_scores", "attn_softmax"}
        assert found.manifest.arithmetic == Arithmetic.of("int8-dot", kv_type="f16")
        check(model, found, 1e-5)


@pytest.mark.parametrize(("kv_type", "flash"), [("f16", False), ("bf16", False), ("q8_0", True)])
def test_types_of_the_cache(
    kv_type: str, flash: bool, models: Callable[[str], Model], tmp_path: Path
) -> None:
    """q8_0 turns the heads of q, k and v before the cache and those of the output back; taps see neither."""
    model = models("mistral-window")  # whose heads are as wide as a block of Q8_0
    found = model.trace(tmp_path, LlamaCppOptions(kv_type=kv_type, flash_attention=flash))
    bound = {"f16": 1e-5, "bf16": 1e-3, "q8_0": 1e-2}[kv_type]
    check(model, found, bound)
    attention = nmse(values(found, 0, "attention"), values(model.ours, 0, "attention"))
    assert attention > bound * 1e-3
    if kv_type == "f16":
        assert found.manifest.arithmetic == Arithmetic.of("int8-dot", kv_type="f16")
    else:
        assert found.manifest.arithmetic is None
        assert kv_type in found.manifest.engine["arithmetic"]


def test_a_cache_of_q8_0_needs_heads_of_whole_blocks(models: Callable[[str], Model], tmp_path: Path) -> None:
    options = LlamaCppOptions(kv_type="q8_0", flash_attention=True)
    with pytest.raises(
        InputError, match=r"cannot make a context of 10 tokens: .*block size 32 does not divide"
    ):
        models("llama").trace(tmp_path, options)


def test_the_manifest_says_what_was_run(models: Callable[[str], Model], tmp_path: Path) -> None:
    options = LlamaCppOptions(kv_type="f32", threads=2, batch_size=4, repack=False)
    manifest = models("qwen2").trace(tmp_path, options, model={"sha256": "abc"}).manifest
    assert manifest.engine["name"] == "llama.cpp"
    assert manifest.engine["version"] == engine.version()
    assert manifest.engine["options"] == dataclasses.asdict(options)
    assert manifest.model == {"file": "model.gguf", "architecture": "qwen2", "sha256": "abc"}
    assert manifest.arithmetic == Arithmetic.of("int8-dot", kv_type="f32")
    assert [prompt for prompt, _ in manifest.prompts] == [prompt for prompt, _ in PROMPTS]


def test_only_the_wanted_taps_are_asked_for_and_written(
    models: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, str]] = []
    take = Recorder.take

    def counted(self: Recorder, tensor: Any) -> None:
        taken.append((tensor.op, tensor.name))
        take(self, tensor)

    monkeypatch.setattr(Recorder, "take", counted)
    wanted = {(1, "ffn_out"), (2, "qkv_bias"), (WHOLE_MODEL, "final_norm")}
    found = models("llama").trace(tmp_path, taps=lambda layer, tap: (layer, tap) in wanted)
    assert found.places == wanted
    one = [("MUL_MAT", "ffn_out-1"), ("MUL_MAT", "Qcur-2"), ("MUL_MAT", "Vcur-2"), ("MUL_MAT", "Kcur-2")]
    assert taken == [*one, ("MUL", "result_norm")] * len(PROMPTS)


def test_no_tap_is_wanted(models: Callable[[str], Model], tmp_path: Path) -> None:
    found = models("llama").trace(tmp_path, taps=lambda layer, tap: False)
    assert not found.places
    assert found.batch.n_tokens == 14


@pytest.mark.parametrize("size", [0, 4])
def test_one_layer_is_in_memory(
    size: int, models: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: set[frozenset[int]] = set()
    flush = Recorder._flush

    def seen(self: Recorder) -> None:
        held.add(frozenset(layer for layer, _, _ in self._arrays))
        flush(self)

    monkeypatch.setattr(Recorder, "_flush", seen)
    models("llama").trace(tmp_path, dataclasses.replace(FULL, batch_size=size))
    assert held == {frozenset(), *(frozenset({layer}) for layer in (-1, 0, 1, 2))}
    for path in tmp_path.glob("*.safetensors"):
        assert len({name.rpartition(".")[0].partition(".q")[0] for name in load_file(path)}) == 1


class PlantedError(Exception):
    """What a consumer raises."""


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("place", [(0, "attn_norm"), (1, "attn_softmax"), (WHOLE_MODEL, "lm_head")])
def test_an_exception_in_the_callback_comes_out_after_the_pass(
    place: tuple[int, str],
    size: int,
    models: Callable[[str], Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    read, calls = TapMap.read, []

    def failing(self: TapMap, found: Any, *arguments: Any) -> Any:
        calls.append((found.layer, found.source.tap))
        if calls[-1] == place:
            raise PlantedError
        return read(self, found, *arguments)

    monkeypatch.setattr(TapMap, "read", failing)
    with pytest.raises(PlantedError):
        models("llama").trace(tmp_path, dataclasses.replace(FULL, batch_size=size))
    assert calls[-1] == place
    assert not (tmp_path / "trace.json").exists()
    assert not (tmp_path / ".batches").exists()
    assert "Exception ignored" not in capfd.readouterr().err


def test_an_exception_while_asked_comes_out_too(models: Callable[[str], Model], tmp_path: Path) -> None:
    def failing(layer: int, tap: str) -> bool:
        raise PlantedError

    with pytest.raises(PlantedError):
        models("llama").trace(tmp_path, taps=failing)


def test_tokens_that_the_model_does_not_have(models: Callable[[str], Model], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.gguf: llama\.cpp cannot decode 2 tokens .*invalid token"):
        engine.trace(models("llama").gguf, [("a", [1, 320])], tmp_path, FULL)


def test_an_unknown_architecture_is_named(models: Callable[[str], Model], tmp_path: Path) -> None:
    artifact = open_artifact(models("llama").gguf)
    strange = dataclasses.replace(artifact, metadata={**artifact.metadata, "general.architecture": "mamba"})
    with pytest.raises(
        InputError, match=r"'mamba' in llama\.cpp are not known; expected one of llama, qwen2"
    ):
        TapMap(strange)
    raw = models("llama").gguf.read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw.replace(b"llama", b"mamba"))
    with pytest.raises(InputError, match="mamba"):
        engine.trace(tmp_path / "model.gguf", PROMPTS, tmp_path / "trace", FULL)


def test_safetensors_are_not_for_llama_cpp(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "teacher", "llama")
    with pytest.raises(InputError, match=r"llama\.cpp reads GGUF files; this model is safetensors"):
        engine.trace(folder, PROMPTS, tmp_path / "trace", FULL)


@pytest.mark.parametrize("heads", [2, 4, 1000])
def test_a_file_that_llama_cpp_would_abort_on(
    heads: int, models: Callable[[str], Model], tmp_path: Path
) -> None:
    """A failed assertion of ggml ends the process, so such a file must not get there."""
    raw = models("qwen2").gguf.read_bytes()
    key = b"qwen2.attention.head_count" + struct.pack("<I", 4)
    assert raw.count(key) == 1
    at = raw.index(key) + len(key)
    (tmp_path / "model.gguf").write_bytes(raw[:at] + struct.pack("<I", heads) + raw[at + 4 :])
    with pytest.raises(InputError, match="has the shape"):
        engine.trace(tmp_path / "model.gguf", PROMPTS, tmp_path / "trace", FULL)


TEXT = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp, and every morning he came "
    "down to write the weather into a book that nobody read. On the third of March the lamp went out."
)


@pytest.mark.model
@pytest.mark.parametrize(
    "options",
    [LlamaCppOptions(), LlamaCppOptions(repack=False, batch_size=3)],
    ids=["default", "stored-batches"],
)
def test_the_default_model(options: LlamaCppOptions, default_gguf: Path, tmp_path: Path) -> None:
    """Complete, in the shapes of the standard, and each op our own op on the recorded inputs."""
    artifact = open_artifact(default_gguf)
    config = artifact.config
    tokenizer = load_tokenizer(artifact)
    prompts = [("long", tokenizer.encode(TEXT)), ("short", tokenizer.encode("What is 2+2?"))]
    found = engine.trace(default_gguf, prompts, tmp_path, options)
    places = list(taps(config))
    assert found.places == {(tap.layer, tap.op.tap) for tap in places if tap.op.tap != "ffn_silu"}
    assert found.manifest.arithmetic is not None
    ops = DeclaredOps(Ops({"model": artifact}, found.manifest.arithmetic.policy))
    batch = found.batch
    stream = found.tap(WHOLE_MODEL, "embedding")
    for layer in range(config.num_layers):
        recorded: dict[str, Any] = {"layer_input": stream}
        for place in (place for place in places if place.layer == layer):
            tap, op = place.op.tap, place.op
            if tap == "ffn_silu":
                recorded[tap] = ops.evaluate(layer, tap, recorded, batch)
                continue
            recorded[tap] = found.ragged(layer, tap) if op.ragged else found.tap(layer, tap)
            if not op.ragged:
                assert recorded[tap].shape == (batch.n_tokens, op.channels)
            expected = ops.evaluate(layer, tap, recorded, batch)
            left = values(found, layer, tap, causal=True)
            assert nmse(left, _joined(expected)) <= 2e-10, (layer, tap)
        # Sums of two float32 are exact to the last bit wherever they are formed.
        residual = stream + recorded["attn_out"]
        assert np.array_equal(recorded["post_attn_residual"], residual)
        assert np.array_equal(recorded["post_ffn_residual"], residual + recorded["ffn_out"])
        stream = recorded["post_ffn_residual"]
    logits = engine.logits(default_gguf, batch, options)
    assert np.array_equal(found.tap(WHOLE_MODEL, "lm_head"), logits)


def _joined(value: Any) -> np.ndarray:
    if not isinstance(value, list):
        return np.asarray(value).ravel()
    parts = [part.reshape(len(part), -1, len(part)) * np.tri(len(part))[:, None] for part in value]
    return np.concatenate([part.ravel() for part in parts])
