"""The tokens of one forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Several token sequences, one after the other; none sees another.

    Attributes:
        ids: ``int32[n_tokens]``, read-only.
        starts: index of the first token of each sequence, ascending from 0.
    """

    ids: NDArray[np.int32]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = np.array(self.ids, dtype=np.int32)
        ids.flags.writeable = False
        object.__setattr__(self, "ids", ids)
        bounds = (*self.starts, ids.size)
        if ids.ndim != 1 or not self.starts or self.starts[0] != 0:
            raise InputError("token batch: expected one row of token ids and sequences that start at 0")
        for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if end <= begin:
                raise InputError(f"token batch: sequence {index} is empty; expected at least one token")

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> TokenBatch:
        """Concatenate sequences of token ids.

        Raises:
            InputError: no sequence, an empty one, or an id that is not a 32-bit integer.
        """
        lengths = [len(sequence) for sequence in sequences]
        starts = tuple(sum(lengths[:index]) for index in range(len(lengths)))
        flat = [int(token) for sequence in sequences for token in sequence]
        for token in flat:
            if not 0 <= token < 2**31:
                raise InputError(f"token batch: id {token} is not a token; expected 0 to 2147483647")
        return cls(np.array(flat, dtype=np.int32), starts)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.ids.size)

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return len(self.starts)

    @property
    def boundaries(self) -> NDArray[np.int64]:
        """``int64[n_sequences + 1]``: first token of each sequence, then `n_tokens`."""
        return np.array([*self.starts, self.n_tokens], dtype=np.int64)

    @property
    def positions(self) -> NDArray[np.int64]:
        """``int64[n_tokens]``: position of each token in its own sequence."""
        begins = np.repeat(np.array(self.starts, dtype=np.int64), np.diff(self.boundaries))
        return np.arange(self.n_tokens, dtype=np.int64) - begins

    @property
    def totals(self) -> NDArray[np.int64]:
        """``int64[n_sequences]``: tokens of each sequence."""
        return np.diff(self.boundaries)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.totals.max())

    @property
    def slices(self) -> tuple[slice, ...]:
        """Rows of each sequence in an array of all tokens."""
        bounds = self.boundaries
        return tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(bounds))
