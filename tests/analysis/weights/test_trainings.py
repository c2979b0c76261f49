"""Two trainings, or one model and a damaged copy: planted both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
from tests.analysis.planted import F32, Q, copied, judge, random_model, values

from driftscope.artifacts.model import Artifact

MODEL = random_model()
MATRICES = [name for name, ref in MODEL.tensors.items() if len(ref.shape) == 2]


def noise(seed: int, shape: tuple[int, ...]) -> F32:
    random = np.random.Generator(np.random.Philox([seed, 1]))
    return random.standard_normal(shape).astype(np.float32)


def moved(names: list[str], size: float, seed: int = 1) -> Mapping[str, F32]:
    """Tensors to which noise of a part of their own spread was added."""
    found = {}
    for index, name in enumerate(names):
        x = values(MODEL, name)
        found[name] = x + np.float32(size * x.std()) * noise(seed + index, x.shape)
    return found


def adapted(names: list[str], rank: int = 8) -> Mapping[str, F32]:
    """Tensors with a difference of low rank, as a merged LoRA leaves."""
    found = {}
    for index, name in enumerate(names):
        x = values(MODEL, name)
        up, down = noise(2 * index, (x.shape[0], rank)), noise(2 * index + 1, (rank, x.shape[1]))
        found[name] = x + np.float32(0.1 * x.std() / rank**0.5) * (up @ down)
    return found


@pytest.mark.parametrize("size", [0.05, 0.2])
@pytest.mark.parametrize("scheme", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_a_fine_tuned_model_is_another_training_and_no_damage(scheme: str, size: float) -> None:
    """At 0.05 the change is a third of the error of Q4_K, and inside the band: the cells show it."""
    tuned = moved(list(MODEL.tensors), size)
    found = judge(MODEL, copied(MODEL, scheme, tuned))
    assert (found["conclusion"], found["holds"]) == ("different-weights", False)
    assert found["training"]["part"] == "all"
    assert "further training" in found["statement"]
    # Said from the table and a few probes: no search of every tensor.
    assert found["searched"]["tensors"] <= 8


@pytest.mark.parametrize("scheme", ["F32", "Q4_K"])
def test_a_model_of_another_seed_has_nothing_in_common(scheme: str) -> None:
    found = judge(MODEL, copied(random_model(1), scheme))
    assert found["conclusion"] == "different-weights"
    assert "nothing in common" in found["statement"]
    assert found["searched"]["tensors"] <= 8


@pytest.mark.parametrize("scheme", ["F32", "Q8_0"])
@pytest.mark.parametrize("kinds", [("q_proj", "v_proj"), ("_proj",)])
def test_a_merged_adapter_is_another_training_and_says_what_is_unchanged(
    scheme: str, kinds: tuple[str, ...]
) -> None:
    names = [name for name in MATRICES if any(kind in name for kind in kinds)]
    found = judge(MODEL, copied(MODEL, scheme, adapted(names)))
    assert found["at_fault"] == sorted(names)
    assert found["conclusion"] == "different-weights"
    assert "low rank" in found["statement"]
    if len(kinds) == 2:
        assert found["training"]["kinds"] == ["self_attn.q_proj", "self_attn.v_proj"]
        assert "no other matrix" in found["statement"]


def test_layers_that_were_trained_alone_are_another_training() -> None:
    names = [name for name in MATRICES if any(f"layers.{i}." in name for i in (2, 3, 4, 5))]
    found = judge(MODEL, copied(MODEL, "F32", moved(names, 0.2)))
    assert found["conclusion"] == "different-weights"
    assert found["training"]["layers"] == [2, 3, 4, 5]


@pytest.mark.parametrize("scheme", ["F32", "Q4_K"])
def test_one_damaged_layer_is_damage(scheme: str) -> None:
    names = [name for name in MATRICES if ".layers.3." in name]
    found = judge(MODEL, copied(MODEL, scheme, moved(names, 1.0)))
    assert (found["conclusion"], found["at_fault"]) == ("different", sorted(names))
    assert found["training"]["kind"] == "none"


def test_one_kind_that_a_converter_garbles_is_a_rule_and_no_training() -> None:
    """A permutation of the columns that no alternative is: far away, and of full rank."""
    order = np.random.Generator(np.random.Philox(3)).permutation(256)
    names = [name for name in MATRICES if "k_proj" in name]
    found = judge(MODEL, copied(MODEL, "Q4_K", {name: values(MODEL, name)[:, order] for name in names}))
    assert found["conclusion"] == "different"
    assert found["training"]["kind"] == "pattern"
    assert "self_attn.k_proj differ in every layer" in found["statement"]


def test_a_fault_of_all_matrices_with_all_norms_equal_is_a_rule_and_no_training() -> None:
    def swapped(x: F32) -> F32:
        return x.reshape(x.shape[0], -1, 2)[:, :, ::-1].reshape(x.shape)

    found = judge(MODEL, copied(MODEL, "Q8_0", {name: swapped(values(MODEL, name)) for name in MATRICES}))
    assert found["conclusion"] == "different"
    assert "A rule, not a training" in found["statement"]


def test_half_of_the_rows_of_every_matrix_is_no_training() -> None:
    changed = {}
    for index, name in enumerate(MATRICES):
        x = values(MODEL, name).copy()
        x[::2] = x.std() * noise(index, x[::2].shape)
        changed[name] = x
    found = judge(MODEL, copied(MODEL, "F32", changed))
    assert (found["conclusion"], found["training"]["kind"]) == ("different", "pattern")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_matrix_of_zeros_has_no_relative_error_and_breaks_nothing() -> None:
    empty = copied(MODEL, "F32", {Q: 0 * values(MODEL, Q)})
    assert judge(empty, MODEL)["at_fault"] == [Q]
    assert judge(empty, copied(random_model(1), "F32"))["conclusion"] == "different-weights"


def test_three_scattered_tensors_are_damage() -> None:
    names = [MATRICES[3], MATRICES[17], MATRICES[30]]
    found = judge(MODEL, copied(MODEL, "F32", moved(names, 0.3)))
    assert (found["conclusion"], found["at_fault"]) == ("different", sorted(names))


def test_a_pair_too_small_for_a_distribution_says_nothing_of_training() -> None:
    small = Artifact(MODEL.path, "safetensors", MODEL.config, {Q: MODEL.tensors[Q]})
    other = copied(small, "F32", {Q: noise(4, (256, 256))})
    found = judge(small, other)
    assert (found["conclusion"], found["training"]["kind"]) == ("different", "none")
