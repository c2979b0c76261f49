from __future__ import annotations

import dataclasses
import random
from functools import partial

import pytest

from driftscope.artifacts.complete import layer_shapes
from driftscope.artifacts.model import ModelConfig
from driftscope.evidence.taps import LAYER_TAPS
from driftscope.forward import policy
from driftscope.forward.architecture import layer_ops, norm_tensor
from driftscope.report.topology import (
    SITES,
    has_post_norms,
    op_of_tensor,
    pair_order,
    site_order,
    tap_order,
    tensor_order,
)


def test_taps_sort_as_the_forward_pass_makes_them() -> None:
    expected = [(-1, "embedding")]
    expected += [(layer, tap) for layer in (0, 1, 2, 10) for tap in LAYER_TAPS]
    expected += [(-1, "final_norm"), (-1, "lm_head")]
    shuffled = expected.copy()
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=lambda place: tap_order(*place)) == expected


PLAIN = ModelConfig("llama", 8, 2, 2, 1, 4, 16, 32, 64, 1e-5, 1e4)
GEMMA = dataclasses.replace(PLAIN, architecture="gemma3_text", post_norms=True, qk_norm=True)


@pytest.mark.parametrize("config", [PLAIN, GEMMA])
def test_the_order_is_the_forward_passs_own(config: ModelConfig) -> None:
    taps = [op.tap for op in layer_ops(config)]
    assert sorted(taps, key=lambda tap: tap_order(0, tap)) == taps
    assert policy.SITES == SITES


@pytest.mark.parametrize("config", [PLAIN, GEMMA])
def test_norms_are_named_as_the_forward_pass_uses_them(config: ModelConfig) -> None:
    names = [f"model.layers.1.{name}" for name in layer_shapes(config)]
    post_norms = has_post_norms(names)
    assert post_norms == config.post_norms
    taps = ("attn_norm", "ffn_norm", *(("post_attn_norm", "post_ffn_norm") if post_norms else ()))
    for tap in taps:
        assert op_of_tensor(norm_tensor(config, 1, tap), post_norms=post_norms) == (1, tap)


def test_gemmas_norms_sort_around_their_blocks() -> None:
    names = [
        *("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm"),
        *("mlp.gate_proj", "mlp.down_proj", "post_feedforward_layernorm"),
    ]
    tensors = [f"model.layers.3.{name}.weight" for name in names]
    assert sorted(sorted(tensors), key=partial(tensor_order, post_norms=True)) == tensors


def test_an_unknown_tap_comes_last_in_its_layer() -> None:
    assert tap_order(3, "post_ffn_residual") < tap_order(3, "new_tap") < tap_order(4, "attn_norm")


def test_tensors_name_their_op() -> None:
    assert op_of_tensor("model.embed_tokens.weight") == (-1, "embedding")
    assert op_of_tensor("model.layers.12.self_attn.k_proj.weight") == (12, "qkv_matmul")
    assert op_of_tensor("model.layers.3.mlp.down_proj.weight") == (3, "ffn_out")
    assert op_of_tensor("model.layers.3.new.weight") == (3, "new.weight")
    assert op_of_tensor("rope_freqs.weight") == (-1, "rope_freqs.weight")


def test_tensors_sort_by_layer_number_not_by_text() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.10.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert sorted([names[i] for i in (3, 0, 4, 2, 1)], key=tensor_order) == names


def test_sites_and_pairs() -> None:
    assert sorted(["down", "q", "other", "gate"], key=site_order) == ["q", "gate", "down", "other"]
    pairs = ["x|y", "teacher.f32|candidate.int8-dot", "teacher.f32|candidate.f32"]
    assert sorted(pairs, key=pair_order) == [pairs[2], pairs[1], pairs[0]]
