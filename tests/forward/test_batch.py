from __future__ import annotations

import numpy as np
import pytest

from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch


def test_positions_restart_with_every_sequence() -> None:
    batch = TokenBatch.of([[5, 6, 7], [8], [9, 9]])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 9]
    assert batch.starts == (0, 3, 4)
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.boundaries.tolist() == [0, 3, 4, 6]
    assert batch.slices == (slice(0, 3), slice(3, 4), slice(4, 6))
    assert (batch.n_tokens, batch.n_sequences, batch.longest) == (6, 3, 3)


def test_the_ids_cannot_be_changed() -> None:
    source = np.array([1, 2], dtype=np.int32)
    batch = TokenBatch(source, (0,))
    source[0] = 9
    assert batch.ids.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        batch.ids[0] = 3


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "sequences that start at 0"),
        ([[]], "sequence 0 is empty"),
        ([[1], []], "sequence 1 is empty"),
        ([[1], [], [2]], "sequence 1 is empty"),
        ([[-1]], "id -1 is not a token"),
        ([[2**31]], "is not a token"),
    ],
)
def test_what_is_not_a_batch_is_refused(sequences: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenBatch.of(sequences)
