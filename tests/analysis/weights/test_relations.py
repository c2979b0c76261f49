"""Every relation, of pairs in which it is known what was done."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from tests.analysis.planted import (
    BAND,
    DOWN,
    EMBEDDING,
    F32,
    GATE,
    HEAD,
    NORM,
    OUT,
    UP,
    K,
    Q,
    V,
    copied,
    judge,
    random_model,
    values,
)

MODEL = random_model()
Planted = Callable[[], Mapping[str, F32]]


def of(name: str) -> F32:
    return values(MODEL, name)


def in_ggufs_order(rows: F32, heads: int) -> F32:
    """llama.cpp's `permute` (conversion scripts), written as they write it."""
    shape = (heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def back(rows: F32, heads: int) -> F32:
    """Its inverse."""
    shape = (heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def layer(name: str, number: int) -> str:
    return name.replace("layers.2.", f"layers.{number}.")


MATRIX_FAULTS: Mapping[str, tuple[Planted, dict[str, str]]] = {
    "q and k not put back": (
        lambda: {Q: in_ggufs_order(of(Q), 8), K: in_ggufs_order(of(K), 2)},
        {Q: "rows-interleaved(8)", K: "rows-interleaved(2)"},
    ),
    "put back twice": (lambda: {Q: back(of(Q), 8)}, {Q: "rows-deinterleaved(8)"}),
    "k with the number of query heads": (
        lambda: {K: in_ggufs_order(of(K), 8)},
        {K: "rows-interleaved(8)"},
    ),
    "k stored for one number of heads and read for another": (
        lambda: {K: back(in_ggufs_order(of(K), 8), 2)},
        {K: "rows-interleaved(8)+rows-deinterleaved(2)"},
    ),
    "transposed": (lambda: {OUT: of(OUT).T}, {OUT: "transposed"}),
    "transposed, not square": (lambda: {DOWN: of(DOWN).T}, {DOWN: "transposed"}),
    "negated": (lambda: {UP: -of(UP)}, {UP: "negated"}),
    "gate and up swapped": (
        lambda: {GATE: of(UP), UP: of(GATE)},
        {GATE: "other-tensor(mlp.up_proj.weight)", UP: "other-tensor(mlp.gate_proj.weight)"},
    ),
    "k and v swapped": (
        lambda: {K: of(V), V: of(K)},
        {K: "other-tensor(self_attn.v_proj.weight)", V: "other-tensor(self_attn.k_proj.weight)"},
    ),
    "head taken from the embedding": (lambda: {HEAD: of(EMBEDDING)}, {HEAD: "tied"}),
    "layers swapped": (
        lambda: {DOWN: of(layer(DOWN, 4)), layer(DOWN, 4): of(DOWN)},
        {DOWN: "other-layer(4)", layer(DOWN, 4): "other-layer(2)"},
    ),
}


@pytest.mark.parametrize("scheme", ["F32", "BF16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("fault", MATRIX_FAULTS)
def test_a_transform_that_nobody_declared_is_named(fault: str, scheme: str) -> None:
    planted, expected = MATRIX_FAULTS[fault]
    found = judge(MODEL, copied(MODEL, scheme, planted()))
    # Rows of 256 values, so that a transposed projection may be quantized as well.
    # A head that is the embedding equals the one beside it, however that was rounded.
    match = "equal" if scheme in ("F32", "BF16") or "tied" in expected.values() else "quantized-from"
    assert {name: found["relations"][name] for name in found["at_fault"]} == {
        name: f"{match}-under:{transform}" for name, transform in expected.items()
    }
    assert (found["conclusion"], found["holds"]) == ("transformed", False)
    assert found["kind_counts"]["transformed"] == len(expected)
    evidence = found["found"][next(iter(expected))]["evidence"]
    assert evidence["alternatives_tried"] > 1
    assert evidence["nmse_under"] < evidence["nmse"] if evidence["nmse"] else True


NORM_FAULTS: Mapping[str, tuple[Planted, str]] = {
    "one added": (lambda: {NORM: of(NORM) + 1}, "offset+1"),
    "one taken off": (lambda: {NORM: of(NORM) - 1}, "offset-1"),
    "another constant added": (lambda: {NORM: of(NORM) + np.float32(0.25)}, "offset+0.25"),
    "negated": (lambda: {NORM: -of(NORM)}, "negated"),
    "negated exponential": (
        lambda: {NORM: (-np.exp(of(NORM).astype(np.float64))).astype(np.float32)},
        "negated-exponential",
    ),
    "norms swapped": (
        lambda: {NORM: of(NORM.replace("input", "post_attention"))},
        "other-tensor(post_attention_layernorm.weight)",
    ),
    "norm of another layer": (lambda: {NORM: of(layer(NORM, 3))}, "other-layer(3)"),
}


@pytest.mark.parametrize("scheme", ["F32", "Q8_0", "BF16"])
@pytest.mark.parametrize("fault", NORM_FAULTS)
def test_a_transform_of_a_norm_is_named(fault: str, scheme: str) -> None:
    planted, transform = NORM_FAULTS[fault]
    found = judge(MODEL, copied(MODEL, scheme, planted()))
    assert found["at_fault"] == [NORM]
    relation = found["relations"][NORM]
    assert relation.partition(":")[2] == transform
    assert relation.partition("-under")[0] in (("equal",) if scheme != "BF16" else ("equal", "downcast"))
    assert found["conclusion"] == "transformed"


@pytest.mark.parametrize(
    ("scheme", "matrices"), [("F32", "identical"), ("Q8_0", "quantized-from"), ("Q4_K", "quantized-from")]
)
def test_a_clean_copy_is_found_so_without_a_search(scheme: str, matrices: str) -> None:
    found = judge(MODEL, copied(MODEL, scheme))
    assert set(found["relations"].values()) == {"identical", matrices}
    assert (found["conclusion"], found["at_fault"]) == (matrices, [])
    assert found["searched"] == {"tensors": 0, "alternatives": 0}


@pytest.mark.parametrize("scheme", ["BF16", "F16"])
def test_a_copy_in_a_smaller_float_format_is_a_downcast(scheme: str) -> None:
    """Values that need more bits than either format has: each is rounded, and so that all bits are known."""
    third = {name: values(MODEL, name) / np.float32(3) for name in MODEL.tensors}
    found = judge(copied(MODEL, "F32", third), copied(MODEL, scheme, third))
    assert set(found["relations"].values()) == {"downcast"}
    assert (found["conclusion"], found["holds"]) == ("downcast", True)


def test_one_value_rounded_the_wrong_way_is_no_downcast() -> None:
    third = {name: values(MODEL, name) / np.float32(3) for name in MODEL.tensors}
    b = copied(MODEL, "BF16", third)
    b.tensors[UP].raw().view(np.uint16)[7, 9] += 1  # type: ignore[misc]
    found = judge(copied(MODEL, "F32", third), b)
    assert found["relations"][UP] == "quantized-from"
    assert found["relation_counts"] == {"downcast": len(MODEL.tensors) - 1, "quantized-from": 1}


@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_K"])
def test_a_lost_scale_is_named_with_its_factor(scheme: str) -> None:
    found = judge(MODEL, copied(MODEL, scheme, {DOWN: np.float32(128) * of(DOWN)}))
    assert found["at_fault"] == [DOWN]
    assert found["relations"][DOWN] == "quantized-from-under:scaled(128)"
    assert found["found"][DOWN]["evidence"]["factor"] == pytest.approx(128, rel=5e-3)


def test_a_vocabulary_that_is_padded_with_zeros_is_legal_and_one_that_is_cut_is_not() -> None:
    rows = of(HEAD)
    padded = judge(MODEL, copied(MODEL, "Q8_0", {HEAD: np.vstack([rows, 0 * rows[:64]])}))
    assert padded["relations"][HEAD] == "quantized-from"
    assert padded["conclusion"] == "quantized-from"
    cut = judge(MODEL, copied(MODEL, "F32", {HEAD: rows[:-64]}))
    assert cut["relations"][HEAD] == "equal-under:rows-cut(512->448)"
    assert cut["conclusion"] == "transformed"
    filled = judge(MODEL, copied(MODEL, "F32", {HEAD: np.vstack([rows, rows[:64]])}))
    assert (filled["relations"][HEAD], filled["conclusion"]) == (
        "equal-under:rows-padded(512->576)",
        "transformed",
    )


def test_all_layers_shifted_by_one_is_named_and_no_other_training() -> None:
    """The whole model differs, and yet each tensor of the layers is found."""
    names = [name for name in MODEL.tensors if ".layers." in name]
    after = {layer("layers.2.", i): layer("layers.2.", (i + 1) % 6) for i in range(6)}
    planted = {}
    for name in names:
        here = next(prefix for prefix in after if prefix in name)
        planted[name] = of(name.replace(here, after[here]))
    found = judge(MODEL, copied(MODEL, "Q4_K", planted))
    assert sorted(found["at_fault"]) == sorted(names)
    assert found["conclusion"] == "transformed"
    assert found["relations"][UP] == "quantized-from-under:other-layer(3)"
    assert found["relations"][NORM] == "equal-under:other-layer(3)"


def test_one_damaged_tensor_stays_different_and_is_named() -> None:
    random = np.random.Generator(np.random.Philox(9))
    noise = (0.03 * random.standard_normal(of(UP).shape)).astype(np.float32)
    found = judge(MODEL, copied(MODEL, "Q4_K", {UP: noise}))
    assert (found["at_fault"], found["conclusion"]) == ([UP], "different")
    assert found["training"]["kind"] == "none"
    assert found["searched"]["tensors"] == 1


def test_the_band_of_a_report_is_kept() -> None:
    assert judge(MODEL, copied(MODEL))["band"] == {"low": BAND.low, "high": BAND.high}
