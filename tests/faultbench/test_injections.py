"""Each injection does what it says, against numpy, and leaves everything before it bit for bit as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import erf

from driftscope.faultbench import architectures
from driftscope.faultbench.catalogue import INJECTIONS, TINY_SUBJECTS, injection, why_not
from driftscope.faultbench.edited import values_of
from driftscope.faultbench.run import Runner, Unit
from driftscope.faultbench.subjects import Subject, Workbench
from driftscope.faultbench.tiny import WINDOW
from driftscope.faultbench.trace_in_memory import MemoryTrace
from driftscope.faultbench.weights import tensor
from driftscope.forward.architecture import op_order
from driftscope.forward.evaluate import Value

F32, Q8_0 = Subject("qwen2"), Subject("qwen2", "Q8_0", "int8-dot")
SQUARE = Subject("qwen2-square", regimes=("long", "rows"))
LAYER = 1


def pair(
    bench: Workbench, name: str, subject: Subject = F32, regime: str = "short"
) -> tuple[MemoryTrace, MemoryTrace]:
    """The clean and the faulty trace of an injection."""
    from driftscope.analysis.floors import Floors

    runner = Runner(bench, Floors({}))
    clean = runner.clean(subject, regime)
    item, site = injection(name), bench.site(subject)
    assert item.unless(site) is None
    return clean, runner.faulty(Unit(subject, regime, name), item, site, clean)[0]


def same(a: Value, b: Value) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and all(
            np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True)
        )
    return not isinstance(b, list) and np.array_equal(a, b, equal_nan=True)


_NEEDS_MODEL = {"F14": "qwen2-scaled", "F19": "qwen2-window"}


def plans() -> list[tuple[str, Subject, str]]:
    """Every injection once, on the first subject and regime where it changes something."""
    needs_length = {"F15": "long", "F19": "long", "F27": "rows"}
    found = []
    for item in INJECTIONS:
        wanted = needs_length.get(item.fault, "short")
        subjects = [s for s in TINY_SUBJECTS if why_not(item, s) is None and wanted in s.regimes]
        if item.fault in ("F12", "F13", "F35") and item.name != "tensor-scale":
            subjects = [Q8_0]
        if item.name in ("o-transposed", "q-read-transposed"):
            subjects, wanted = [SQUARE], "rows"
        if item.fault in _NEEDS_MODEL:
            subjects = [Subject(_NEEDS_MODEL[item.fault])]
        if item in architectures.INJECTIONS:
            subjects, wanted = [Subject(item.models[0])], "short"
        if item.name != "head-of-its-own":
            found.append((item.id, subjects[0], wanted))
    return found


@pytest.mark.parametrize(
    ("name", "subject", "regime"), plans(), ids=lambda value: str(getattr(value, "id", value))
)
def test_what_comes_before_stays_and_the_named_op_changes(
    bench: Workbench, name: str, subject: Subject, regime: str
) -> None:
    clean, faulty = pair(bench, name, subject, regime)
    spot = injection(name).first(bench.site(subject))
    at = op_order(spot.layer, spot.tap)

    changed = {
        place
        for place in clean.values
        if place in faulty.values and not same(clean.values[place], faulty.values[place])
    }

    assert (spot.layer, spot.tap) in changed
    skipped = injection(name).fault == "F10"
    assert skipped or min(op_order(*place) for place in changed) == at


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    values = np.where(seen, scores, -np.inf)
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_permuted_rows_are_gguf_s(bench: Workbench) -> None:
    clean, faulty = pair(bench, "F01/rows-of-q-and-k")
    config = bench.site(F32).config
    q = config.num_heads * config.head_dim
    before, after = (trace.tap(LAYER, "qkv_matmul")[:, :q] for trace in (clean, faulty))
    heads = before.reshape(len(before), config.num_heads, 2, -1)

    np.testing.assert_array_equal(after, heads.swapaxes(2, 3).reshape(before.shape))


def test_interleaved_rope_is_a_complex_product_of_neighbours(bench: Workbench) -> None:
    _, faulty = pair(bench, "F03/interleaved-in-a-layer")
    config = bench.site(F32).config
    q = config.num_heads * config.head_dim
    x = (
        faulty.tap(LAYER, "qkv_bias")[:, :q]
        .astype(np.float64)
        .reshape(-1, config.num_heads, config.head_dim // 2, 2)
    )
    frequencies = config.rope_theta ** (-2.0 * np.arange(config.head_dim // 2) / config.head_dim)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
    turned = (x[..., 0] + 1j * x[..., 1]) * turn
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(len(x), -1)

    np.testing.assert_allclose(faulty.tap(LAYER, "q_post_rope"), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "moved"),
    [("F28/keys-five-late", 5.0), ("F16/theta-times-ten", 0.0)],
)
def test_keys_are_turned_otherwise(bench: Workbench, name: str, moved: float) -> None:
    _, faulty = pair(bench, name)
    config = bench.site(F32).config
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    theta = config.rope_theta * (10.0 if "theta" in name else 1.0)
    half = config.head_dim // 2
    x = faulty.tap(0, "qkv_bias")[:, q : q + kv].astype(np.float64).reshape(-1, config.num_kv_heads, 2, half)
    angles = (np.arange(len(x))[:, None, None] + moved) * theta ** (-np.arange(half) / half)
    turned = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * angles)
    expected = np.stack([turned.real, turned.imag], axis=2).reshape(len(x), -1)

    np.testing.assert_allclose(faulty.tap(0, "k_post_rope"), expected, atol=2e-5)


def test_tiled_heads_take_keys_in_turn(bench: Workbench) -> None:
    _, faulty = pair(bench, "F17/tiled")
    config = bench.site(F32).config
    shape = (-1, config.num_heads, config.head_dim)
    q = faulty.tap(LAYER, "q_post_rope").astype(np.float64).reshape(shape)
    k = faulty.tap(LAYER, "k_post_rope").astype(np.float64).reshape(-1, config.num_kv_heads, config.head_dim)
    turn = np.arange(config.num_heads) % config.num_kv_heads
    expected = np.einsum("qhd,khd->qhk", q, k[:, turn]) / np.sqrt(config.head_dim)

    (scores,) = faulty.ragged(LAYER, "attn_scores")
    np.testing.assert_allclose(scores.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
    (weights,) = faulty.ragged(LAYER, "attn_softmax")
    v = faulty.tap(LAYER, "qkv_bias")[:, -config.num_kv_heads * config.head_dim :].reshape(k.shape)
    out = np.einsum("qhk,khd->qhd", weights.reshape(expected.shape), v[:, turn])
    np.testing.assert_allclose(faulty.tap(LAYER, "attention"), out.reshape(len(q), -1), rtol=1e-4, atol=1e-4)


def test_the_mask_is_one_key_late(bench: Workbench) -> None:
    _, faulty = pair(bench, "F29/one-key-ahead")
    (scores,), (weights,) = faulty.ragged(0, "attn_scores"), faulty.ragged(0, "attn_softmax")
    length = len(scores)
    seen = np.arange(length)[None, :] <= np.arange(length)[:, None] + 1
    expected = softmax(scores.reshape(length, -1, length).astype(np.float64), seen[:, None])

    np.testing.assert_allclose(weights.reshape(expected.shape), expected, atol=1e-6)


def test_the_window_is_one_token_wider(bench: Workbench) -> None:
    _, faulty = pair(bench, "F19/window-plus-one", Subject("qwen2-window"), "long")
    (weights,) = faulty.ragged(0, "attn_softmax")
    length = len(weights)
    seen = (weights.reshape(length, -1, length) > 0).sum(axis=2)

    assert set(seen[WINDOW + 5]) == {WINDOW + 1}


def test_positions_are_rounded_past_256_alone(bench: Workbench) -> None:
    clean, faulty = pair(bench, "F15/bf16-positions", SQUARE, "long")
    different = (clean.tap(0, "q_post_rope") != faulty.tap(0, "q_post_rope")).any(axis=1)

    np.testing.assert_array_equal(np.flatnonzero(different), np.arange(257, len(different), 2))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("F23/gelu-erf", lambda x: x / 2 * (1 + erf(x / np.sqrt(2)))),
        ("F23/gelu-tanh", lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("F23/quick-gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
    ],
)
def test_activation_functions(
    bench: Workbench, name: str, function: Callable[[np.ndarray], np.ndarray]
) -> None:
    _, faulty = pair(bench, name)
    gate = faulty.tap(0, "ffn_gate").astype(np.float64)

    np.testing.assert_allclose(faulty.tap(0, "ffn_silu"), function(gate), rtol=1e-6, atol=1e-7)


def test_the_gate_meets_the_next_channel(bench: Workbench) -> None:
    _, faulty = pair(bench, "F31/shifted-by-one")
    up = faulty.tap(LAYER, "ffn_up")
    expected = faulty.tap(LAYER, "ffn_silu") * np.concatenate([up[:, 1:], up[:, :1]], axis=1)

    np.testing.assert_array_equal(faulty.tap(LAYER, "ffn_swiglu"), expected)


def test_the_residual_is_added_twice_or_not(bench: Workbench) -> None:
    _, twice = pair(bench, "F32/added-twice")
    before, out = twice.tap(0, "post_ffn_residual"), twice.tap(LAYER, "attn_out")
    np.testing.assert_array_equal(twice.tap(LAYER, "post_attn_residual"), 2 * before + out)

    _, never = pair(bench, "F32/not-added")
    np.testing.assert_array_equal(never.tap(LAYER, "post_ffn_residual"), never.tap(LAYER, "ffn_out"))


def test_a_skipped_layer_leaves_no_taps_and_no_trace(bench: Workbench) -> None:
    _, faulty = pair(bench, "F10/a-layer")
    stream = faulty.tap(0, "post_ffn_residual").astype(np.float64)
    artifact = bench.site(F32).artifact
    weight = values_of(artifact, "model.layers.2.input_layernorm.weight")
    expected = (
        stream / np.sqrt((stream**2).mean(axis=1, keepdims=True) + artifact.config.rms_norm_eps) * weight
    )

    assert not any(layer == LAYER for layer, _ in faulty.values)
    np.testing.assert_allclose(faulty.tap(2, "attn_norm"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("F22/scale-missing", 128**0.5), ("F22/scale-squared", 128**-0.5)]
)
def test_scores_are_scaled_otherwise(bench: Workbench, name: str, expected: float) -> None:
    clean, faulty = pair(bench, name)
    ratio = faulty.ragged(0, "attn_scores")[0] / clean.ragged(0, "attn_scores")[0]

    np.testing.assert_allclose(ratio, expected, rtol=1e-5)


def test_half_scores_are_float16_sums(bench: Workbench) -> None:
    _, faulty = pair(bench, "F21/half-scores")
    config = bench.site(F32).config
    q = faulty.tap(LAYER, "q_post_rope")[3, : config.head_dim].astype(np.float16)
    k = faulty.tap(LAYER, "k_post_rope")[2, : config.head_dim].astype(np.float16)
    total = np.float16(0)
    for a, b in zip(q, k, strict=True):
        total = np.float16(total + np.float16(a * b))

    score = faulty.ragged(LAYER, "attn_scores")[0][3, 2]
    assert score == np.float32(total) * np.float32(config.head_dim**-0.5)


def test_few_rows_lack_a_block(bench: Workbench) -> None:
    clean, faulty = pair(bench, "F27/two-or-three-rows", SQUARE, "rows")
    different = (clean.tap(0, "ffn_out") != faulty.tap(0, "ffn_out")).any(axis=1)
    lengths = np.repeat([1, 2, 3, 4, 8, 17], [1, 2, 3, 4, 8, 17])
    x = faulty.tap(0, "ffn_swiglu").astype(np.float64)
    x[:, -32:] = 0.0
    expected = x @ values_of(bench.site(SQUARE).artifact, tensor(0, "down")).T

    np.testing.assert_array_equal(different, np.isin(lengths, [2, 3]))
    np.testing.assert_allclose(faulty.tap(0, "ffn_out")[different], expected[different], rtol=1e-4, atol=1e-4)


def test_float16_overflows(bench: Workbench) -> None:
    for name, subject in (
        ("F25/half-down", Subject("qwen2-massive")),
        ("F26/half-block-sum", Subject("qwen2-massive", "Q4_1", "f32", "q8_1")),
    ):
        clean, faulty = pair(bench, name, subject)
        assert np.isfinite(clean.tap(LAYER, "ffn_out")).all()
        assert not np.isfinite(faulty.tap(LAYER, "ffn_out")[0]).all()


def test_a_transposed_head_reads_the_bytes_column_by_column(bench: Workbench) -> None:
    clean, faulty = pair(bench, "F30/head-read-transposed")
    head = values_of(bench.site(F32).artifact, "lm_head.weight")
    expected = clean.tap(-1, "final_norm").astype(np.float64) @ head.reshape(-1).reshape(
        head.shape[1], head.shape[0]
    )

    np.testing.assert_allclose(faulty.tap(-1, "lm_head"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "bits"), [("scale-bit-high", 1), ("quant-bit-low", 1)])
def test_one_bit_is_flipped(bench: Workbench, name: str, bits: int) -> None:
    item, site = injection(f"F35/{name}"), bench.site(Q8_0)
    assert item.artifact is not None
    changed = item.artifact(site)
    different = [
        (key, np.unpackbits(np.bitwise_xor(ref.raw(), site.artifact.tensors[key].raw())).sum())
        for key, ref in changed.tensors.items()
        if not np.array_equal(ref.raw(), site.artifact.tensors[key].raw())
    ]

    assert different == [(tensor(LAYER, "up"), bits)]


def test_the_zero_point_moves_every_value_by_one_step(bench: Workbench) -> None:
    item, site = injection("F13/quants-less-one"), bench.site(Q8_0)
    assert item.artifact is not None
    name = tensor(LAYER, "up")
    before, after = values_of(site.artifact, name), values_of(item.artifact(site), name)
    scale = (
        site.artifact.tensors[name].raw().reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32)
    )

    np.testing.assert_allclose(
        (before - after).reshape(-1, 32), np.repeat(scale, 32, axis=1), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("scheme", ["F32", "Q8_0", "Q4_K_M"])
def test_the_lost_scale_is_128(bench: Workbench, scheme: str) -> None:
    subject = Subject("qwen2", scheme, "f32")
    item, site = injection("F12/tensor-scale"), bench.site(subject)
    assert item.artifact is not None
    name = tensor(LAYER, "down")

    np.testing.assert_array_equal(values_of(item.artifact(site), name), 128 * values_of(site.artifact, name))


@pytest.mark.parametrize("scheme", ["F32", "Q4_K_M"])
def test_gate_and_up_change_places(bench: Workbench, scheme: str) -> None:
    item, site = injection("F08/gate-and-up"), bench.site(Subject("qwen2", scheme, "f32"))
    assert item.artifact is not None
    changed = item.artifact(site)
    gate, up = tensor(LAYER, "gate"), tensor(LAYER, "up")

    np.testing.assert_array_equal(values_of(changed, gate), values_of(site.artifact, up))
    np.testing.assert_array_equal(values_of(changed, up), values_of(site.artifact, gate))


def test_captures_change_one_tap_in_every_layer(bench: Workbench) -> None:
    for item in INJECTIONS:
        if item.mechanism == "capture":
            clean, faulty = pair(bench, item.id)
            changed = {place for place in clean.values if not same(clean.values[place], faulty.values[place])}
            tap = item.first(bench.site(F32)).tap
            assert changed == {place for place in clean.values if place[1] == tap}, item.id
