from __future__ import annotations

import random

from driftscope.artifacts.model import ModelConfig
from driftscope.forward import policy
from driftscope.forward.architecture import embedding_op, head_ops, layer_ops
from driftscope.report.topology import (
    LAYER_TAPS,
    MODEL_TAPS,
    SITES,
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


def test_the_order_is_the_forward_passs_own() -> None:
    config = ModelConfig("llama", 8, 2, 2, 1, 4, 16, 32, 64, 1e-5, 1e4)
    assert [op.tap for op in layer_ops(config)] == list(LAYER_TAPS)
    assert [embedding_op(config).tap, *(op.tap for op in head_ops(config))] == list(MODEL_TAPS)
    assert policy.SITES == SITES


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
