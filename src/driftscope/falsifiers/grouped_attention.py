"""Grouped-query attention: does each query head read its own KV head, to the rounding of float32?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.kernels.cached_attention import KeyValueCache, cached_attention
from driftscope.kernels.device import kernels_on
from driftscope.kernels.forward import attention

F32 = NDArray[np.float32]
Attend = Callable[[F32, F32, F32, int, int, float], F32]
"""From q, k, v, query heads, KV heads and scale to the output of every token of one sequence."""

_UNIT_ROUNDOFF = 2.0**-24
_SPREADS = (0.5, 3.0)
"""Standard deviations of q: a flat softmax, and one that a few keys dominate."""
_SCALE_FAULTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, queries, keys and values are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare the attention kernel with float64, and find out which KV head each query head reads.

    Args:
        parameters: `tokens` in the cache, `resamples`, `confidence`.
        regimes: name to `heads`, `kv_heads`, `head_dim`.
        seeds: each draws q, k and v, with a flat and with a peaked softmax.
        evidence: gives the device.

    Returns:
        In each regime: `wrong_heads`, query heads that read keys or values of another head than
        ``q * kv_heads // heads``; `formulas_differ`, heads for which ``q // (heads / kv_heads)`` is another;
        `error`, the largest error over its bound (see `_error_bound`), mean over draws; `largest_error`, the
        largest of all; `absolute`, the largest errors of the first, the second and the last tokens;
        `cached_differs`, values of the last tokens that differ in a bit when they are attended over a
        cache. `devices` has the same of CUDA where the case runs there.
    """
    tokens = parameter(parameters, "tokens", int, least=8)
    resampling = Resampling.of(parameters)
    shapes = {name: _shape(regime) for name, regime in regimes.items()}
    first = next(iter(shapes.values()))
    few = seeds[:2]

    def compare(attend: Attend, shape: tuple[int, int, int], chosen: Sequence[int]) -> dict[str, Any]:
        return _compare(attend, shape, tokens, chosen, resampling)

    return {
        "samples": len(regimes) * len(seeds) * len(_SPREADS),
        "tokens": tokens,
        "regimes": {
            name: compare(kernel, shape, seeds) | {"cached_differs": _cached_differs(shape, tokens, seeds[0])}
            for name, shape in shapes.items()
        },
        "devices": _devices(compare, shapes, few, evidence.device),
        "controls": {
            "other-order": compare(_reversed_keys, first, few),
            "modulo-map": compare(_modulo, first, few),
        },
        "domain": [
            compare(_reversed_keys, first, few[:1]),
            *(compare(_modulo, shape, few[:1]) for shape in shapes.values()),
            *(
                {"scale_fault": fault} | compare(_scaled(1.0 + fault), first, few[:1])
                for fault in _SCALE_FAULTS
            ),
        ],
    }


def kernel(q: F32, k: F32, v: F32, heads: int, kv_heads: int, scale: float) -> F32:
    """The CPU kernel over one sequence."""
    starts = np.array([0, len(q)], dtype=np.int64)
    return attention(q, k, v, starts, n_heads=heads, n_kv_heads=kv_heads, scale=scale)


def _modulo(q: F32, k: F32, v: F32, heads: int, kv_heads: int, scale: float) -> F32:
    """The kernel with query head h on KV head ``h % kv_heads``."""
    read = np.arange(heads) % kv_heads
    k, v = (x.reshape(len(x), kv_heads, -1)[:, read].reshape(len(x), -1) for x in (k, v))
    return kernel(q, k, v, heads, heads, scale)


def _scaled(gain: float) -> Attend:
    return lambda q, k, v, heads, kv_heads, scale: kernel(q, k, v, heads, kv_heads, gain * scale)


def _reversed_keys(q: F32, k: F32, v: F32, heads: int, kv_heads: int, scale: float) -> F32:
    """Attention in NumPy's float32, keys from the last to the first: another order, the same mathematics."""
    head_dim = q.shape[1] // heads
    queries = q.reshape(len(q), heads, head_dim)
    keys, values = (x.reshape(len(x), kv_heads, head_dim) for x in (k, v))
    out = np.zeros_like(queries)
    for i in _positions(len(q)):
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = (queries[i, h] * keys[i::-1, g]).sum(axis=1) * np.float32(scale)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[i, h] = (weights[:, None] * values[i::-1, g]).sum(axis=0)
    return out.reshape(q.shape)


def _positions(tokens: int) -> list[int]:
    """The first, second and third token, one in the middle, the last two."""
    return sorted({0, 1, 2, tokens // 2, tokens - 2, tokens - 1})


def _shape(regime: Mapping[str, Any]) -> tuple[int, int, int]:
    heads, kv_heads, head_dim = (
        parameter(regime, name, int, least=1) for name in ("heads", "kv_heads", "head_dim")
    )
    if heads % kv_heads:
        raise InputError(f"measurement parameter `heads` is {heads}; expected a multiple of {kv_heads}")
    return heads, kv_heads, head_dim


def _draw(seed: int, shape: tuple[int, int, int], tokens: int, spread: float) -> tuple[F32, F32, F32]:
    heads, kv_heads, head_dim = shape
    random = generator(seed, heads, kv_heads)
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    q, k, v = (random.standard_normal((tokens, size)).astype(np.float32) for size in sizes)
    return q * np.float32(spread), k, v


def _compare(
    attend: Attend, shape: tuple[int, int, int], tokens: int, seeds: Sequence[int], resampling: Resampling
) -> dict[str, Any]:
    heads, kv_heads, head_dim = shape
    expected = np.arange(heads) * kv_heads // heads
    wrong = heads_read(attend, shape) != expected
    scale = head_dim**-0.5
    largest, absolute = [], []
    for seed in seeds:
        for spread in _SPREADS:
            q, k, v = _draw(seed, shape, tokens, spread)
            found = attend(q, k, v, heads, kv_heads, scale).reshape(tokens, heads, head_dim)
            ratios, errors = [], []
            for i in _positions(tokens):
                exact, bound = _exact(q[i], k[: i + 1], v[: i + 1], shape, scale)
                error = np.abs(found[i].astype(np.float64) - exact)
                ratios.append(float((error / bound).max()))
                errors.append(float(error.max()))
            largest.append(max(ratios))
            absolute.append(errors)
    worst = np.array(absolute).max(axis=0)
    return {
        "wrong_heads": int(wrong.any(axis=0).sum()),
        "formulas_differ": int((np.arange(heads) // (heads // kv_heads) != expected).sum()),
        "error": with_interval(lambda sample: sample.mean(axis=1), np.array(largest), resampling),
        "largest_error": rounded(max(largest)),
        "absolute": {
            "first": rounded(worst[0]),
            "second": rounded(worst[1]),
            "last": rounded(worst[-2:].max()),
        },
    }


def heads_read(attend: Attend, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Return ``int64[2, heads]``: the KV head whose keys, and whose values, each query head reads; -1: none.

    Keys: head g's key matches the query at token g only, and each token's values are its number. Values: all
    of head g's are g.
    """
    heads, kv_heads, head_dim = shape
    tokens = kv_heads
    q = np.zeros((tokens, heads, head_dim), dtype=np.float32)
    q[:, :, 0] = 1000.0
    matching = np.zeros((tokens, kv_heads, head_dim), dtype=np.float32)
    matching[np.arange(kv_heads), np.arange(kv_heads), 0] = 1.0
    numbers = np.arange(tokens, dtype=np.float32)
    by_token = np.broadcast_to(numbers[:, None, None], matching.shape)
    by_head = np.broadcast_to(numbers[None, :, None], matching.shape)
    found = np.full((2, heads), -1, dtype=np.int64)
    for row, (k, v) in enumerate(((matching, by_token), (np.zeros_like(matching), by_head))):
        flat_q, flat_k, flat_v = (np.ascontiguousarray(x).reshape(tokens, -1) for x in (q, k, v))
        last = attend(flat_q, flat_k, flat_v, heads, kv_heads, 1.0)[-1].reshape(heads, head_dim)
        nearest = np.rint(last[:, 0])
        plain = np.all(np.abs(last - nearest[:, None]) < 1e-3, axis=1)
        found[row, plain] = nearest[plain].astype(np.int64)
    return found


def _exact(q: F32, k: F32, v: F32, shape: tuple[int, int, int], scale: float) -> tuple[F64, F64]:
    """Attention of one token in float64 and the bound of the kernel's error, ``f64[heads, head_dim]`` each.

    Sums are NumPy's over products of elements: a BLAS would differ from host to host.
    """
    heads, kv_heads, head_dim = shape
    group = heads // kv_heads
    queries = q.astype(np.float64).reshape(heads, head_dim)
    keys, values = (x.astype(np.float64).reshape(len(x), kv_heads, head_dim) for x in (k, v))
    out, bound = np.empty_like(queries), np.empty_like(queries)
    for h in range(heads):
        products = keys[:, h // group] * queries[h] * scale
        scores, size = products.sum(axis=1), np.abs(products).sum(axis=1)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        weighted = weights[:, None] * values[:, h // group]
        out[h] = weighted.sum(axis=0)
        bound[h] = _error_bound(len(k), head_dim, float(size.max())) * np.abs(weighted).sum(axis=0)
    return out, np.maximum(bound, np.finfo(np.float32).tiny)


def _error_bound(keys: int, head_dim: int, size: float) -> float:
    """Bound of a value's error, over the weighted sum of the values' sizes.

    With ``g(m) = m u / (1 - m u)`` (Higham 2002, section 3.1) a score errs by at most
    ``g(head_dim + 2) size``, `size` the scaled sum of the products' sizes; a softmax whose scores err by D
    has weights that err by ``exp(2 D) - 1`` in relation to themselves; three roundings make a weight, and
    the sum over keys adds ``g(keys)``.
    """

    def g(count: int) -> float:
        return count * _UNIT_ROUNDOFF / (1.0 - count * _UNIT_ROUNDOFF)

    softmax = float(np.expm1(2.0 * g(head_dim + 2) * size))
    return (1.0 + softmax) * (1.0 + g(keys + 3)) - 1.0


def _cached_differs(shape: tuple[int, int, int], tokens: int, seed: int) -> int:
    """Count values of the last tokens that are not the same bits, token by token over a cache."""
    heads, kv_heads, head_dim = shape
    q, k, v = _draw(seed, shape, tokens, _SPREADS[-1])
    scale = head_dim**-0.5
    whole = kernel(q, k, v, heads, kv_heads, scale)
    cache = KeyValueCache(1, kv_heads, head_dim, tokens)
    differing = 0
    for first, end in ((0, tokens - 2), (tokens - 2, tokens - 1), (tokens - 1, tokens)):
        part = cached_attention(
            q[first:end],
            k[first:end],
            v[first:end],
            np.array([0, end - first], dtype=np.int64),
            cache,
            np.array([0], dtype=np.int64),
            np.array([first], dtype=np.int64),
            n_heads=heads,
            scale=scale,
        )
        differing += int((part.view(np.uint32) != whole[first:end].view(np.uint32)).sum())
    return differing


def _devices(
    compare: Callable[[Attend, tuple[int, int, int], Sequence[int]], dict[str, Any]],
    shapes: Mapping[str, tuple[int, int, int]],
    seeds: Sequence[int],
    device: str,
) -> dict[str, Any]:
    """Measure the CUDA kernel where the case runs on CUDA."""
    if device != "cuda":
        return {"cuda": {"status": "not asked for"}}
    card = kernels_on("cuda")

    def attend(q: F32, k: F32, v: F32, heads: int, kv_heads: int, scale: float) -> F32:
        starts = np.array([0, len(q)], dtype=np.int64)
        q, k, v = (card.to_device(x) for x in (q, k, v))
        found = card.attention(q, k, v, starts, n_heads=heads, n_kv_heads=kv_heads, scale=scale)
        host: F32 = card.to_host(found)
        return host

    return {
        "cuda": {
            "status": "measured",
            **{name: compare(attend, shape, seeds) for name, shape in shapes.items()},
        }
    }
