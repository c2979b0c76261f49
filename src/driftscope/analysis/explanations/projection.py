"""What can be wrong with a projection as a whole: rows, bias, which matrix, how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from driftscope.analysis.explanations import caps
from driftscope.analysis.explanations.base import F64, I64, Candidate, Case, figure, rounded
from driftscope.analysis.explanations.linear import Linear
from driftscope.analysis.explanations.not_finite import LARGEST_F16
from driftscope.forward.architecture import site_tensor
from driftscope.forward.arithmetic import round_to
from driftscope.forward.policy import LAYER_SITES, WHOLE_MODEL

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_SAMPLED_ROWS = 128
_SAMPLED_TOKENS = 16
_MOST_COLUMNS = 8192


def interleaved(rows: int, heads: int) -> I64:
    """Stored row of each row, where a head's two halves are stored interleaved (GGUF's q and k)."""
    stored = np.arange(rows, dtype=np.int64)
    return stored.reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def row_permutation(case: Case) -> Iterator[Candidate]:
    """Rows of q or k lie in the other pairing's order, over the right or a wrong number of heads."""
    if case.op.part not in ("q", "k"):
        return
    config, rows = case.config, case.target.shape[1]
    right = config.num_heads if case.op.part == "q" else config.num_kv_heads
    linear = Linear.of(case)
    bias = linear.bias().astype(np.float64) if linear else np.zeros(rows)
    for heads, name, order in _orders(rows, right):
        class_ = "row-permutation" if heads == right else "row-permutation-heads"
        what = f"rows are those of the weights {name}"
        if heads != right:
            what += f" over {heads} heads instead of {right}"
        evidence = {"heads": heads, "expected_heads": right, "order": name}
        complexity = 0 if heads == right else 1
        yield Candidate(class_, what, case.expected[:, order], complexity, evidence)
        if bias.any():
            bare = (case.expected - bias)[:, order] + bias
            yield Candidate(class_, f"{what}, the bias not", bare, complexity, evidence)
            if case.op.tap == "qkv_bias" and "qkv_matmul" not in case.op.recomputed:
                moved = case.expected - bias + bias[order]
                yield Candidate(class_, f"the bias: {what}", moved, complexity, evidence)


def _orders(rows: int, right: int) -> Iterator[tuple[int, str, I64]]:
    proper = interleaved(rows, right)
    back = np.argsort(proper)
    for heads in [right, *(h for h in range(1, rows // 2 + 1) if h != right)]:
        if rows % (2 * heads):
            continue
        order = interleaved(rows, heads)
        inverse = np.argsort(order)
        yield heads, "with each head's halves interleaved", inverse
        yield heads, "with each head's neighbours taken apart", order
        if heads != right:
            # Written over one number of heads and read over the other.
            yield heads, "with halves interleaved, to be taken apart again,", inverse[proper]
            yield heads, "with halves interleaved and taken apart again", back[order]


def fused_rows(case: Case) -> Iterator[Candidate]:
    """Rows of q, k and v that were stored as one matrix are split in another arrangement."""
    linear, config = Linear.of(case), case.config
    if linear is None or case.op.part not in ("q", "k", "v"):
        return
    names = [site_tensor(config, case.op.layer, site) for site in "qkv"]
    if not all(case.has_tensor(name) for name in names):
        return
    heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    counts = (heads * dim, kv * dim, kv * dim)
    bounds = np.cumsum((0, *counts))
    place = "qkv".index(case.op.part)
    own = slice(int(bounds[place]), int(bounds[place + 1]))
    rows, tokens = _sample(case)
    fused: F64 | None = None
    for what, order in _arrangements(heads, kv, dim):
        source = order[own][rows]
        if np.array_equal(source, rows + own.start):
            continue
        if fused is None:
            x = case.activation(linear.x[tokens], linear.name, linear.site)
            fused = np.concatenate([linear.times(case.weight(name), x) for name in names], axis=1)
        yield Candidate(
            "row-permutation-heads",
            f"the fused rows of q, k and v are {what}",
            linear.gives(fused[:, source], rows),
            1,
            {"arrangement": what},
            tokens=tokens,
            channels=rows,
        )


def _arrangements(heads: int, kv: int, dim: int) -> Iterator[tuple[str, I64]]:
    """Row of q, k and v side by side that is read in the place of each."""
    group = heads // kv
    rows = np.arange((heads + 2 * kv) * dim, dtype=np.int64)
    by_group = rows.reshape(kv, group + 2, dim)
    parts = (by_group[:, :group], by_group[:, group : group + 1], by_group[:, group + 1 :])
    split = np.concatenate([part.reshape(-1) for part in parts])
    yield "split as if they lay group by group", split
    yield "stored group by group and split as if they lay side by side", np.argsort(split)


def bias(case: Case) -> Iterator[Candidate]:
    """The bias is left out, or added twice, or that of another layer."""
    linear = Linear.of(case)
    name = linear.bias_name if linear else ""
    if linear is None or not linear.with_bias or not case.has_tensor(name):
        return
    own = case.vector(name).astype(np.float64)
    rms = {"bias_rms": rounded(float(np.sqrt(np.mean(own * own))))}
    yield Candidate("bias-dropped", "the bias is not added", case.expected - own, 0, rms)
    yield Candidate("bias-dropped", "the bias is added twice", case.expected + own, 0, rms)
    yield Candidate("bias-dropped", "the bias is subtracted", case.expected - 2 * own, 0, rms)
    for layer in range(case.config.num_layers):
        other = site_tensor(case.config, layer, linear.site).removesuffix("weight") + "bias"
        if layer != case.op.layer and case.has_tensor(other):
            value = case.vector(other).astype(np.float64)
            if value.shape == own.shape:
                yield Candidate(
                    "other-layer",
                    f"the bias is that of layer {layer}",
                    case.expected - own + value,
                    1,
                    {"layer": layer, "tensor": other},
                )


def other_tensor(case: Case) -> Iterator[Candidate]:
    """Another matrix of the same layer stands in: gate for up, k for v."""
    linear = Linear.of(case)
    if linear is None or case.op.layer == WHOLE_MODEL:
        return
    for site in LAYER_SITES:
        name = site_tensor(case.config, case.op.layer, site)
        ref = case.artifact.tensors.get(name)
        if site == linear.site or ref is None or ref.shape != linear.shape:
            continue
        rows, tokens = _sample(case)
        predicted = linear.of_tensor(name, rows, tokens)
        swapped = {site, linear.site} == {"gate", "up"}
        yield Candidate(
            "gate-up-swapped" if swapped else "cross-match",
            f"the weights are those of {site}",
            predicted,
            0,
            {"tensor": name},
            tokens=tokens,
            channels=rows,
        )


def other_layer(case: Case) -> Iterator[Candidate]:
    """The matrix is that of another layer."""
    linear = Linear.of(case)
    if linear is None:
        return
    rows, tokens = _sample(case)
    for layer, name in linear.other_layers():
        predicted = linear.of_tensor(name, rows, tokens)
        yield Candidate(
            "other-layer",
            f"the weights are those of layer {layer}",
            predicted,
            0,
            {"layer": layer, "tensor": name},
            tokens=tokens,
            channels=rows,
        )


def _sample(case: Case) -> tuple[I64, I64]:
    """Some channels and tokens, the worst token among them."""
    channels, count = case.target.shape[1], case.tokens.size
    rows = np.unique(np.linspace(0, channels - 1, min(_SAMPLED_ROWS, channels)).astype(np.int64))
    worst = int(np.argmax(np.sum(case.residual**2, axis=1)))
    tokens = np.linspace(0, count - 1, min(_SAMPLED_TOKENS, count)).astype(np.int64)
    return rows, np.unique(np.append(tokens, worst))


def transposed(case: Case) -> Iterator[Candidate]:
    """The bytes of the matrix are read as those of its transpose."""
    linear = Linear.of(case)
    if linear is None:
        return
    rows, columns = linear.shape
    # Rows side by side: what a row of the transpose reads then lies in few rows of the matrix.
    first = max(0, (rows - _SAMPLED_ROWS) // 2)
    sample = np.arange(first, min(rows, first + _SAMPLED_ROWS))
    kinds = {"its bytes are read in the transposed layout": sample[:, None] + rows * np.arange(columns)}
    if rows != columns:
        flat = sample[:, None] * columns + np.arange(columns)
        kinds["it is stored transposed and read as if it were not"] = flat % rows * columns + flat // rows
    for what, places in kinds.items():
        needed, back = np.unique(places // columns, return_inverse=True)
        weight = case.weight(linear.name, needed)[back.reshape(places.shape), places % columns]
        predicted = linear.gives(linear.times(weight), sample)
        what = "the matrix is transposed" if rows == columns else what
        yield Candidate("transposed", what, predicted, 0, {"rows": rows, "columns": columns}, channels=sample)


def head_tie(case: Case) -> Iterator[Candidate]:
    """The LM head multiplies with the embedding where it has a matrix of its own, or the other way round."""
    linear = Linear.of(case)
    if linear is None or linear.site != "lm_head":
        return
    rows, tokens = _sample(case)
    for artifact, whose in ((case.context.own, "its own"), (case.context.reference, "the reference's")):
        for name in (_EMBEDDING, _HEAD):
            ref = artifact.tensors.get(name) if artifact else None
            if (
                ref is None
                or ref.shape != linear.shape
                or (artifact is case.artifact and name == linear.name)
            ):
                continue
            weight = case.weight(name, rows, artifact=artifact)
            x = case.activation(linear.x[tokens], linear.name, "lm_head")
            label = "embedding" if name == _EMBEDDING else "lm_head"
            yield Candidate(
                "head-tie",
                f"the head multiplies with {whose} {label}",
                linear.gives(linear.times(weight, x), rows),
                0,
                {"tensor": name, "artifact": whose},
                tokens=tokens,
                channels=rows,
            )
    correlation = _correlation(case.target, case.expected)
    if abs(correlation) < 0.2 and np.any(case.target):
        yield Candidate(
            "head-tie",
            f"the logits are those of another matrix: they correlate with the expected ones by "
            f"{figure(correlation)}",
            case.expected,
            20,
            {"correlation": rounded(correlation)},
            accepted=True,
        )


def _correlation(a: F64, b: F64) -> float:
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    energy = float(np.sum(a * a)) * float(np.sum(b * b))
    return float(np.sum(a * b)) / energy**0.5 if energy else 0.0


def missing(case: Case) -> Iterator[Candidate]:
    """The matrix is not there: the product is zero."""
    linear = Linear.of(case)
    bias = linear.bias().astype(np.float64) if linear else 0.0
    what = "the product is zero, as if the weights were missing"
    yield Candidate("missing-tensor", what, np.broadcast_to(bias, case.target.shape), 0)


def in_half(case: Case) -> Iterator[Candidate]:
    """The product is computed in float16, which may or may not have gone beyond its largest value."""
    linear = Linear.of(case)
    if linear is None or not case.is_engine or case.dtype != "f32":
        return
    largest = float(np.abs(np.where(np.isfinite(case.expected), case.expected, 0.0)).max(initial=0.0))
    evidence = {"largest_magnitude": rounded(largest), "limit": LARGEST_F16}
    tail = f"; magnitudes reach {figure(largest)}, float16 ends at {LARGEST_F16:.0f}"
    clipped = np.clip(case.expected, -LARGEST_F16, LARGEST_F16)
    if largest > LARGEST_F16:
        what = "the output is cut at the largest float16" + tail
        yield Candidate("f16-overflow", what, clipped, 0, evidence)
    output = round_to(clipped.astype(np.float32), "f16").astype(np.float64)
    yield Candidate("f16-overflow", "the output is rounded to float16" + tail, output, 0, evidence)
    rows, tokens = _sample(case)
    x = linear.x[tokens]
    weight = case.weight(linear.name, rows)
    half_x, half_weight = round_to(x, "f16"), round_to(weight, "f16")
    for what, left, right in (
        ("the activation is rounded to float16", half_x, weight),
        ("activation and weights are rounded to float16", half_x, half_weight),
    ):
        found = linear.gives(linear.times(right, left), rows)
        yield Candidate("f16-overflow", what + tail, found, 0, evidence, None, tokens, rows)
        found = round_to(found.astype(np.float32), "f16").astype(np.float64)
        yield Candidate(
            "f16-overflow", f"{what}, and so is the output{tail}", found, 1, evidence, None, tokens, rows
        )
    if x.shape[1] > _MOST_COLUMNS:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.zeros((tokens.size, rows.size), np.float16)
        for column in range(x.shape[1]):
            total += half_x[:, column].astype(np.float16)[:, None] * half_weight[:, column].astype(np.float16)
    found = linear.gives(total.astype(np.float64), rows)
    expected = case.expected[np.ix_(tokens, rows)]
    simulated = float(np.nansum((found - expected) ** 2))
    error = float(np.sum(case.residual[np.ix_(tokens, rows)] ** 2))
    signal = float(np.nansum(expected**2))
    # Another order of the sum gives other roundings, of the same size.
    alike = 0.1 * simulated <= error <= 10 * simulated and error <= 1e-3 * signal
    yield Candidate(
        "f16-overflow",
        "the sum runs in float16" + tail,
        found,
        2,
        evidence,
        True if alike else None,
        tokens,
        rows,
    )


def capped(case: Case) -> Iterator[Candidate]:
    """The logits are capped, or not capped any more."""
    largest = float(np.abs(np.where(np.isfinite(case.expected), case.expected, 0.0)).max(initial=0.0))
    if case.op.tap != "lm_head" or largest == 0.0:
        return
    linear = Linear.of(case)
    if linear is not None and linear.cap:
        yield from _under_a_cap(case, linear, linear.cap)
        return
    rows, tokens = _sample(case)
    here = np.ix_(tokens, rows)
    target, expected = case.target[here], case.expected[here]
    for kind, text, low in (
        (caps.capped, "logits are capped at {}", 0.02 * largest),
        (caps.uncapped, "logits lack their cap of {}", 1.0001 * largest),
    ):

        def misfit(cap: float, kind: Callable[[F64, float], F64] = kind) -> float:
            return float(np.nansum((target - kind(expected, cap)) ** 2))

        fitted = caps.least_on_grid(misfit, low, 1e3 * largest)
        for cap, complexity in (*((cap, 0) for cap in caps.CAPS), (fitted, 1)):
            if cap > low:
                evidence = {"cap": rounded(cap), "largest": rounded(largest)}
                predicted = kind(case.expected, cap)
                yield Candidate("soft-cap", text.format(figure(cap)), predicted, complexity, evidence)


def _under_a_cap(case: Case, linear: Linear, own: float) -> Iterator[Candidate]:
    """Logits of a model that caps them: without the cap, under another one, or scaled before it."""
    rows, tokens = _sample(case)
    target = case.target[np.ix_(tokens, rows)]
    x = case.activation(linear.x[tokens], linear.name, "lm_head")
    bare = linear.times(case.weight(linear.name, rows), x)
    largest = float(np.abs(bare).max(initial=0.0))
    if not 0.0 < largest < np.inf:
        return

    def candidate(class_: str, what: str, predicted: F64, complexity: int, **evidence: float) -> Candidate:
        figures = {key: rounded(value) for key, value in {**evidence, "largest": largest}.items()}
        return Candidate(class_, what, predicted, complexity, figures, tokens=tokens, channels=rows)

    yield candidate("soft-cap", f"logits lack their cap of {figure(own)}", bare, 0, cap=own)

    def other_cap(cap: float) -> F64:
        return caps.capped(bare, cap)

    def scaled(factor: float) -> F64:
        return caps.capped(factor * bare, own)

    def fitted(make: Callable[[float], F64], low: float, high: float) -> float:
        return caps.least_on_grid(lambda value: float(np.nansum((target - make(value)) ** 2)), low, high)

    best = fitted(other_cap, 0.02 * largest, 1e3 * largest)
    for cap, complexity in (*((cap, 0) for cap in (*caps.CAPS, 2 * own, own / 2)), (best, 1)):
        if cap != own:
            what = f"logits are capped at {figure(cap)} instead of {figure(own)}"
            yield candidate("soft-cap", what, other_cap(cap), complexity, cap=cap)
    ratio = fitted(scaled, 0.01, 100.0)
    what = f"logits are multiplied by {figure(ratio)} before their cap"
    yield candidate("output-scale", what, scaled(ratio), 1, ratio=ratio)


HYPOTHESES = (
    row_permutation,
    fused_rows,
    bias,
    other_tensor,
    transposed,
    head_tie,
    missing,
    other_layer,
    capped,
    in_half,
)
