"""What can be wrong with the MLP's gate: the activation function, its partner, channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from driftscope.analysis.explanations.base import F64, Candidate, Case

_SHIFTS = (1, -1, 2, -2, 8, -8, 16, -16, 32, -32)


def _sigmoid(x: F64) -> F64:
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _erf_gelu(x: F64) -> F64:
    from scipy.special import ndtr

    return np.asarray(x * ndtr(x))


FUNCTIONS: dict[str, Callable[[F64], F64]] = {
    "SiLU": lambda x: x * _sigmoid(x),
    "GELU with tanh": lambda x: x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "GELU with erf": _erf_gelu,
    "quick GELU": lambda x: x * _sigmoid(1.702 * x),
    "ReLU": lambda x: np.maximum(x, 0.0),
    "squared ReLU": lambda x: np.maximum(x, 0.0) ** 2,
    "the sigmoid": _sigmoid,
    "tanh": np.tanh,
    "no function": lambda x: x,
}
"""Activation functions by name, in float64."""

NAMES = {"silu": "SiLU", "gelu_tanh": "GELU with tanh"}
"""Function of a configuration to its name in `FUNCTIONS`."""


def _own(case: Case) -> str:
    """Name of the model's function."""
    return NAMES[case.config.activation]


def function(case: Case) -> Iterator[Candidate]:
    """Another activation function than the model's."""
    gate = case.value("ffn_gate").astype(np.float64) if case.has("ffn_gate") else None
    if gate is None:
        return
    if case.op.tap == "ffn_silu":
        factor: F64 | float = 1.0
    elif "ffn_silu" in case.op.recomputed and case.has("ffn_up"):
        factor = case.value("ffn_up").astype(np.float64)
    else:
        return
    for name, activation in FUNCTIONS.items():
        if name != _own(case):
            yield Candidate(
                "activation-function",
                f"the activation is {name} instead of {_own(case)}",
                activation(gate) * factor,
                0,
                {"function": name},
            )


def swapped(case: Case) -> Iterator[Candidate]:
    """Up is activated and gate is not."""
    if not (case.has("ffn_gate") and case.has("ffn_up")):
        return
    gate, up = (case.value(tap).astype(np.float64) for tap in ("ffn_gate", "ffn_up"))
    predicted = FUNCTIONS[_own(case)](up) * (1.0 if case.op.tap == "ffn_silu" else gate)
    yield Candidate("gate-up-swapped", "up goes through the activation instead of gate", predicted, 0, {})


def product(case: Case) -> Iterator[Candidate]:
    """The product takes a neighbouring channel of one factor, or lacks a factor."""
    if case.op.tap != "ffn_swiglu" or not (case.has("ffn_silu") or case.has("ffn_gate")):
        return
    if not case.has("ffn_up"):
        return
    if case.has("ffn_silu"):
        activated = case.value("ffn_silu").astype(np.float64)
    else:
        activated = FUNCTIONS[_own(case)](case.value("ffn_gate").astype(np.float64))
    up = case.value("ffn_up").astype(np.float64)
    for shift in _SHIFTS:
        if abs(shift) >= up.shape[1]:
            continue
        for what, a, b in (
            ("up", activated, np.roll(up, shift, axis=1)),
            ("the activated gate", np.roll(activated, shift, axis=1), up),
        ):
            # What runs over the edge may be cut off instead.
            cut = a * b
            edge = slice(None, shift) if shift > 0 else slice(shift, None)
            cut[:, edge] = 0.0
            for ending, value in (("", a * b), (", with zeros at the edge", cut)):
                yield Candidate(
                    "swiglu-shift",
                    f"the product takes {what} from {abs(shift)} channels "
                    f"{'before' if shift > 0 else 'after'}{ending}",
                    value,
                    0,
                    {"shift": -shift, "factor": what},
                )
        both = np.roll(activated * up, shift, axis=1)
        yield Candidate(
            "swiglu-shift", f"the product is shifted by {shift} channels", both, 0, {"shift": shift}
        )
    yield Candidate("cross-match", "the product lacks up", activated, 0, {"missing": "ffn_up"})
    yield Candidate("cross-match", "the product lacks the gate", up, 0, {"missing": "ffn_silu"})


HYPOTHESES = (function, swapped, product)
