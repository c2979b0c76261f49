"""Attention over a cache is attention over the whole sequence, bit for bit, however it is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftscope.kernels.cached_attention import KeyValueCache, cached_attention
from driftscope.kernels.forward import attention


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 3))
    return {
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.sampled_from([1, 3, 7])),
        "head_dim": draw(st.sampled_from([2, 6, 16])),
        "pieces": draw(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4)),
        "window": draw(st.none() | st.integers(1, 9)),
        "soft_cap": draw(st.none() | st.just(5.0)),
        "kv_type": draw(st.sampled_from(["f32", "f16"])),
        "threads": draw(st.sampled_from([1, 3])),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_token_by_token_gives_the_bits_of_the_whole(case: dict[str, Any]) -> None:
    """Three sequences grow by a few tokens a step; a sequence that grows by none is left out of the step."""
    lengths = [sum(step[s] for step in case["pieces"]) for s in range(3)]
    random = np.random.Generator(np.random.Philox(case["seed"]))
    n_heads, n_kv_heads, head_dim = case["n_heads"], case["n_kv_heads"], case["head_dim"]
    common = {
        "n_heads": n_heads,
        "scale": head_dim**-0.5,
        **{key: case[key] for key in ("window", "soft_cap", "kv_type")},
    }
    parts = []
    for length in lengths:
        draws = [random.standard_normal((length, heads * head_dim)) for heads in (n_heads, *[n_kv_heads] * 2)]
        parts.append([draw.astype(np.float32) * np.float32(2) for draw in draws])
    expected = [
        attention(q, k, v, np.array([0, len(q)]), n_kv_heads=n_kv_heads, **common) if len(q) else q
        for q, k, v in parts
    ]
    cache = KeyValueCache(3, n_kv_heads, head_dim, max(1, *lengths))
    done = [0, 0, 0]
    for step in case["pieces"]:
        # The order of the sequences in a step is their own.
        growing = [s for s in (2, 0, 1) if step[s]]
        if not growing:
            continue
        new = [[array[done[s] : done[s] + step[s]] for array in parts[s]] for s in growing]
        q, k, v = (np.concatenate(arrays) for arrays in zip(*new, strict=True))
        starts = np.cumsum([0, *(step[s] for s in growing)])
        found = cached_attention(
            q,
            k,
            v,
            starts,
            cache,
            np.array(growing),
            np.array([done[s] for s in growing]),
            threads=case["threads"],
            **common,
        )
        for index, s in enumerate(growing):
            part = found[starts[index] : starts[index + 1]]
            assert np.array_equal(part, expected[s][done[s] : done[s] + step[s]])
            done[s] += step[s]


def _call(**changes: Any) -> None:
    x = np.zeros((2, 4), dtype=np.float32)
    cache = KeyValueCache(1, 1, 4, 2)
    one = np.array([0])
    options = {"n_heads": 1, "scale": 0.5, **changes}
    cached_attention(x, x, x, np.array([0, 2]), cache, one, options.pop("lengths", one), **options)


def test_a_full_cache_and_an_unknown_type_are_refused() -> None:
    _call()
    with pytest.raises(ValueError, match="longer than the cache of 2 tokens"):
        _call(lengths=np.array([1]))
    with pytest.raises(ValueError, match="kv_type 'f8'"):
        _call(kv_type="f8")
