"""The kernels between the matmuls against float64 NumPy, torch and llama.cpp's own cast to float16."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from driftscope.kernels import forward as kernels
from driftscope.kernels.jit import kernel
from driftscope.kernels.reference import forward as reference
from driftscope.kernels.row_sums import weighted_rows

SEEDS = st.integers(0, 999)


def nearest(value: mpmath.mpf) -> np.float32:
    """The float32 that is nearest to an exact value, the even one of two."""
    with mpmath.workprec(24):
        return np.float32(float(+value))


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


@st.composite
def attention_cases(draw: st.DrawFn) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    return {
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.sampled_from([1, 2, 7])),
        "head_dim": draw(st.sampled_from([2, 6, 16])),
        "starts": np.cumsum([0, *lengths]),
        "window": draw(st.none() | st.integers(1, 14)),
        "seed": draw(st.integers(0, 2**16)),
        "spread": draw(st.sampled_from([0.1, 1.0, 6.0])),
        "soft_cap": draw(st.none() | st.sampled_from([0.5, 20.0])),
    }


def qkv(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = int(case["starts"][-1])
    q_width, kv_width = case["n_heads"] * case["head_dim"], case["n_kv_heads"] * case["head_dim"]
    return (
        normal(case["seed"], n, q_width, scale=case["spread"]),
        normal(case["seed"] + 1, n, kv_width, scale=case["spread"]),
        normal(case["seed"] + 2, n, kv_width),
    )


@given(attention_cases())
@settings(deadline=None, max_examples=60)
def test_attention_is_the_reference(case: dict[str, Any]) -> None:
    q, k, v = qkv(case)
    options = {name: case[name] for name in ("n_heads", "n_kv_heads", "window", "soft_cap")}
    scale = case["head_dim"] ** -0.5
    found = kernels.attention(q, k, v, case["starts"], scale=scale, **options)
    expected = reference.attention(*wide(q, k, v), case["starts"], scale=scale, **options)
    # The error of a score, which the exponential turns into a relative error of a weight.
    score_error = 2**-24 * case["head_dim"] * float(np.abs(q).max() * np.abs(k).max()) * 2
    np.testing.assert_allclose(found, expected, atol=(score_error + 1e-5) * float(np.abs(v).max()))


@given(attention_cases())
@settings(deadline=None, max_examples=30)
def test_attention_maps_multiply_to_the_attention(case: dict[str, Any]) -> None:
    q, k, v = qkv({**case, "starts": case["starts"][:2]})
    heads = {"n_heads": case["n_heads"], "n_kv_heads": case["n_kv_heads"]}
    t, d = q.shape[0], case["head_dim"]
    scores = kernels.attention_scores(q, k, scale=d**-0.5, **heads)
    weights = kernels.attention_softmax(scores, n_heads=case["n_heads"], window=case["window"])
    maps = weights.reshape(t, case["n_heads"], t).astype(np.float64)
    assert not maps[:, :, :][
        ~np.broadcast_to(reference.visible(t, case["window"])[:, None], maps.shape)
    ].any()
    np.testing.assert_allclose(maps.sum(axis=2), 1.0, rtol=1e-6)
    group = case["n_heads"] // case["n_kv_heads"]
    values = np.repeat(v.reshape(t, case["n_kv_heads"], d), group, axis=1).astype(np.float64)
    expected = np.stack([maps[:, h] @ values[:, h] for h in range(case["n_heads"])], axis=1)
    found = kernels.attention(q, k, v, np.array([0, t]), scale=d**-0.5, window=case["window"], **heads)
    np.testing.assert_allclose(found, expected.reshape(t, -1), atol=2e-6 * float(np.abs(v).max()))


def test_attention_is_torchs() -> None:
    t, heads, kv_heads, d = 40, 14, 2, 64
    q, k, v = normal(0, t, heads * d), normal(1, t, kv_heads * d), normal(2, t, kv_heads * d)
    found = kernels.attention(q, k, v, np.array([0, t]), n_heads=heads, n_kv_heads=kv_heads, scale=d**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).double().reshape(1, t, -1, d).transpose(1, 2) for x in (q, k, v)),
        is_causal=True,
        enable_gqa=True,
    )
    np.testing.assert_allclose(found, expected.transpose(1, 2).reshape(t, -1).numpy(), atol=2e-6)


def test_a_sequence_is_the_same_alone_and_in_a_batch() -> None:
    q, k, v = normal(0, 30, 4 * 8), normal(1, 30, 2 * 8), normal(2, 30, 2 * 8)
    options = {"n_heads": 4, "n_kv_heads": 2, "scale": 0.5}
    batch = kernels.attention(q, k, v, np.array([0, 13, 14, 30]), **options)
    for begin, end in ((0, 13), (13, 14), (14, 30)):
        rows = slice(begin, end)
        alone = kernels.attention(q[rows], k[rows], v[rows], np.array([0, end - begin]), **options)
        assert np.array_equal(batch[rows], alone)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_window_hides_what_is_before_it(window: int) -> None:
    q, k, v = normal(0, 9, 8), normal(1, 9, 8), normal(2, 9, 8)
    options: dict[str, Any] = {"n_heads": 1, "n_kv_heads": 1, "scale": 1.0, "window": window}
    before = kernels.attention(q, k, v, np.array([0, 9]), **options)
    k[: 9 - window] += 1
    v[: 9 - window] += 1
    after = kernels.attention(q, k, v, np.array([0, 9]), **options)
    assert np.array_equal(before[8], after[8])
    assert not np.array_equal(before[8 - window], after[8 - window])


def test_a_nan_reaches_every_query_that_sees_it_and_no_other() -> None:
    q, k, v = normal(0, 6, 8), normal(1, 6, 8), normal(2, 6, 8)
    k[3, 0] = np.nan
    found = kernels.attention(q, k, v, np.array([0, 6]), n_heads=1, n_kv_heads=1, scale=1.0)
    assert np.isnan(found).all(axis=1).tolist() == [False, False, False, True, True, True]
    assert not np.isnan(found[:3]).any()


def test_f16_attention_rounds_every_operand_of_the_two_products() -> None:
    t, d = 12, 8
    q, k, v = normal(0, t, d), normal(1, t, d), normal(2, t, d)
    found = kernels.attention(q, k, v, np.array([0, t]), n_heads=1, n_kv_heads=1, scale=0.25, kv_type="f16")
    half_q, half_k, half_v = (torch.from_numpy(x).half().double().numpy() for x in (q, k, v))
    scores = np.where(reference.visible(t, None), half_q @ half_k.T * 0.25, -np.inf)
    weights = torch.softmax(torch.from_numpy(scores), dim=-1).float().half().double().numpy()
    np.testing.assert_allclose(found, weights @ half_v, atol=1e-3 * 2**-10 + 2e-6)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
@settings(deadline=None)
def test_softmax_values_round_to_f16_like_numpy(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    kernels._round_row_to_f16(array, array.view(np.uint32), 0, len(values))
    assert np.array_equal(array, np.array(values, dtype=np.float32).astype(np.float16).astype(np.float32))


@given(st.integers(1, 5), st.sampled_from([2, 8, 96]), st.sampled_from([1, 3]), st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_rms_norm_is_the_reference(n: int, channels: int, heads: int, seed: int) -> None:
    x, weight = normal(seed, n, heads * channels, scale=30), normal(seed + 1, channels)
    found = kernels.rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(found, reference.rms_norm(*wide(x, weight), 1e-5), rtol=3e-7, atol=1e-30)


def test_rms_norm_is_torchs() -> None:
    x, weight = normal(0, 5, 64), normal(1, 64)
    expected = torch.nn.functional.rms_norm(
        torch.from_numpy(x).double(), (64,), torch.from_numpy(weight).double(), 1e-6
    )
    np.testing.assert_allclose(kernels.rms_norm(x, weight, 1e-6), expected.numpy(), rtol=3e-7)


@given(st.sampled_from([2, 6, 64]), st.integers(1, 4), st.booleans(), st.sampled_from([1.0, 1.139]), SEEDS)
@settings(deadline=None, max_examples=60)
def test_rope_is_the_reference(head_dim: int, heads: int, interleaved: bool, scale: float, seed: int) -> None:
    frequencies = (10000.0 ** (-2 * np.arange(head_dim // 2) / head_dim)).astype(np.float32)
    positions = np.array([0, 1, 5, 2, 0, 511])
    x = normal(seed, 6, heads * head_dim)
    tables = kernels.rope_tables(frequencies, 512, scale=scale)
    found = kernels.rope(x, *tables, positions, interleaved=interleaved)
    expected = reference.rope(*wide(x, frequencies), positions, scale=scale, interleaved=interleaved)
    # An angle near 512 is exact to 2^-15 at worst, as float32.
    np.testing.assert_allclose(found, expected, atol=4e-5 * float(np.abs(x).max()) + 1e-6)
    if scale == 1.0:
        assert np.array_equal(found[0], x[0]), "position 0 is the identity"


@given(st.sampled_from([2, 6, 24]), st.integers(1, 3), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=40)
def test_a_head_that_is_turned_in_part_is_the_reference(
    turned: int, heads: int, interleaved: bool, seed: int
) -> None:
    frequencies = (100.0 ** (-2 * np.arange(turned // 2) / turned)).astype(np.float32)
    positions = np.array([0, 1, 5, 2, 0, 63])
    x = normal(seed, 6, heads * 26)
    tables = kernels.rope_tables(frequencies, 64)
    found = kernels.rope(x, *tables, positions, interleaved=interleaved, head_dim=26)
    options: dict[str, Any] = {"interleaved": interleaved, "head_dim": 26}
    expected = reference.rope(*wide(x, frequencies), positions, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(x).max()))
    rest = np.arange(heads * 26).reshape(heads, 26)[:, turned:].reshape(-1)
    assert np.array_equal(found[:, rest], x[:, rest])


def test_a_head_that_is_turned_in_part_is_transformers() -> None:
    frequencies = (10000.0 ** (-2 * np.arange(12) / 24)).astype(np.float32)
    x = normal(0, 9, 3 * 32)
    tables = kernels.rope_tables(frequencies, 9)
    cosine, sine = (torch.from_numpy(np.tile(table, 2))[None] for table in tables)
    heads = torch.from_numpy(x).reshape(1, 9, 3, 32).transpose(1, 2)
    expected, _ = modeling_phi3.apply_rotary_pos_emb(heads, heads, cosine, sine)
    found = kernels.rope(x, *tables, np.arange(9), head_dim=32)
    np.testing.assert_allclose(found, expected.transpose(1, 2).reshape(9, -1).numpy(), atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_transformers(interleaved: bool) -> None:
    """Split halves as in Llama; neighbours as in Cohere's models, which keep the paper's pairing."""
    module = modeling_cohere if interleaved else modeling_llama
    frequencies = (10000.0 ** (-2 * np.arange(32) / 64)).astype(np.float32)
    x = normal(0, 9, 3 * 64)
    tables = kernels.rope_tables(frequencies, 9)
    repeat = (lambda t: np.repeat(t, 2, axis=1)) if interleaved else (lambda t: np.tile(t, 2))
    cosine, sine = (torch.from_numpy(repeat(table))[None] for table in tables)
    heads = torch.from_numpy(x).reshape(1, 9, 3, 64).transpose(1, 2)
    expected, _ = module.apply_rotary_pos_emb(heads, heads, cosine, sine)
    found = kernels.rope(x, *tables, np.arange(9), interleaved=interleaved)
    np.testing.assert_allclose(found, expected.transpose(1, 2).reshape(9, -1).numpy(), atol=1e-6)


def test_the_two_pairings_are_one_rotation_of_permuted_channels() -> None:
    x, tables = normal(0, 5, 2 * 16), kernels.rope_tables(np.linspace(1, 0.1, 8, dtype=np.float32), 5)
    order = np.arange(16).reshape(8, 2).T.reshape(-1)
    order = np.concatenate([order, order + 16])
    split = kernels.rope(np.ascontiguousarray(x[:, order]), *tables, np.arange(5))
    found = kernels.rope(x, *tables, np.arange(5), interleaved=True)
    assert np.array_equal(found[:, order], split)


@given(st.integers(0, 2**20), st.floats(1e-6, 1.0))
@settings(deadline=None, max_examples=200)
def test_rotary_angles_are_correctly_rounded(position: int, frequency: float) -> None:
    angle = np.float32(position) * np.float32(frequency)
    cosine, sine = np.empty(1, np.float32), np.empty(1, np.float32)
    kernels._rope_tables(np.array([angle]), np.float32(1), cosine, sine)
    with mpmath.workprec(120):
        exact = mpmath.mpf(float(angle))
        assert cosine[0] == nearest(mpmath.cos(exact))
        assert sine[0] == nearest(mpmath.sin(exact))


def test_swiglu_is_torchs() -> None:
    gate, up = normal(0, 7, 33, scale=20), normal(1, 7, 33)
    wide_gate, wide_up = (torch.from_numpy(x).double() for x in (gate, up))
    expected = (torch.nn.functional.silu(wide_gate) * wide_up).numpy()
    np.testing.assert_allclose(kernels.swiglu(gate, up), expected, rtol=2e-7, atol=1e-30)
    np.testing.assert_allclose(
        kernels.silu(gate), reference.silu(gate.astype(np.float64)), rtol=1e-7, atol=1e-30
    )


def test_geglu_is_torchs() -> None:
    gate, up = normal(0, 7, 33, scale=8), normal(1, 7, 33)
    wide_gate, wide_up = (torch.from_numpy(x).double() for x in (gate, up))
    expected = torch.nn.functional.gelu(wide_gate, approximate="tanh")
    # torch's own 1 + tanh cancels where gelu is small.
    np.testing.assert_allclose(kernels.gelu(gate), expected.numpy(), rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(kernels.gelu(gate), reference.gelu(gate.astype(np.float64)), 1e-7, 1e-14)
    np.testing.assert_allclose(kernels.geglu(gate, up), (expected * wide_up).numpy(), 2e-7, 1e-14)
    expected = reference.geglu(*wide(gate, up))
    np.testing.assert_allclose(kernels.geglu(gate, up), expected, rtol=2e-7, atol=1e-14)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) > 1e-37))
@settings(deadline=None, max_examples=400)
def test_silu_and_gelu_are_correctly_rounded(value: float) -> None:
    x = np.array([value], np.float32)
    with mpmath.workprec(200):
        exact = mpmath.mpf(value)
        expected = nearest(exact / (1 + mpmath.exp(-exact)))
        if abs(expected) > 1.2e-38:
            assert kernels.silu(x)[0] == expected
        inner = mpmath.sqrt(2 / mpmath.pi) * (exact + mpmath.mpf("0.044715") * exact**3)
        expected = nearest(exact / (1 + mpmath.exp(-2 * inner)) if abs(exact) < 1e4 else max(exact, 0))
        if abs(expected) > 1.2e-38:
            assert kernels.gelu(x)[0] == expected


def test_a_soft_cap_is_torchs_and_bounds_the_scores() -> None:
    t, heads, d, cap = 12, 2, 16, 5.0
    q, k = normal(0, t, heads * d, scale=4), normal(1, t, heads * d, scale=4)
    options: dict[str, Any] = {"n_heads": heads, "n_kv_heads": heads, "scale": d**-0.5}
    plain = kernels.attention_scores(q, k, **options)
    capped = kernels.attention_scores(q, k, soft_cap=cap, **options)
    expected = cap * torch.tanh(torch.from_numpy(plain).double() / cap)
    assert np.array_equal(capped, expected.float().numpy())
    assert np.abs(plain).max() > 2 * cap >= 2 * np.abs(capped).max()
    assert not np.array_equal(
        *(kernels.attention(q, k, k, np.array([0, t]), soft_cap=c, **options) for c in (cap, None))
    )


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.5, 30.0, 50.0]))
@settings(deadline=None, max_examples=200)
def test_a_soft_cap_is_correctly_rounded(value: float, cap: float) -> None:
    x = np.array([[value]], np.float32)
    with mpmath.workprec(200):
        expected = nearest(cap * mpmath.tanh(mpmath.mpf(value) / cap))
    if abs(expected) > 1.2e-38:
        assert kernels.soft_cap(x, cap) == expected
    assert np.allclose(kernels.soft_cap(x, cap), reference.soft_cap(x.astype(np.float64), cap), 1e-6, 1e-37)
    scores = kernels.attention_scores(
        x, np.ones((1, 1), np.float32), n_heads=1, n_kv_heads=1, scale=1.0, soft_cap=cap
    )
    assert np.array_equal(scores, kernels.soft_cap(x, cap))


def test_silu_of_extremes_is_finite_where_it_should_be() -> None:
    x = np.array([-3e38, -800, 0, 800, 3e38, np.nan, np.inf], dtype=np.float32)
    found = kernels.silu(x)
    assert found[:5].tolist() == [0, 0, 0, 800, np.float32(3e38)]
    assert np.isnan(found[5])
    assert found[6] == np.inf


def test_an_unknown_kv_type_is_refused() -> None:
    x = normal(0, 1, 2)
    with pytest.raises(ValueError, match="f32, f16"):
        kernels.attention(x, x, x, np.array([0, 1]), n_heads=1, n_kv_heads=1, scale=1.0, kv_type="q4_0")


def test_the_layout_in_memory_does_not_matter() -> None:
    q, k, v = normal(0, 9, 8), normal(1, 9, 8), normal(2, 9, 8)
    tables = kernels.rope_tables(np.ones(4, dtype=np.float32), 9)
    options: dict[str, Any] = {"n_heads": 2, "n_kv_heads": 2, "scale": 0.5}

    def results(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
        return [
            kernels.rope(q, *tables, np.arange(9)),
            kernels.rms_norm(q, np.ones(4, dtype=np.float32), 1e-5),
            kernels.swiglu(q, k),
            kernels.attention(q, k, v, np.array([0, 9]), **options),
            kernels.attention_softmax(kernels.attention_scores(q, k, **options), n_heads=2),
        ]

    strided = results(*(np.asfortranarray(x) for x in (q, k, v)))
    for found, expected in zip(strided, results(q, k, v), strict=True):
        assert np.array_equal(found, expected)


def test_threads_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GRAIN", 64)
    monkeypatch.setattr(kernels, "_HEAD_GRAIN", 1)
    q, k, v = normal(0, 33, 6 * 8), normal(1, 33, 2 * 8), normal(2, 33, 2 * 8)
    options: dict[str, Any] = {"n_heads": 6, "n_kv_heads": 2, "scale": 0.5}
    one = kernels.attention(q, k, v, np.array([0, 5, 33]), **options)
    assert np.array_equal(one, kernels.attention(q, k, v, np.array([0, 5, 33]), threads=3, **options))
    scores = kernels.attention_scores(q, k, **options)
    assert np.array_equal(scores, kernels.attention_scores(q, k, threads=3, **options))
    weights = kernels.attention_softmax(scores, n_heads=6, window=9)
    assert np.array_equal(weights, kernels.attention_softmax(scores, n_heads=6, window=9, threads=3))
    assert np.array_equal(kernels.silu(q), kernels.silu(q, threads=3))
    assert np.array_equal(kernels.gelu(q), kernels.gelu(q, threads=3))


@kernel("void(R(float32, 1), R(float32, 2), int64, int64, int64, int64, float32[::1])")
def _weighted(weights, rows, first, stop, left, right, out):  # type: ignore[no-untyped-def]
    weighted_rows(weights, rows, first, stop, left, right, out)


@given(st.integers(0, 9), st.integers(1, 150), st.data())
@settings(deadline=None, max_examples=100)
def test_weighted_rows_of_any_width(n: int, width: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n))
    left = data.draw(st.integers(0, width - 1))
    right = data.draw(st.integers(left + 1, width))
    weights, rows = normal(width, n + 1), normal(n, n + 1, width)
    guarded = np.full(width + 32, 7, dtype=np.float32)
    _weighted(weights, rows, first, n, left, right, guarded[:width])
    expected = np.zeros(width, dtype=np.float32)
    for row in range(first, n):
        expected = expected + weights[row] * rows[row]
    assert np.array_equal(guarded[left:right], expected[left:right])
    assert (guarded[width:] == 7).all()
