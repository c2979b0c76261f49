from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from driftscope.analysis.clean_engines import ORDERS, CleanEngine, Habits, float32_exp, sum_of_products
from driftscope.analysis.random_models import Shape, random_weights, write_random_model
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass

BATCH = TokenBatch.of([[1, 2, 3, 4, 5, 6, 7, 8, 9], [10], [11, 12]])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [1, 33, 256, 1000])
def test_orders_give_the_sum_to_float32(order: str, length: int) -> None:
    random = np.random.Generator(np.random.Philox(length))
    x = random.standard_normal((3, length), dtype=np.float32)
    w = random.standard_normal((5, length), dtype=np.float32)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    bound = length * 2.0**-23 * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64))
    found = sum_of_products(x, w, order)
    assert found.dtype == np.float32
    assert np.all(np.abs(found - exact) <= bound)


def test_orders_differ() -> None:
    random = np.random.Generator(np.random.Philox(1))
    x = random.standard_normal((4, 512), dtype=np.float32)
    w = random.standard_normal((4, 512), dtype=np.float32)
    found = {sum_of_products(x, w, order).tobytes() for order in ORDERS}
    assert len(found) == len(ORDERS)


def test_exponential_is_good_to_a_few_ulps() -> None:
    x = np.linspace(-86, 80, 20001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(float32_exp(x) / exact - 1)) < 4 * 2.0**-23
    assert float32_exp(np.array([-1e9, 0.0], np.float32)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    ("fmt", "arithmetic", "nmse"),
    [
        ("F32", Arithmetic.of("f32"), 1e-11),
        ("F32", Arithmetic.of("f32", kv_type="f16"), 1e-6),
        ("Q4_1", Arithmetic.of("int8-dot"), 1e-3),
        ("BF16", Arithmetic.of("f32", dtype="bf16"), 1e-2),
    ],
)
def test_a_clean_engine_computes_the_model(
    tmp_path: Path, architecture: str, fmt: str, arithmetic: Arithmetic, nmse: float
) -> None:
    """Every habit at once and none of them, against our own pass."""
    shape = Shape(architecture, 64, 96, 4, 2, 16, layers=2, window=4 if architecture == "mistral" else None)
    model = write_random_model(tmp_path / "model.bin", shape.config, random_weights(shape, 4), fmt)
    expected = ForwardPass({"model": model}, arithmetic.policy).run(BATCH).astype(np.float64)
    for habits in (Habits(), Habits("fused-lanes-8", False, True, True, True, True, True)):
        found = CleanEngine(model, arithmetic, habits).run(BATCH)
        assert np.sum((found - expected) ** 2) < nmse * np.sum(expected**2)
