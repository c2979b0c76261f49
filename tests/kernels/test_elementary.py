"""exp, expm1, tanh, cosine and sine against mpmath, in units in the last place of float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.generic_cpu import on_generic_cpu

from driftscope.kernels import elementary, forward
from driftscope.kernels.jit import kernel


@kernel("void(R(float64, 1), float64[:, ::1])")
def _all(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        out[0, i] = elementary.exp(x[i])
        out[1, i] = elementary.expm1(x[i])
        out[2, i] = elementary.tanh(x[i])
        out[3, i], out[4, i] = elementary.cosine_and_sine(x[i])


NAMES = ("exp", "expm1", "tanh", "cos", "sin")


def all_of(*values: float) -> dict[str, np.ndarray]:
    out = np.empty((5, len(values)))
    _all(np.array(values), out)
    return dict(zip(NAMES, out, strict=True))


def ulps(found: float, exact: Any) -> float:
    return float(abs(mpmath.mpf(found) - exact) / math.ulp(float(exact)))


@given(st.floats(-700, 709) | st.floats(-1, 1) | st.floats(-1e-4, 1e-4))
@settings(deadline=None, max_examples=500)
def test_exp_expm1_and_tanh_err_by_little(x: float) -> None:
    found = all_of(x)
    with mpmath.workprec(200):
        assert ulps(found["exp"][0], mpmath.exp(x)) < 1.0
        # Denormal results do not keep a relative precision.
        if abs(x) > 1e-300:
            assert ulps(found["expm1"][0], mpmath.expm1(x)) < 2.5
            assert ulps(found["tanh"][0], mpmath.tanh(x)) < 4.0


@given(st.floats(-(2.0**20), 2.0**20, width=32) | st.floats(-10, 10, width=32))
@settings(deadline=None, max_examples=500)
def test_cosine_and_sine_err_by_little(x: float) -> None:
    found = all_of(x)
    with mpmath.workprec(200):
        assert ulps(found["cos"][0], mpmath.cos(x)) < 3.0
        if abs(x) > 1e-30:
            assert ulps(found["sin"][0], mpmath.sin(x)) < 3.0


@pytest.mark.parametrize("name", ["exp", "expm1", "tanh"])
def test_extremes(name: str) -> None:
    infinity, largest = math.inf, 1e300
    found = all_of(math.nan, infinity, largest, -infinity, -largest, 0.0)[name]
    expected: dict[str, Callable[[float], float]] = {"exp": np.exp, "expm1": np.expm1, "tanh": np.tanh}
    with np.errstate(all="ignore"):
        wanted = expected[name](np.array([math.nan, infinity, largest, -infinity, -largest, 0.0]))
    # Below -708 exp stays at the smallest normal numbers, which no float32 tells from 0.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-307)


def test_signs_of_zero_are_kept() -> None:
    found = all_of(-0.0)
    assert math.copysign(1, found["tanh"][0]) == -1
    assert found["cos"][0] == 1


def test_vectors_and_single_values_are_the_same_bits() -> None:
    """A long run fills vectors, a run of one does not."""
    x = np.random.Generator(np.random.Philox(0)).uniform(-700, 700, 301)
    together = all_of(*x)
    for i in range(0, 301, 7):
        alone = all_of(x[i])
        for name in NAMES:
            assert together[name][i] == alone[name][0], name


@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_a_plain_processor_gives_the_same_bits(function: str) -> None:
    x = np.random.Generator(np.random.Philox(1)).standard_normal(4099).astype(np.float32) * np.float32(20)
    ours = getattr(forward, function)(x)
    theirs = on_generic_cpu(f"driftscope.kernels.forward:{function}", {"x": (x,)})
    assert np.array_equal(ours, theirs["x"])


def test_rotary_tables_of_a_plain_processor_have_the_same_bits() -> None:
    frequencies = np.float32(10000) ** (-np.arange(64, dtype=np.float32) / 64)
    theirs = on_generic_cpu("driftscope.kernels.forward:rope_tables", {"f": (frequencies, 700)})
    assert np.array_equal(forward.rope_tables(frequencies, 700), theirs["f"])
