"""Files that we write, against llama.cpp running them, for each architecture and format.

Whole passes of rounded activations cannot agree bit for bit (`tests.engines.test_llama_cpp`): how far
llama.cpp is from itself with a float16 key-value cache is the yardstick. Weights in float32 leave nothing to
round, so that there each thing that llama.cpp does otherwise shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.forward.models import write_model
from tests.forward.test_against_transformers import nmse, random_batch

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import llama_cpp as engine
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy
from driftscope.kernels.forward import gelu, to_f16

INT8 = Policy.uniform("model", "int8-dot")
F32_CACHE = engine.LlamaCppOptions(kv_type="f32")

# Rows of a whole block of the K formats, and the factor of the scores that llama.cpp knows for Gemma.
_WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "final_logit_softcapping": 30.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3-scaling": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    # llama.cpp ignores phi3's window, and mistral's.
    "phi3": {"sliding_window": None},
    "phi3-partial": {},
}
SCHEMES = ("F32", "BF16", "Q8_0", "Q4_K_M")


def written(folder: Path, name: str, scheme: str, **changes: Any) -> Artifact:
    """A random model as a GGUF file."""
    teacher = open_artifact(write_model(folder / "teacher", name, **{**_WIDE, **changes}))
    write_candidate(teacher, folder / f"{scheme}.gguf", scheme=scheme)
    return open_artifact(folder / f"{scheme}.gguf")


class TableGelu(ForwardPass):
    """GELU as ggml has it: looked up by a float16, a float16; nothing below -10, the argument beyond 10."""

    def activated(self, layer: int, gate: np.ndarray) -> np.ndarray:
        found = to_f16(gelu(to_f16(gate)))
        return np.where(gate <= -10, np.float32(0), np.where(gate >= 10, gate, found))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_file_is_llama_cpps(
    name: str, scheme: str, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    model = written(tmp_path, name, scheme, **MODELS[name])
    batch = random_batch((1, 60, 24), model.config.vocab_size, seed=5)
    found = ForwardPass({"model": model}, INT8).run(batch)
    expected = engine.logits(model.path, batch, F32_CACHE)
    other = engine.logits(model.path, batch)
    error, noise = float(nmse(found, expected)), float(nmse(other, expected))
    record_property("nmse", error)
    record_property("nmse_of_llama_cpp_to_itself", noise)
    assert error <= 1.5 * noise <= 1e-2
    same = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    assert same >= (other.argmax(axis=1) == expected.argmax(axis=1)).mean() - 0.05
    if scheme == "F32":
        # Here all are near, but for the table.
        uses_table = model.config.activation == "gelu_tanh"
        near = TableGelu({"model": model}, INT8).run(batch) if uses_table else found
        # An argument that rounds to the other float16 is an error of a step.
        assert nmse(near, expected, axis=1).max() <= (1e-8 if uses_table else 1e-9)
        assert nmse(near, expected) <= 1e-10
        assert np.array_equal(near.argmax(axis=1), expected.argmax(axis=1))
        if uses_table:
            assert 20 * nmse(near, expected) < error < 1e-7


def test_the_window_of_phi3_is_not_llama_cpps(tmp_path: Path) -> None:
    """A known deviation: llama.cpp reads the window of phi3 and of mistral and does not use it."""
    model = written(tmp_path, "phi3", "F32")
    assert model.config.sliding_window == 17
    batch = random_batch((17, 40), model.config.vocab_size, seed=6)
    found = ForwardPass({"model": model}, INT8).run(batch)
    by_token = nmse(found, engine.logits(model.path, batch, F32_CACHE), axis=1)
    inside = batch.positions < 17
    assert by_token[inside].max() <= 1e-9
    assert by_token[~inside].min() >= 1e-4


def test_longrope_is_llama_cpps_for_a_context_as_long_as_the_prompt(tmp_path: Path) -> None:
    """llama.cpp chooses the factors by the context that it makes room for, in steps of 256 tokens."""
    half = 24
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": np.linspace(1.0, 1.3, half).tolist(),
        "long_factor": np.linspace(1.1, 8.0, half).tolist(),
    }
    length = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    model = written(tmp_path, "phi3-longrope", "F32", rope_parameters=parameters, **length)
    short, long = ([int(i) for i in random_batch((n,), 320, seed=n).ids] for n in (40, 270))

    def errors(*sequences: list[int]) -> np.ndarray:
        batch = TokenBatch.of(sequences)
        found = ForwardPass({"model": model}, INT8).run(batch)
        return nmse(found, engine.logits(model.path, batch, F32_CACHE), axis=1)

    assert errors(short).max() <= 1e-9
    assert errors(long).max() <= 1e-9
    # Beside a long prompt llama.cpp turns a short one by the long factors too; transformers does not.
    together = errors(short, long)
    assert together[40:].max() <= 1e-9
    assert together[1:40].max() >= 1e-4
