"""Properties of the pass that no other implementation is needed for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import SWITCHES, write_model

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError
from driftscope.forward import architecture
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Choice, Policy
from driftscope.forward.taps import Collector

BATCH = TokenBatch.of([[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]])
TEACHER = Policy.uniform("teacher")


@pytest.fixture(params=sorted(SWITCHES))
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    return open_artifact(write_model(tmp_path / "model", request.param))


@pytest.fixture
def qwen2(tmp_path: Path) -> Artifact:
    return open_artifact(write_model(tmp_path / "qwen2", "qwen2"))


def run(
    artifact: Artifact, batch: TokenBatch = BATCH, policy: Policy = TEACHER, threads: int = 1
) -> np.ndarray:
    return ForwardPass({"teacher": artifact}, policy, threads=threads).run(batch)


def test_chunks_of_layers_give_the_bits_of_one_pass(artifact: Artifact) -> None:
    hidden = ForwardPass({"teacher": artifact}, TEACHER).embed(BATCH)
    for layer in range(artifact.config.num_layers):
        hidden = ForwardPass({"teacher": artifact}, TEACHER).run_layers(hidden, BATCH, [layer])
    assert np.array_equal(ForwardPass({"teacher": artifact}, TEACHER).head(hidden), run(artifact))


def test_a_sequence_does_not_see_the_others(artifact: Artifact) -> None:
    together = run(artifact)
    for tokens in BATCH.slices:
        alone = run(artifact, TokenBatch.of([BATCH.ids[tokens].tolist()]))
        assert np.array_equal(alone, together[tokens])


def test_a_token_does_not_see_what_follows(artifact: Artifact) -> None:
    long = [3, 1, 4, 1, 5, 9, 2, 6]
    whole, part = run(artifact, TokenBatch.of([long])), run(artifact, TokenBatch.of([long[:5]]))
    assert np.array_equal(whole[:5], part)


def test_listening_changes_nothing_and_every_tap_comes_once_in_order(artifact: Artifact) -> None:
    tap = Collector()
    traced = ForwardPass({"teacher": artifact}, TEACHER).run(BATCH, tap)
    assert np.array_equal(traced, run(artifact))
    expected = []
    for item in architecture.taps(artifact.config):
        names = [f"{item.name}[{i}]" for i in range(BATCH.n_sequences)] if item.op.ragged else [item.name]
        for name, tokens in zip(names, BATCH.slices, strict=False):
            expected.append(name)
            t = tokens.stop - tokens.start
            shape = (
                (t, artifact.config.num_heads * t) if item.op.ragged else (BATCH.n_tokens, item.op.channels)
            )
            assert tap.arrays[name].shape == shape
            assert tap.arrays[name].dtype == np.float32
    assert sorted(tap.arrays) == sorted(expected)


def test_taps_obey_the_identities_of_the_architecture(artifact: Artifact) -> None:
    tap = Collector()
    ForwardPass({"teacher": artifact}, TEACHER).run(BATCH, tap)
    attended, moved = "attn_out", "ffn_out"
    if artifact.config.post_norms:
        attended, moved = "post_attn_norm", "post_ffn_norm"
    for layer in range(artifact.config.num_layers):
        get = {
            name: tap.arrays.get(f"layers.{layer}.{name}")
            for name in (
                attended,
                "post_attn_residual",
                moved,
                "post_ffn_residual",
                "ffn_silu",
                "ffn_up",
                "ffn_swiglu",
                "qkv_matmul",
                "qkv_bias",
            )
        }
        before = tap.arrays["embedding" if layer == 0 else f"layers.{layer - 1}.post_ffn_residual"]
        assert np.array_equal(before + get[attended], get["post_attn_residual"])
        assert np.array_equal(get["post_attn_residual"] + get[moved], get["post_ffn_residual"])
        assert np.array_equal(get["ffn_silu"] * get["ffn_up"], get["ffn_swiglu"])
        assert np.array_equal(get["qkv_matmul"], get["qkv_bias"]) == (not artifact.config.attention_bias)


def test_threads_do_not_change_the_bits(qwen2: Artifact) -> None:
    assert np.array_equal(run(qwen2, threads=1), run(qwen2, threads=3))


def test_logits_of_chosen_tokens(qwen2: Artifact) -> None:
    forward = ForwardPass({"teacher": qwen2}, TEACHER)
    hidden = forward.run_layers(forward.embed(BATCH), BATCH, range(qwen2.config.num_layers))
    rows = np.array([7, 0, 22])
    assert np.array_equal(forward.head(hidden, rows), forward.head(hidden)[rows])


def test_an_override_reads_the_other_artifact_where_it_covers(qwen2: Artifact, tmp_path: Path) -> None:
    other = open_artifact(write_model(tmp_path / "other", "qwen2", seed=1))
    both = {"teacher": qwen2, "candidate": other}
    policy = TEACHER.override(Choice("candidate"), layers=[1], sites=["k", "down"])
    mixed, plain = Collector(), Collector()
    ForwardPass(both, policy).run(BATCH, mixed)
    ForwardPass(both, TEACHER).run(BATCH, plain)
    same = {name for name in plain.arrays if np.array_equal(plain.arrays[name], mixed.arrays[name])}
    assert {"embedding", "layers.0.post_ffn_residual", "layers.1.attn_norm", "layers.1.q_post_rope"} <= same
    assert not {"layers.1.k_post_rope", "layers.1.ffn_out", "lm_head"} & same
    q, kv = 14 * 8, 2 * 8
    difference = plain.arrays["layers.1.qkv_bias"] != mixed.arrays["layers.1.qkv_bias"]
    assert not difference[:, :q].any()
    assert difference[:, q : q + kv].all(), "the bias goes with its site"
    assert not difference[:, q + kv :].any()
    everything = TEACHER.override(Choice("candidate"))
    assert np.array_equal(ForwardPass(both, everything).run(BATCH), run(other))


def test_a_nan_in_one_weight_flows_to_the_logits(qwen2: Artifact, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    ref = qwen2.tensors[name]
    copy = tmp_path / "weight.bin"
    values = ref.raw().view(np.float32).copy()
    values[3, 5] = np.nan
    values.tofile(copy)
    broken = dataclasses.replace(
        qwen2, tensors={**qwen2.tensors, name: dataclasses.replace(ref, file=copy, offset=0)}
    )
    tap = Collector()
    logits = ForwardPass({"teacher": broken}, TEACHER).run(BATCH, tap)
    assert np.isnan(tap.arrays["layers.1.ffn_up"]).sum(axis=0).nonzero()[0].tolist() == [3]
    assert not np.isnan(tap.arrays["layers.1.ffn_norm"]).any()
    assert np.isnan(logits).all()


def without(artifact: Artifact, name: str) -> Artifact:
    return dataclasses.replace(
        artifact, tensors={key: ref for key, ref in artifact.tensors.items() if key != name}
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(qwen2: Artifact, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is missing"):
        run(without(qwen2, name))


def test_a_tensor_of_another_shape_is_named(qwen2: Artifact) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = dataclasses.replace(qwen2.tensors[name], shape=(112, 160))
    with pytest.raises(InputError, match=rf"{name} has shape 112x160; expected 160x112"):
        run(dataclasses.replace(qwen2, tensors={**qwen2.tensors, name: wrong}))


def test_a_prompt_longer_than_the_context_is_refused(qwen2: Artifact) -> None:
    with pytest.raises(InputError, match=r"prompt of 257 tokens is longer than .* 256 tokens"):
        run(qwen2, TokenBatch.of([[1], [1] * 257]))


def test_a_token_outside_of_the_vocabulary_is_refused(qwen2: Artifact) -> None:
    with pytest.raises(InputError, match="token id 320 is outside of the vocabulary of 320 tokens"):
        run(qwen2, TokenBatch.of([[1, 320, 2]]))


def test_a_role_without_an_artifact_is_refused(qwen2: Artifact) -> None:
    with pytest.raises(InputError, match="no artifact for the role 'candidate'"):
        ForwardPass({"teacher": qwen2}, TEACHER.override(Choice("candidate"), layers=[0]))


def test_artifacts_of_two_models_are_not_mixed(qwen2: Artifact, tmp_path: Path) -> None:
    other = open_artifact(write_model(tmp_path / "other", "qwen2", num_hidden_layers=2))
    with pytest.raises(InputError, match="num_layers is 2, but 3"):
        ForwardPass({"teacher": qwen2, "candidate": other}, TEACHER.override(Choice("candidate"), layers=[0]))
