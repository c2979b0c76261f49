"""Taking constants off norms and putting them on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftscope.artifacts.derive.rows import shifted
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError

HF = TensorRef("model.norm.weight", "model.norm.weight", (4,), "F32", Path("none"), 0, 16)
GGUF = replace(HF, stored_name="output_norm.weight", value_offset=1.0)
ONE = np.float32(1)


def shift(values: np.ndarray, ref: TensorRef, offset: float) -> np.ndarray:
    (result,) = shifted(iter([values]), ref, offset)
    return result


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_the_sum_that_a_norm_multiplies_by_survives_every_copy(weights: list[float]) -> None:
    w = np.array(weights, dtype=np.float32)
    stored = shift(w, HF, 1.0)
    np.testing.assert_array_equal(stored, w + ONE)
    back = shift(stored, GGUF, 0.0)
    np.testing.assert_array_equal(back + ONE, stored)
    np.testing.assert_array_equal(shift(back, HF, 1.0), stored)
    # A second round changes nothing more.
    np.testing.assert_array_equal(shift(shift(back, HF, 1.0), GGUF, 0.0), back)


def test_nothing_changes_between_files_that_store_alike() -> None:
    values = np.array([0.1, -3.0, 1e-30, np.nan], dtype=np.float32)
    assert shift(values, HF, 0.0) is values
    assert shift(values, GGUF, 1.0) is values


@pytest.mark.parametrize("value", [1e-10, 0.25 + 2**-25, -1e-30])
def test_a_sum_that_no_weight_gives_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"output_norm\.weight holds values that are no f32 plus 1, so that"):
        shift(np.array([1.5, value], dtype=np.float32), GGUF, 0.0)
