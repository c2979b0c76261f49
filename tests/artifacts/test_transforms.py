"""What may lie between stored bytes and canonical values: the table, against what the writers do."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.helpers.tiny_gguf import tiny_tensors, write_gguf

from driftscope.artifacts import transforms
from driftscope.artifacts.names import GGUF_ARCHITECTURES, suffix_of
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.transforms import (
    ANYWHERE,
    GGUF,
    HUGGING_FACE,
    LABELS,
    InterleavedRows,
    Offset,
    Split,
    applied,
    stored_as,
    value_offset,
)

# llama.cpp's own converter (``conversion/llama.py``, ``gemma.py``, ``phi.py``), said once more by hand.
EXPECTED = {
    "llama": {
        "self_attn.q_proj.weight": ("rows-interleaved",),
        "self_attn.k_proj.weight": ("rows-interleaved",),
    },
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "input_layernorm.weight": ("offset+1",),
        "post_attention_layernorm.weight": ("offset+1",),
        "pre_feedforward_layernorm.weight": ("offset+1",),
        "post_feedforward_layernorm.weight": ("offset+1",),
        "model.norm.weight": ("offset+1",),
    },
    "phi3": {
        "self_attn.q_proj.weight": ("split",),
        "self_attn.k_proj.weight": ("split",),
        "self_attn.v_proj.weight": ("split",),
        "mlp.gate_proj.weight": ("split",),
        "mlp.up_proj.weight": ("split",),
    },
}
EXPECTED["gemma3"] = EXPECTED["gemma2"] | {
    "self_attn.q_norm.weight": ("offset+1",),
    "self_attn.k_norm.weight": ("offset+1",),
}


@pytest.mark.parametrize("architecture", sorted(set(GGUF_ARCHITECTURES.values())))
def test_what_lies_between_a_gguf_file_and_the_model(tmp_path: Path, architecture: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture, tiny_tensors(architecture))
    for name, ref in open_artifact(path).tensors.items():
        assert applied(ref) == EXPECTED[architecture].get(suffix_of(name), ()), name
        assert {t.label for t in stored_as(name, GGUF[architecture])} == set(applied(ref)), name


def test_a_tensor_can_be_split_and_interleaved(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny_tensors("llama", fused=True))
    tensors = open_artifact(path).tensors
    assert applied(tensors["model.layers.0.self_attn.q_proj.weight"]) == ("rows-interleaved", "split")
    assert applied(tensors["model.layers.0.self_attn.v_proj.weight"]) == ("split",)


def test_the_table_says_what_each_writer_may_do() -> None:
    assert stored_as("model.layers.7.self_attn.q_proj.weight", GGUF["llama"]) == (
        InterleavedRows("num_heads"),
    )
    assert stored_as("model.layers.7.self_attn.k_proj.weight", GGUF["llama"]) == (
        InterleavedRows("num_kv_heads"),
    )
    assert stored_as("model.layers.7.mlp.up_proj.weight", HUGGING_FACE["phi3"]) == (Split(),)
    assert [t.label for t in stored_as("lm_head.weight", ANYWHERE)] == ["tied", "rows-padded"]
    assert stored_as("model.norm.weight", GGUF["gemma2"]) == (Offset(1.0),)
    assert value_offset("model.norm.weight", "gemma3") == 1.0
    assert value_offset("model.norm.weight", "llama") == 0.0


def test_each_architecture_has_a_table_and_each_transform_a_label_of_its_own() -> None:
    assert GGUF.keys() == set(GGUF_ARCHITECTURES.values())
    assert HUGGING_FACE.keys() <= GGUF_ARCHITECTURES.keys()
    kinds = [InterleavedRows("num_heads"), Offset(1.0), Split(), *transforms.ELSEWHERE]
    kinds += [t for table in ANYWHERE.values() for t in table]
    assert {kind.label: type(kind) for kind in kinds} == LABELS


def test_stored_norms_are_the_weights_plus_one(tmp_path: Path) -> None:
    tensors = tiny_tensors("gemma2")
    ref = open_artifact(write_gguf(tmp_path / "m.gguf", "gemma2", tensors)).tensors["model.norm.weight"]
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["output_norm.weight"].data
    assert np.array_equal(ref.raw().view("<f4").reshape(-1), stored)
    assert ref.value_offset == 1.0
