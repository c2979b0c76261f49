"""What can be wrong with attention: heads, scale, cap, precision, mask, window, keys of other positions.

An engine may record scores, their softmax and the weighted sum, or the sum alone. A fault is put where it
acts and carried on to what was recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.explanations import caps
from driftscope.analysis.explanations.base import F32, F64, I64, Candidate, Case, figure, rounded
from driftscope.analysis.explanations.general import constant_ratio
from driftscope.forward.architecture import score_scale as scale_of
from driftscope.forward.arithmetic import round_to

_SAMPLED_QUERIES = 32
_KEY_SHIFTS = tuple(s for n in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32) for s in (n, -n))
_TURNS = tuple(s for n in range(1, 17) for s in (n, -n))
_TAPS = ("attn_scores", "attn_softmax", "attention")


@dataclass(frozen=True)
class Rows:
    """Some queries of one sequence.

    Attributes:
        queries: their positions.
        q: ``float32[queries, heads, head_dim]``, or None where it was not recorded.
        k: ``float32[keys, kv_heads, head_dim]``, likewise.
        v: ``float32[keys, kv_heads, head_dim]``, likewise.
        scores: ``float64[queries, heads, keys]``, likewise.
        weights: softmax, likewise.
    """

    queries: I64
    q: F32 | None
    k: F32 | None
    v: F32 | None
    scores: F64 | None
    weights: F64 | None


class Attention:
    """The part of attention between what was recorded and an op's output."""

    def __init__(self, case: Case) -> None:
        self.case, self.config = case, case.config
        self.group = case.config.num_heads // case.config.num_kv_heads
        self.half = case.is_engine and case.context.declared.policy.kv_type == "f16"
        self.level = _TAPS.index(case.op.tap)
        self.scale = float(scale_of(case.config))
        self.window = case.config.window_of(case.op.layer)

    @classmethod
    def of(cls, case: Case) -> Attention:
        """That of a case, the same one for every hypothesis."""
        if "attention" not in case.memo:
            case.memo["attention"] = cls(case)
        found = case.memo["attention"]
        assert isinstance(found, cls)
        return found

    @property
    def reaches_scores(self) -> bool:
        """Whether a fault of the scores would show in this op, and its inputs are there."""
        rows = self.rows
        if self.level >= 1 and not self._recomputed("attn_scores"):
            return False
        if self.level == 2 and not self._recomputed("attn_softmax"):
            return False
        return rows[0].q is not None and rows[0].k is not None

    @property
    def reaches_softmax(self) -> bool:
        """Whether a fault of the mask or the softmax would show in this op."""
        if self.level == 0 or (self.level == 2 and not self._recomputed("attn_softmax")):
            return False
        return self.rows[0].scores is not None

    def _recomputed(self, tap: str) -> bool:
        return tap in self.case.op.recomputed or not self.case.context.trace.has(self.case.op.layer, tap)

    @cached_property
    def rows(self) -> list[Rows]:
        """All queries of the sequences of the case."""
        case, config = self.case, self.config

        def heads(name: str, count: int, site: str = "") -> F32 | None:
            if not case.has(name):
                return None
            value = case.part(name, site) if site else case.value(name)
            return value.reshape(value.shape[0], count, config.head_dim)

        q = heads("q_post_rope", config.num_heads)
        k = heads("k_post_rope", config.num_kv_heads)
        v = heads("qkv_bias", config.num_kv_heads, "v") if self.level == 2 else None
        given: dict[str, Sequence[F32] | None] = {}
        for tap in ("attn_scores", "attn_softmax"):
            there = tap in case.op.inputs or (self.level > 0 and case.has(tap))
            given[tap] = case.ragged_value(tap) if there and tap != case.op.tap else None
        found, begin = [], 0
        for index, sequence in enumerate(case.sequences):
            tokens = case.batch.slices[sequence]
            length = tokens.stop - tokens.start
            here = slice(begin, begin + length)
            begin += length
            shape = (length, config.num_heads, length)
            scores, weights = (
                None if values is None else values[index].astype(np.float64).reshape(shape)
                for values in (given["attn_scores"], given["attn_softmax"])
            )
            rows = Rows(
                np.arange(length),
                None if q is None else q[here],
                None if k is None else k[here],
                None if v is None else v[here],
                scores,
                weights,
            )
            if rows.scores is None and rows.q is not None and rows.k is not None:
                rows = replace(rows, scores=self.scores(rows))
            found.append(rows)
        return found

    @cached_property
    def sample(self) -> tuple[int, I64]:
        """The worst sequence and some of its queries, for what is fitted."""
        case = self.case
        errors = [
            np.sum(np.where(mask, target - value, 0.0) ** 2, axis=1)
            for mask, target, value in zip(case.masks, case.targets, case.expected_values, strict=True)
        ]
        if self.level == 2:
            bounds = np.cumsum([0, *(rows.queries.size for rows in self.rows)])
            errors = [errors[0][a:b] for a, b in itertools.pairwise(bounds)]
        worst = max(range(len(errors)), key=lambda i: (float(errors[i].sum()), -i))
        order = np.argsort(-errors[worst], kind="stable")[: _SAMPLED_QUERIES // 2]
        spread = np.linspace(0, errors[worst].size - 1, min(_SAMPLED_QUERIES // 2, errors[worst].size))
        return worst, np.unique(np.concatenate([order, spread.astype(np.int64)]))

    def scores(
        self,
        rows: Rows,
        *,
        q: F32 | None = None,
        k: F32 | None = None,
        heads: I64 | None = None,
        capped: bool = True,
    ) -> F64:
        """Scaled scores of some queries, ``float64[queries, heads, keys]``.

        Args:
            rows: the queries.
            q: stands in for theirs.
            k: stands in for theirs.
            heads: key head of each query head; None for the model's.
            capped: under the model's own cap, if it has one.
        """
        from driftscope.kernels.forward import to_f16
        from driftscope.kernels.matmul import matmul_f32

        left, right = rows.q if q is None else q, rows.k if k is None else k
        assert left is not None
        assert right is not None
        if self.half:
            left, right = to_f16(left), to_f16(right)
        mapping = np.arange(self.config.num_heads) // self.group if heads is None else heads
        found = np.empty((left.shape[0], self.config.num_heads, right.shape[0]))
        for head, source in enumerate(mapping):
            keys = np.ascontiguousarray(right[:, source])
            with np.errstate(all="ignore"):
                found[:, head] = matmul_f32(np.ascontiguousarray(left[:, head]), keys)
        scaled = np.asarray((found * np.float32(self.scale)).astype(np.float32), np.float64)
        return self.capped(scaled) if capped else scaled

    def capped(self, scores: F64) -> F64:
        """Scores under the model's own cap, if it has one."""
        cap = self.config.attention_softcap
        return caps.capped(scores, cap) if cap else scores

    def bare_scores(self, rows: Rows) -> F64:
        """Expected scores before the cap; those that were recorded cannot be had of a model that caps."""
        return self.scores(rows, capped=False) if self.config.attention_softcap else self.scores_of(rows)

    def softmax(self, rows: Rows, scores: F64, *, ahead: int | None = 0, window: int | None = -1) -> F64:
        """Softmax of scores under a mask.

        Args:
            rows: the queries.
            scores: ``float64[queries, heads, keys]``.
            ahead: keys after its own that a query sees; None for all.
            window: keys that it sees at most, its own included; -1 for the model's, None for no window.
        """
        keys = np.arange(scores.shape[2])[None, :]
        query = rows.queries[:, None]
        seen = np.ones((query.size, keys.size), np.bool_) if ahead is None else keys <= query + ahead
        width = self.window if window == -1 else window
        if width:
            seen = seen & (keys > query - width)
        masked = np.where(seen[:, None, :], scores, -np.inf)
        top = masked.max(axis=2, keepdims=True)
        with np.errstate(all="ignore"):
            raised = np.exp(masked - np.where(np.isfinite(top), top, 0.0))
            total = raised.sum(axis=2, keepdims=True)
        return np.asarray(raised / np.where(total > 0, total, 1.0))

    def weigh(self, rows: Rows, weights: F64, *, v: F32 | None = None, heads: I64 | None = None) -> F64:
        """Weighted sums of the values, ``float64[queries, heads * head_dim]``."""
        from driftscope.kernels.forward import to_f16
        from driftscope.kernels.matmul import matmul_f32

        values = rows.v if v is None else v
        assert values is not None
        left = weights.astype(np.float32)
        if self.half:
            left, values = to_f16(left), to_f16(values)
        mapping = np.arange(self.config.num_heads) // self.group if heads is None else heads
        found = [
            matmul_f32(np.ascontiguousarray(left[:, head]), np.ascontiguousarray(values[:, source].T))
            for head, source in enumerate(mapping)
        ]
        return np.concatenate(found, axis=1).astype(np.float64)

    def from_scores(self, rows: Rows, scores: F64) -> F64:
        """The op's output for some queries, of scores."""
        if self.level == 0:
            return scores.reshape(scores.shape[0], -1)
        return self.from_weights(rows, self.softmax(rows, scores))

    def from_weights(self, rows: Rows, weights: F64) -> F64:
        """The op's output for some queries, of a softmax."""
        return self.weigh(rows, weights) if self.level == 2 else weights.reshape(weights.shape[0], -1)

    def whole(self, make: Callable[[Rows], F64]) -> NDArray[Any] | list[NDArray[Any]]:
        """The op's output, sequence by sequence, in the shape of the case."""
        parts = [self.case.output(make(rows).astype(np.float32)).astype(np.float64) for rows in self.rows]
        return np.concatenate(parts) if self.level == 2 else [*parts]

    @cached_property
    def part(self) -> Rows:
        """The sampled queries."""
        index, queries = self.sample
        rows = self.rows[index]
        return replace(
            rows,
            queries=rows.queries[queries],
            q=None if rows.q is None else rows.q[queries],
            scores=None if rows.scores is None else rows.scores[queries],
            weights=None if rows.weights is None else rows.weights[queries],
        )

    def misfit(self, make: Callable[[Rows], F64]) -> float:
        """Error energy of the sampled queries."""
        target, mask, _ = self.sampled
        difference = np.where(mask, target - make(self.part), 0.0)
        error = float(np.sum(difference * difference))
        return error if np.isfinite(error) else float("inf")

    @cached_property
    def sampled_before(self) -> float:
        """Error energy of the sampled queries as they were found."""
        target, mask, expected = self.sampled
        return float(np.sum(np.where(mask, target - expected, 0.0) ** 2))

    @cached_property
    def sampled(self) -> tuple[F64, NDArray[np.bool_], F64]:
        """What was found of the sampled queries, which values count, and what was expected."""
        case = self.case
        index, queries = self.sample
        if self.level == 2:
            queries, index = sum(r.queries.size for r in self.rows[:index]) + queries, 0
        return case.targets[index][queries], case.masks[index][queries], case.expected_values[index][queries]

    def if_near(
        self,
        class_: str,
        what: str,
        make: Callable[[Rows], F64],
        complexity: int,
        evidence: dict[str, Any],
    ) -> Iterator[Candidate]:
        """A candidate, where it explains half of the error of the sampled queries."""
        if self.misfit(make) <= 0.6 * self.sampled_before:
            yield Candidate(class_, what, self.whole(make), complexity, evidence)

    def scores_of(self, rows: Rows) -> F64:
        """Expected scores of some queries."""
        return self.scores(rows) if rows.scores is None else rows.scores


def _scores_side(case: Case) -> Attention | None:
    found = Attention.of(case)
    return found if found.reaches_scores or found.reaches_softmax else None


def score_scale(case: Case) -> Iterator[Candidate]:
    """Scores are multiplied by another number than the inverse root of the head size."""
    attention = _scores_side(case)
    own_cap = case.config.attention_softcap
    if attention is None or (own_cap and not attention.reaches_scores):
        return
    root = case.config.head_dim**0.5

    def make(factor: float) -> Callable[[Rows], F64]:
        return lambda rows: attention.from_scores(
            rows, attention.capped(factor * attention.bare_scores(rows))
        )

    if attention.level == 0 and not own_cap:
        target = np.concatenate(
            [np.where(m, t, 0).ravel() for m, t in zip(case.masks, case.targets, strict=True)]
        )
        wanted = np.concatenate(
            [np.where(m, e, 0).ravel() for m, e in zip(case.masks, case.expected_values, strict=True)]
        )
        energy = float(np.sum(wanted * wanted))
        fitted = float(np.sum(target * wanted)) / energy if energy else 1.0
    else:
        fitted = caps.least_on_grid(lambda factor: attention.misfit(make(factor)), 0.01, 100.0)
    named = {
        root: "they are not divided by the root of the head size",
        1 / root: "they are divided by the root of the head size twice",
        2.0: "they are twice as large",
        0.5: "they are half as large",
        fitted: f"they are {figure(fitted)} times as large",
    }
    for factor, what in named.items():
        if factor > 0 and abs(factor - 1.0) > 1e-6:
            yield from attention.if_near(
                "score-scale",
                f"the scale of the scores is wrong: {what}",
                make(factor),
                1 if factor == fitted else 0,
                {"ratio": rounded(factor)},
            )


def soft_cap(case: Case) -> Iterator[Candidate]:
    """Scores are capped where they should not be, or the other way round."""
    attention = _scores_side(case)
    if attention is None:
        return
    largest = max(
        float(np.abs(np.tril(attention.scores_of(rows).swapaxes(0, 1))).max(initial=0.0))
        for rows in attention.rows
    )
    if not 0.0 < largest < np.inf:
        return
    own = case.config.attention_softcap
    if own and attention.reaches_scores:
        yield from _other_cap(attention, own)
        return
    for kind, text, low in (
        (caps.capped, "scores are capped at {}", 0.02 * largest),
        (caps.uncapped, "scores lack their cap of {}", 1.0001 * largest),
    ):

        def make(cap: float, kind: Callable[[F64, float], F64] = kind) -> Callable[[Rows], F64]:
            return lambda rows: attention.from_scores(rows, kind(attention.scores_of(rows), cap))

        fitted = caps.least_on_grid(partial(_capped_misfit, attention, make), low, 1e3 * largest)
        for cap, complexity in (*((cap, 0) for cap in caps.CAPS), (fitted, 1)):
            if cap > low:
                yield from attention.if_near(
                    "soft-cap",
                    text.format(figure(cap)),
                    make(cap),
                    complexity,
                    {"cap": rounded(cap), "largest": rounded(largest)},
                )


def _other_cap(attention: Attention, own: float) -> Iterator[Candidate]:
    """Scores of a model that caps them: without the cap, or under another one."""
    yield from attention.if_near(
        "soft-cap",
        f"scores lack their cap of {figure(own)}",
        lambda rows: attention.from_scores(rows, attention.bare_scores(rows)),
        0,
        {"cap": rounded(own)},
    )

    def make(cap: float) -> Callable[[Rows], F64]:
        return lambda rows: attention.from_scores(rows, caps.capped(attention.bare_scores(rows), cap))

    fitted = caps.least_on_grid(partial(_capped_misfit, attention, make), 0.02 * own, 50.0 * own)
    for cap, complexity in (*((cap, 0) for cap in (*caps.CAPS, 2 * own, own / 2)), (fitted, 1)):
        if cap != own:
            yield from attention.if_near(
                "soft-cap",
                f"scores are capped at {figure(cap)} instead of {figure(own)}",
                make(cap),
                complexity,
                {"cap": rounded(cap), "expected_cap": rounded(own)},
            )


def _capped_misfit(attention: Attention, make: Callable[[float], Callable[[Rows], F64]], cap: float) -> float:
    return attention.misfit(make(cap))


def head_mapping(case: Case) -> Iterator[Candidate]:
    """Query heads meet other key or value heads."""
    attention = Attention.of(case)
    config = case.config
    kv, heads = config.num_kv_heads, config.num_heads
    expected = np.arange(heads) // attention.group
    tiled = np.arange(heads) % kv
    makers: list[tuple[str, Callable[[I64], Callable[[Rows], F64]]]] = []
    if attention.reaches_scores:
        makers.append(
            ("key", lambda m: lambda rows: attention.from_scores(rows, attention.scores(rows, heads=m)))
        )
    if attention.level == 2 and attention.rows[0].v is not None:

        def weights_of(rows: Rows) -> F64:
            if rows.weights is not None:
                return rows.weights
            return attention.softmax(rows, attention.scores_of(rows))

        if attention.rows[0].weights is not None or attention.rows[0].scores is not None:
            makers.append(("value", lambda m: lambda rows: attention.weigh(rows, weights_of(rows), heads=m)))
        if attention.reaches_scores:
            makers.append(
                (
                    "key and value",
                    lambda m: (
                        lambda rows: attention.weigh(
                            rows, attention.softmax(rows, attention.scores(rows, heads=m)), heads=m
                        )
                    ),
                )
            )
    if 1 < kv < heads:
        for what, make in makers:
            yield from attention.if_near(
                "head-mapping",
                f"{what} heads are tiled over the query heads instead of repeated",
                make(tiled),
                0,
                {"mapping": tiled.tolist(), "heads": what},
            )
            best = _best_heads(attention, make)
            if not np.array_equal(best, expected) and not np.array_equal(best, tiled):
                yield from attention.if_near(
                    "head-mapping",
                    f"query heads meet the {what} heads {', '.join(map(str, best.tolist()))}",
                    make(best),
                    3,
                    {"mapping": best.tolist(), "heads": what},
                )
    yield from _exchanged_heads(attention)


def _best_heads(attention: Attention, make: Callable[[I64], Callable[[Rows], F64]]) -> I64:
    """The key or value head of each query head that leaves least, each tried alone."""
    config = attention.config
    target, mask, _ = attention.sampled
    errors = []
    for source in range(config.num_kv_heads):
        found = make(np.full(config.num_heads, source))(attention.part)
        difference = np.nan_to_num(np.where(mask, target - found, 0.0) ** 2)
        errors.append(difference.reshape(len(target), config.num_heads, -1).sum(axis=(0, 2)))
    return np.asarray(np.argmin(np.stack(errors), axis=0), np.int64)


def _exchanged_heads(attention: Attention) -> Iterator[Candidate]:
    case, heads = attention.case, attention.config.num_heads
    found, mask, wanted = attention.sampled
    target, expected = (
        np.where(mask, value, 0.0).reshape(len(value), heads, -1) for value in (found, wanted)
    )
    distance = np.stack(
        [np.sum((target[:, head][:, None] - expected) ** 2, axis=(0, 2)) for head in range(heads)]
    )
    source = np.argmin(distance, axis=1)
    if np.array_equal(source, np.arange(heads)) or np.unique(source).size != heads:
        return

    def moved(value: F64) -> F64:
        return value.reshape(value.shape[0], heads, -1)[:, source].reshape(value.shape)

    predicted = [moved(value) for value in case.expected_values]
    yield Candidate(
        "head-mapping",
        f"heads lie in the order {', '.join(map(str, source.tolist()))}",
        predicted if case.ragged else predicted[0],
        3,
        {"mapping": source.tolist(), "heads": "query"},
    )


def score_precision(case: Case) -> Iterator[Candidate]:
    """Queries, keys, scores or their softmax are rounded to 16 bits, or summed in float16."""
    attention = Attention.of(case)
    for dtype in ("f16", "bf16"):
        if dtype == case.dtype:
            # What an engine of this dtype does anyway.
            continue
        if attention.reaches_scores:
            yield from attention.if_near(
                "score-precision",
                f"queries and keys are rounded to {dtype}",
                partial(_rounded_factors, attention, dtype),
                0,
                {"dtype": dtype, "rounded": "queries and keys"},
            )
        if attention.reaches_scores or attention.reaches_softmax:
            for before in (True, False):
                yield from attention.if_near(
                    "score-precision",
                    f"scores are rounded to {dtype} {'before' if before else 'after'} their scale",
                    partial(_rounded_scores, attention, dtype, before),
                    0,
                    {"dtype": dtype, "rounded": "scores"},
                )
        if attention.level:
            yield from _rounded_weights(attention, dtype)
    if attention.reaches_scores:
        yield from _summed_in_half(attention)


def _rounded_factors(attention: Attention, dtype: str, rows: Rows) -> F64:
    assert rows.q is not None
    assert rows.k is not None
    scores = attention.scores(rows, q=round_to(rows.q, dtype), k=round_to(rows.k, dtype))
    return attention.from_scores(rows, scores)


def _rounded_scores(attention: Attention, dtype: str, before: bool, rows: Rows) -> F64:
    scale = attention.scale if before else 1.0
    bare = (attention.scores_of(rows) / scale).astype(np.float32)
    return attention.from_scores(rows, round_to(bare, dtype).astype(np.float64) * scale)


def _rounded_weights(attention: Attention, dtype: str) -> Iterator[Candidate]:
    first = attention.rows[0]
    if attention.level == 1 and attention.reaches_softmax:
        what = "the softmax is rounded to"
    elif attention.level == 2 and (first.weights is not None or first.scores is not None):
        what = "the softmax and the values are rounded to"
    else:
        return

    def make(rows: Rows) -> F64:
        weights = rows.weights
        if weights is None:
            weights = attention.softmax(rows, attention.scores_of(rows))
        rough = round_to(weights.astype(np.float32), dtype).astype(np.float64)
        if attention.level == 1:
            return rough.reshape(rough.shape[0], -1)
        assert rows.v is not None
        return attention.weigh(rows, rough, v=round_to(rows.v, dtype))

    yield from attention.if_near(
        "score-precision",
        f"{what} {dtype}",
        make,
        0,
        {"dtype": dtype, "rounded": "softmax"},
    )


def _summed_in_half(attention: Attention) -> Iterator[Candidate]:
    """Sums in float16: in the order of the channels, or in one that is not known."""

    def make(rows: Rows) -> F64:
        assert rows.q is not None
        assert rows.k is not None
        half = np.float16
        with np.errstate(over="ignore", invalid="ignore"):
            q, k = rows.q.astype(half), rows.k.astype(half)
            keys = k[:, np.arange(attention.config.num_heads) // attention.group]
            total = np.zeros((q.shape[0], q.shape[1], k.shape[0]), half)
            for channel in range(q.shape[2]):
                total = total + q[:, :, channel][:, :, None] * keys[:, :, channel].T[None]
        return attention.from_scores(rows, total.astype(np.float64) * attention.scale)

    _, mask, expected = attention.sampled
    found = make(attention.part)
    simulated = float(np.sum(np.nan_to_num(np.where(mask, found - expected, 0.0)) ** 2))
    left, before = attention.misfit(make), attention.sampled_before
    signal = float(np.sum(np.where(mask, expected, 0.0) ** 2))
    evidence = {"dtype": "f16", "rounded": "sums", "error_of_such_sums": rounded(simulated / signal)}
    yield from attention.if_near("score-precision", "scores are summed in float16", make, 2, evidence)
    # Another order of the sum gives other roundings, of the same size.
    alike = 0.1 * simulated <= before <= 10 * simulated and left <= 4 * (before + simulated)
    case = attention.case
    yield Candidate(
        "score-precision",
        "scores are off by as much as sums in float16 are",
        [*case.expected_values] if case.ragged else case.expected,
        3,
        evidence,
        accepted=alike and before <= 1e-2 * signal and case.before > 100 * case.floor,
    )


def mask(case: Case) -> Iterator[Candidate]:
    """A query sees keys of later positions, or not its own."""
    attention = Attention.of(case)
    if not attention.reaches_softmax:
        return
    for ahead, what in (
        (1, "a query sees one key too many: that of the next position"),
        (None, "there is no causal mask: a query sees all keys"),
        (-1, "a query does not see the key of its own position"),
        (2, "a query sees two keys too many"),
    ):
        yield from attention.if_near(
            "causal-mask",
            what,
            partial(_masked, attention, ahead, -1),
            0,
            {"ahead": ahead},
        )


def _masked(attention: Attention, ahead: int | None, width: int | None, rows: Rows) -> F64:
    scores = attention.scores_of(rows)
    if ahead != 0 and rows.scores is not None and rows.q is not None and rows.k is not None:
        # Some engines record scores under the mask: those of keys to come are formed again.
        past = np.arange(scores.shape[2])[None, :] <= rows.queries[:, None]
        scores = np.where(past[:, None, :], scores, attention.scores(rows))
    return attention.from_weights(rows, attention.softmax(rows, scores, ahead=ahead, window=width))


def window(case: Case) -> Iterator[Candidate]:
    """The sliding window is one too wide or too narrow, missing, or there is one that should not be."""
    attention = Attention.of(case)
    if not attention.reaches_softmax:
        return
    right = attention.window
    tried: dict[int | None, int] = {}
    if right:
        tried = {right + 1: 0, right - 1: 0, None: 0, 2 * right: 1, right // 2: 1}
    if (first := _first_wrong_position(attention)) is not None:
        for candidate in (first, first + 1, first - 1):
            tried.setdefault(candidate, 1)
    width: int | None
    for width, complexity in tried.items():
        if width == right or (width is not None and width < 1):
            continue
        what = "no window" if width is None else f"a window of {width} keys"
        wanted = "none" if right is None else str(right)
        yield from attention.if_near(
            "window",
            f"attention has {what} instead of {wanted}",
            partial(_masked, attention, 0, width),
            complexity,
            {"window": width, "expected_window": right},
        )


def _first_wrong_position(attention: Attention) -> int | None:
    """The first position with an error, which is where a window begins to matter."""
    case = attention.case
    index, _ = attention.sample
    rows = attention.rows[index]
    if attention.level == 2:
        begin = sum(r.queries.size for r in attention.rows[:index])
        here = slice(begin, begin + rows.queries.size)
        difference, wanted = case.residual[here], case.expected[here]
    else:
        difference = np.where(case.masks[index], case.targets[index] - case.expected_values[index], 0.0)
        wanted = case.expected_values[index]
    error = np.sum(difference * difference, axis=1)
    signal = np.sum(np.where(np.isfinite(wanted), wanted, 0.0) ** 2, axis=1)
    wrong = np.flatnonzero(error > 1e-9 * signal + 1e-6 * float(error.max(initial=0.0)))
    return int(wrong[0]) if wrong.size else None


def other_positions(case: Case) -> Iterator[Candidate]:
    """Keys or values are those of other positions: a cache that is shifted, or turned for other positions."""
    attention = Attention.of(case)
    if attention.reaches_scores:
        rows = attention.rows[attention.sample[0]]
        assert rows.k is not None
        length = rows.k.shape[0]

        def shifted(shift: int) -> Callable[[Rows], F64]:
            def make(part: Rows) -> F64:
                assert part.k is not None
                return attention.from_scores(part, attention.scores(part, k=np.roll(part.k, shift, axis=0)))

            return make

        shifts = [s for s in _KEY_SHIFTS if abs(s) < length]
        if shifts:
            best = min(shifts, key=lambda s: attention.misfit(shifted(s)))
            yield from attention.if_near(
                "position-shift",
                f"keys are those of the tokens {abs(best)} {'before' if best > 0 else 'after'}",
                shifted(best),
                1,
                {"shift": -best, "of": "keys"},
            )

        def turned(shift: int) -> Callable[[Rows], F64]:
            def make(part: Rows) -> F64:
                assert part.k is not None
                return attention.from_scores(part, attention.scores(part, k=_turned(case, part.k, shift)))

            return make

        best = min(_TURNS, key=lambda s: attention.misfit(turned(s)))
        yield from attention.if_near(
            "position-shift",
            f"keys are turned by {best:+d} positions against the queries",
            turned(best),
            1,
            {"shift": best, "of": "keys"},
        )
    if attention.level == 2 and attention.rows[0].v is not None:
        first = attention.rows[0]
        if first.weights is None and first.scores is None:
            return

        def moved(shift: int) -> Callable[[Rows], F64]:
            def make(part: Rows) -> F64:
                assert part.v is not None
                weights = part.weights
                if weights is None:
                    weights = attention.softmax(part, attention.scores_of(part))
                return attention.weigh(part, weights, v=np.roll(part.v, shift, axis=0))

            return make

        longest = max(rows.queries.size for rows in attention.rows)
        shifts = [s for s in _KEY_SHIFTS if abs(s) < longest]
        if shifts:
            best = min(shifts, key=lambda s: attention.misfit(moved(s)))
            yield from attention.if_near(
                "position-shift",
                f"values are those of the tokens {abs(best)} {'before' if best > 0 else 'after'}",
                moved(best),
                1,
                {"shift": -best, "of": "values"},
            )


def _turned(case: Case, k: F32, shift: int) -> F32:
    from driftscope.analysis.explanations.rope import frequencies_of

    if "frequencies" not in case.memo:
        case.memo["frequencies"] = frequencies_of(case.artifact, case.op.layer).astype(np.float64)
    angle = shift * case.memo["frequencies"]
    half = angle.size
    z = (k[..., :half] + 1j * k[..., half : 2 * half]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag, k[..., 2 * half :]], axis=-1).astype(np.float32)


def sink(case: Case) -> Iterator[Candidate]:
    """The softmax has one more term, of score zero, in its denominator."""
    attention = Attention.of(case)
    if not attention.reaches_softmax:
        return

    def make(rows: Rows) -> F64:
        scores = attention.scores_of(rows)
        wide = np.concatenate([np.zeros((*scores.shape[:2], 1)), scores], axis=2)
        moved = replace(rows, queries=rows.queries + 1)
        return attention.from_weights(rows, attention.softmax(moved, wide)[:, :, 1:])

    yield from attention.if_near(
        "cross-match", "the softmax has a term of one more in its denominator", make, 0, {}
    )


def ratio(case: Case) -> Iterator[Candidate]:
    """The whole output is off by a number."""
    if case.op.tap == "attention":
        yield from constant_ratio(case)


SCORES: tuple[Callable[[Case], Iterator[Candidate]], ...] = (
    score_scale,
    soft_cap,
    head_mapping,
    score_precision,
    other_positions,
)
SOFTMAX: tuple[Callable[[Case], Iterator[Candidate]], ...] = (mask, window, *SCORES, sink)
OUTPUT: tuple[Callable[[Case], Iterator[Candidate]], ...] = (*SOFTMAX, ratio)
