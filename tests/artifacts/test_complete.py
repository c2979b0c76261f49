"""Whether a model is all there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.helpers.tiny_gguf import tiny_tensors, write_gguf

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        check_complete(open_artifact(path))
    return str(caught.value)


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    tensors = tiny_tensors("llama")
    del tensors["blk.1.ffn_up.weight"], tensors["blk.0.attn_v.weight"]
    message = refused(write_gguf(tmp_path / "m.gguf", "llama", tensors))
    assert "model.layers.0.self_attn.v_proj.weight is missing, and 1 more" in message
    assert "llama with 2 layers has 21 tensors" in message


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = tiny_tensors("llama")
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].T.copy()
    message = refused(write_gguf(tmp_path / "m.gguf", "llama", tensors))
    assert (
        "model.layers.1.mlp.up_proj.weight has the shape 64x96; llama with 2 layers expects 96x64" in message
    )


def test_dropped_bias_is_missing(tmp_path: Path) -> None:
    tensors = {name: t for name, t in tiny_tensors("qwen2").items() if not name.endswith("attn_k.bias")}
    message = refused(write_gguf(tmp_path / "m.gguf", "qwen2", tensors))
    assert "model.layers.0.self_attn.k_proj.bias is missing, and 1 more" in message


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.1.ffn_down.bias"])
def test_bias_that_the_forward_pass_would_leave_out(tmp_path: Path, name: str) -> None:
    tensors = tiny_tensors("llama") | {name: np.ones(64, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors)
    assert open_artifact(path).unmapped == (name,)
    assert f"{name} is a bias that llama does not have" in refused(path)
