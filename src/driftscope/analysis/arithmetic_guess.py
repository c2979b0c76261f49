"""What arithmetic a trace was computed in, where nobody says: each hypothesis is tried on recorded inputs.

A hypothesis predicts the outputs of the matmuls of the first, the middle and the last layer from their
recorded inputs, for some rows of the weights and some tokens. Its residual is the mean, over the matmuls, of
the decimal logarithm of the NMSE; the winner's margin over the runner-up is therefore in decades. An op that
an engine computes wrongly is off under every hypothesis alike and moves no margin.

Where the margin is small the question is ``undecided``. Hypotheses that round alike and explain the trace to
the order of its sums count as one: they cannot be told apart, and need not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.engines.trace import Trace
from driftscope.errors import InputError
from driftscope.forward.architecture import SITE_INPUTS, SITE_OUTPUTS, site_tensor
from driftscope.forward.arithmetic import Arithmetic, round_to
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import DeclaredOps, Value
from driftscope.forward.ops import Ops
from driftscope.forward.policy import LAYER_SITES
from driftscope.kernels.activations import quantize_activation
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import format_of
from driftscope.kernels.matmul import matmul_f32, matmul_f32_quantized, matmul_quantized

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

DECIDED = 0.5
"""Decades between winner and runner-up from which on a question is decided."""

UNEXPLAINED = 1e-3
"""Typical NMSE above which not even the winner explains the trace: activation rounding costs 1e-4 at most."""

FLOOR = 1e-18
"""NMSE that stands for none: a thousandth of the square of a rounding of float32."""

TOKENS, ROWS = 24, 96
"""Tokens and rows of a weight that are looked at."""

ATTENTION_TOKENS = 128
"""Tokens over which scores and weighted sums are computed again, at least one prompt."""

_INTEGER = ("q8_0", "q8_1", "q8_K", "apr_q8k")
_ROUNDINGS = ("f16", "bf16", *_INTEGER)


@dataclass(frozen=True)
class Product:
    """A matmul of a trace, cut to some tokens and rows.

    Attributes:
        place: layer and site.
        x: recorded input, ``float32[n, k]``.
        raw: stored rows of the weight, ``uint8[r, row_bytes]``.
        dtype: their format.
        bias: ``float32[r]`` where the recorded output has it added, else None.
        y: recorded output, ``float32[n, r]``.
    """

    place: tuple[int, str]
    x: F32
    raw: NDArray[np.uint8]
    dtype: str
    bias: F32 | None
    y: F32


@dataclass(frozen=True)
class Answer:
    """One question about a trace.

    Attributes:
        status: ``decided``; ``undecided`` where the margin is small; ``unexplained`` where not even the
            winner fits; ``not-tested`` where the trace has not what it takes.
        winner: the best hypothesis, empty where nothing was tested.
        margin: decades over the runner-up, None where there is none.
        residuals: hypothesis to its typical NMSE.
    """

    status: str
    winner: str = ""
    margin: float | None = None
    residuals: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "residuals": dict(self.residuals)}


@dataclass(frozen=True)
class Guess:
    """What a trace looks computed in.

    Attributes:
        arithmetic: the winners put together; None where the products are not explained.
        products: activation format, path and dtype of the matmuls.
        accumulation: of their sums: ``f32``, ``wider``, ``f16``.
        dtype: of the recorded values, by which float type holds all of them.
        kv_type: rounding of keys and values: ``f32``, ``f16``.
        capture_points: tap to the point at which it was captured.
        statement: one sentence.
    """

    arithmetic: Arithmetic | None
    products: Answer
    accumulation: Answer
    dtype: str
    kv_type: Answer
    capture_points: Mapping[str, Answer]
    statement: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "arithmetic": None if self.arithmetic is None else self.arithmetic.to_dict(),
            "products": self.products.to_dict(),
            "accumulation": self.accumulation.to_dict(),
            "dtype": self.dtype,
            "kv_type": self.kv_type.to_dict(),
            "capture_points": {tap: answer.to_dict() for tap, answer in self.capture_points.items()},
            "statement": self.statement,
        }


def guess_arithmetic(
    trace: Trace,
    artifact: Artifact,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Guess:
    """Find the arithmetic and the capture points that explain a trace best.

    Args:
        trace: the trace; what it declares is not looked at.
        artifact: the weights that the engine ran.
        threads: the result does not depend on it.
        progress: called with the layers looked at and their number.

    Raises:
        InputError: the trace and the artifact are not of one shape.
    """
    from driftscope.analysis.capture_guess import guess_capture_points

    layers = probed_layers(artifact.config.num_layers)
    dtype = recorded_dtype(trace, layers)
    logs: dict[str, list[float]] = {}
    sums: dict[str, list[float]] = {}
    for index, layer in enumerate(layers):
        for product in products_of(trace, artifact, layer):
            for name, predicted in predictions(product, dtype):
                logs.setdefault(name, []).append(_log_nmse(predicted, product.y))
            for name, predicted in _sums(product, dtype, _best(logs)):
                sums.setdefault(name, []).append(_log_nmse(predicted, product.y))
        progress(index + 1, len(layers))
    products = _settled(answer_of(logs))
    kv_type = _kv_type(trace, artifact, layers, dtype, threads)
    arithmetic = None
    if products.status in ("decided", "undecided"):
        arithmetic = _arithmetic(products.winner, dtype, kv_type.winner or "f32")
    points = guess_capture_points(trace, artifact, arithmetic or Arithmetic.of(), layers, threads=threads)
    accumulation = _accumulation(sums, dtype)
    found = (products, accumulation, dtype, kv_type, points)
    return Guess(arithmetic, *found, _statement(products, accumulation, dtype, kv_type, points))


def probed_layers(n_layers: int) -> list[int]:
    """First, middle and last layer."""
    return sorted({0, n_layers // 2, n_layers - 1})


def recorded_dtype(trace: Trace, layers: Sequence[int]) -> str:
    """The float type that holds all recorded outputs of the matmuls: ``bf16``, ``f16``, else ``f32``."""
    arrays = [
        trace.tap(layer, tap)
        for layer in layers
        for tap in ("qkv_bias", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "post_ffn_residual")
        if trace.has(layer, tap)
    ]
    # bf16 first: its values are all values of f16, but for the exponent's range.
    for dtype in ("bf16", "f16"):
        if arrays and all(np.array_equal(round_to(array, dtype), array, equal_nan=True) for array in arrays):
            return dtype
    return "f32"


def products_of(trace: Trace, artifact: Artifact, layer: int) -> Iterator[Product]:
    """The matmuls of a layer whose input and output the trace has.

    Where a model with biases has no ``qkv_matmul``, the output is taken behind the bias.
    """
    config = artifact.config
    widths = {"q": config.num_heads * config.head_dim}
    widths["k"] = widths["v"] = config.num_kv_heads * config.head_dim
    begins = {"q": 0, "k": widths["q"], "v": widths["q"] + widths["k"]}
    for site in LAYER_SITES:
        source, tap = SITE_INPUTS[site], SITE_OUTPUTS[site]
        biased = tap == "qkv_matmul" and not trace.has(layer, tap)
        output = "qkv_bias" if biased else tap
        name = site_tensor(config, layer, site)
        ref = artifact.tensors.get(name)
        if ref is None or not (trace.has(layer, source) and trace.has(layer, output)):
            continue
        x, y = trace.tap(layer, source), trace.tap(layer, output)
        if site in widths:
            y = y[:, begins[site] : begins[site] + widths[site]]
        if (y.shape[1], x.shape[1]) != ref.shape:
            raise InputError(
                f"{trace.folder}: {output} and {source} of layer {layer} have {y.shape[1]} and {x.shape[1]} "
                f"channels; {artifact.path} has {name} of {ref.shape[0]}x{ref.shape[1]}"
            )
        rows, tokens = _spread(y.shape[1], ROWS), _spread(y.shape[0], TOKENS)
        order = ref.row_order()
        raw = np.ascontiguousarray(ref.raw()[rows if order is None else order[rows]])
        bias = _bias(artifact, name, rows) if biased and config.attention_bias else None
        cut = np.ascontiguousarray(x[tokens])
        yield Product((layer, site), cut, raw, ref.dtype, bias, y[np.ix_(tokens, rows)])


def predictions(product: Product, dtype: str) -> Iterator[tuple[str, F32]]:
    """What each hypothesis says of a product: its name and ``float32[n, r]``.

    A hypothesis that is impossible at this product (an activation of the wrong length, an integer product
    with float weights) predicts nothing there. For a trace whose values are all of a half-precision `dtype`
    only that dtype is tried.
    """
    x, raw, weights = product.x, product.raw, product.dtype
    if dtype != "f32":
        rounded = round_to(dequantize(raw, weights), dtype)
        yield dtype, _out(product, round_to(matmul_f32(round_to(x, dtype), rounded), dtype), dtype)
        yield "f32", _out(product, round_to(matmul_f32_quantized(x, raw, weights), dtype), dtype)
        return
    yield "f32", _out(product, matmul_f32_quantized(x, raw, weights))
    for activation in _ROUNDINGS:
        try:
            values = quantize_activation(x, activation).dequantize()
        except InputError:
            continue
        yield f"f32, {activation}", _out(product, matmul_f32_quantized(values, raw, weights))
    layout = format_of(weights)
    if layout.native:
        yield "int8-dot", _out(product, matmul_quantized(x, raw, weights))
        if layout.is_integer and layout.activation != "apr_q8k":
            for activation in _INTEGER:
                try:
                    found = matmul_quantized(x, raw, weights, activation=activation)
                except InputError:
                    continue
                yield f"int8-dot, {activation}", _out(product, found)


def answer_of(logs: Mapping[str, Sequence[float]]) -> Answer:
    """Rank hypotheses by their mean log residual; those that were not possible at all ops are left out."""
    if not logs:
        return Answer("not-tested")
    most = max(len(values) for values in logs.values())
    means = {name: float(np.mean(values)) for name, values in logs.items() if len(values) == most}
    ranked = sorted(means, key=lambda name: means[name])
    winner = ranked[0]
    margin = means[ranked[1]] - means[winner] if len(ranked) > 1 else None
    residuals = {name: 10.0 ** means[name] for name in ranked}
    if residuals[winner] > UNEXPLAINED:
        status = "unexplained"
    else:
        status = "decided" if margin is None or margin >= DECIDED else "undecided"
    return Answer(status, winner, margin, residuals)


def _best(logs: Mapping[str, Sequence[float]]) -> str:
    return answer_of(logs).winner or "f32"


def _settled(answer: Answer) -> Answer:
    """Take hypotheses as one that explain the trace alike, to the order of its sums, and name the simplest.

    They round alike: q8_0 and q8_1 are one where the weight's format does not use the sum, and integers are
    multiplied as in float32. The margin is that over the first hypothesis that rounds otherwise.
    """
    residuals = answer.residuals
    if not residuals or residuals[answer.winner] > _SAME_ROUNDING:
        return answer
    alike = [name for name in residuals if residuals[name] <= residuals[answer.winner] * 10.0**DECIDED]
    others = [value for value in residuals.values() if value > _SAME_ROUNDING]
    winner = min(alike, key=lambda name: _PREFERENCE.index(name))
    margin = math.log10(min(others) / residuals[answer.winner]) if others else None
    return Answer("decided", winner, margin, residuals)


_SAME_ROUNDING = 1e-11
"""NMSE up to which nothing but the order of float32 sums is left to explain."""

_PREFERENCE = (
    "f32",
    "bf16",
    "f16",
    "int8-dot",
    *(f"{path}, {name}" for path in ("int8-dot", "f32") for name in _ROUNDINGS),
)
"""Of hypotheses that cannot be told apart, the first is named: engines that round to integers do so to
multiply integers, of the format that ggml pairs with the weight's."""


def _arithmetic(winner: str, dtype: str, kv_type: str) -> Arithmetic:
    path, _, activation = winner.partition(", ")
    if dtype != "f32":
        return Arithmetic.of("f32", dtype=dtype if path == dtype else "f32")
    return Arithmetic.of(path, activation=activation or None, kv_type=kv_type)


def _sums(product: Product, dtype: str, winner: str) -> Iterator[tuple[str, F32]]:
    """The product with the winner's rounding of the activation, summed in three ways."""
    x, weights = product.x, dequantize(product.raw, product.dtype)
    path, _, activation = winner.partition(", ")
    if path == "int8-dot" and not activation:
        activation = format_of(product.dtype).activation
    if dtype != "f32" and path == dtype:
        x, weights = round_to(x, dtype), round_to(weights, dtype)
    elif activation not in ("", "none"):
        try:
            x = quantize_activation(x, activation).dequantize()
        except InputError:
            return
    if path == "int8-dot" and activation in _INTEGER:
        # Exact within a block, and float32 over the blocks: there is no other way that is in use.
        single = matmul_quantized(product.x, product.raw, product.dtype, activation=activation)
    else:
        single = matmul_f32(x, weights)
        wide = weights.astype(np.float64)
        exact = np.stack([(wide * row.astype(np.float64)).sum(axis=1) for row in x]).astype(np.float32)
        yield "wider", _out(product, round_to(exact, dtype), dtype)
    yield "f32", _out(product, round_to(single, dtype), dtype)
    yield "f16", _out(product, round_to(_in_f16(x, weights), dtype), dtype)


def _in_f16(x: F32, weights: F32) -> F32:
    """Products summed one after another, every partial sum rounded to float16."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.zeros((x.shape[0], weights.shape[0]), dtype=np.float16)
        for k in range(x.shape[1]):
            product = (x[:, k, None] * weights[None, :, k]).astype(np.float32)
            total = (total.astype(np.float32) + product).astype(np.float16)
    return total.astype(np.float32)


def _accumulation(sums: Mapping[str, Sequence[float]], dtype: str) -> Answer:
    """Of the sums.

    A sum of float32 in an order that is not ours is about as near to ours as to the exact one. What tells it
    is that it is off the exact one by more than the rounding of its result.
    """
    answer = answer_of(sums)
    if answer.status != "undecided" or {"f32", "wider"} - set(answer.residuals):
        return answer
    if dtype == "f32" and answer.residuals["wider"] > _ROUNDED_ONCE:
        margin = math.log10(answer.residuals["wider"] / _ROUNDED_ONCE)
        status = "decided" if margin >= DECIDED else "undecided"
        return Answer(status, "f32", margin, answer.residuals)
    return answer


_ROUNDED_ONCE = 2.0**-48 / 3
"""Mean square of one rounding to float32, relative: at most a third of the square of half a step."""


def _kv_type(trace: Trace, artifact: Artifact, layers: Sequence[int], dtype: str, threads: int) -> Answer:
    """Whether keys, values and what meets them are rounded to float16."""
    if dtype != "f32":
        return Answer("not-tested")
    wanted, batch = some_prompts(trace)
    logs: dict[str, list[float]] = {}
    for kv_type in ("f32", "f16"):
        policy = Arithmetic.of("f32", kv_type=kv_type).policy
        ops = DeclaredOps(Ops(dict.fromkeys(policy.artifacts, artifact), policy, threads=threads))
        for layer in layers:
            inputs = recorded_inputs(trace, layer, wanted)
            for tap, needed in _ATTENTION:
                if all(name in inputs for name in (*needed, tap)):
                    given = {name: inputs[name] for name in needed}
                    found = ops.evaluate(layer, tap, given, batch)
                    logs.setdefault(kv_type, []).append(_log_nmse(flat(found), flat(inputs[tap])))
                    if tap == "attention":
                        break
    return answer_of(logs)


_ATTENTION = (
    ("attn_scores", ("q_post_rope", "k_post_rope")),
    ("attention", ("attn_softmax", "qkv_bias")),
    ("attention", ("q_post_rope", "k_post_rope", "qkv_bias")),
)
"""Taps that keys and values enter, and what they are computed from."""


def some_prompts(trace: Trace) -> tuple[list[int], TokenBatch]:
    """The shortest prompts, `ATTENTION_TOKENS` in all, at least one of two tokens if there is one."""
    lengths = [len(ids) for _, ids in trace.manifest.prompts]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i] < 2, lengths[i], i))
    wanted, total = [order[0]], lengths[order[0]]
    for index in order[1:]:
        if total + lengths[index] <= ATTENTION_TOKENS:
            wanted.append(index)
            total += lengths[index]
    wanted.sort()
    return wanted, TokenBatch.of([trace.manifest.prompts[i][1] for i in wanted])


def recorded_inputs(trace: Trace, layer: int, wanted: Sequence[int]) -> dict[str, Value]:
    """All taps of a layer that the trace has, and the ``layer_input``, of some prompts.

    Scores of keys to come are left at zero: engines fill them differently.
    """
    from driftscope.engines.trace import RAGGED
    from driftscope.forward.architecture import LAYER_TAPS
    from driftscope.forward.policy import WHOLE_MODEL

    rows = np.concatenate([np.arange(trace.batch.n_tokens)[trace.batch.slices[i]] for i in wanted])
    before = (layer - 1, "post_ffn_residual") if layer else (WHOLE_MODEL, "embedding")
    places = {**{tap: (layer, tap) for tap in LAYER_TAPS}, "layer_input": before}
    found: dict[str, Value] = {}
    for name, place in places.items():
        if not trace.has(*place):
            continue
        if name in RAGGED:
            found[name] = [seen(array) for i, array in enumerate(trace.ragged(*place)) if i in wanted]
        else:
            found[name] = np.ascontiguousarray(trace.tap(*place)[rows])
    return found


def seen(scores: F32) -> F32:
    """Scores or weights of one sequence without those of keys to come."""
    length = scores.shape[0]
    mask = np.tile(np.tri(length, dtype=bool), (1, scores.shape[1] // length))
    return np.where(mask, scores, np.float32(0))


def flat(value: Value) -> F64:
    """All values of a tap that a causal query sees, in one row."""
    if isinstance(value, list):
        return np.concatenate([seen(part).reshape(-1) for part in value]).astype(np.float64)
    return value.astype(np.float64).reshape(-1)


def log_nmse(predicted: F64, recorded: F64) -> float:
    """Decimal logarithm of the NMSE over the values that are finite on both sides, `FLOOR` at least."""
    finite = np.isfinite(predicted) & np.isfinite(recorded)
    a, b = recorded[finite], predicted[finite]
    energy = float(np.square(a).sum())
    off = float(np.square(a - b).sum())
    if not energy:
        return 0.0 if off else math.log10(FLOOR)
    return math.log10(max(off / energy, FLOOR))


def _log_nmse(predicted: NDArray[Any], recorded: NDArray[Any]) -> float:
    return log_nmse(np.asarray(predicted, np.float64), np.asarray(recorded, np.float64))


def _out(product: Product, y: F32, dtype: str = "f32") -> F32:
    """A product as recorded: with its bias where that is in."""
    return y if product.bias is None else round_to(y + round_to(product.bias, dtype), dtype)


def _bias(artifact: Artifact, name: str, rows: NDArray[np.int64]) -> F32:
    from driftscope.forward.weights import Weights

    bias = name.removesuffix("weight") + "bias"
    return Weights(artifact).vector(bias, artifact.tensors[name].shape[0])[rows]


def _spread(n: int, most: int) -> NDArray[np.int64]:
    """At most so many indices, spread evenly over n."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def _statement(
    products: Answer, accumulation: Answer, dtype: str, kv_type: Answer, points: Mapping[str, Answer]
) -> str:
    if products.status == "not-tested":
        return "no matmul has its input and its output in the trace: nothing was tested"
    if products.status == "unexplained":
        best = products.residuals[products.winner]
        return (
            f"no arithmetic explains the matmuls: the best, {products.winner}, leaves an NMSE of {best:.2g}"
        )
    said = {"decided": "", "undecided": " (undecided)"}
    margin = "" if products.margin is None else f", {products.margin:.1f} decades before the next"
    parts = [f"{products.winner}{said[products.status]}{margin}"]
    if accumulation.status == "decided" and accumulation.winner != "f32":
        parts.append(f"sums in {accumulation.winner}")
    if kv_type.status in said:
        parts.append(f"keys and values {kv_type.winner}{said[kv_type.status]}")
    if dtype != "f32" and dtype != products.winner:
        parts.append(f"outputs {dtype}")
    elsewhere = [f"{tap} {answer.winner}" for tap, answer in points.items() if _is_elsewhere(answer)]
    if elsewhere:
        parts.append("captured elsewhere: " + "; ".join(elsewhere))
    return "; ".join(parts)


def _is_elsewhere(answer: Answer) -> bool:
    return answer.status == "decided" and answer.winner != "standard"
