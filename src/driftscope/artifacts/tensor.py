"""One tensor of a model on disk: where its bytes are and how its rows are ordered."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError


@dataclass(frozen=True)
class TensorRef:
    """A tensor as it is stored, under its canonical (Hugging Face) name.

    Attributes:
        name: canonical name, e.g. ``model.layers.3.mlp.down_proj.weight``.
        stored_name: the name in the file, e.g. ``blk.3.ffn_down.weight``.
        shape: logical shape in numpy order; the last axis is contiguous on disk.
        dtype: format name as in `driftscope.kernels.formats` (``F32``, ``BF16``, ``Q4_K``, ...).
        file: the file that holds the bytes.
        offset: absolute byte offset in `file`; checked by the reader to lie inside it.
        nbytes: bytes of the tensor; checked by the reader against shape and dtype.
        rope_heads: number of heads when the stored rows are in the interleaved order that GGUF uses
            for the q and k projections of llama-like models, else 0. Canonical row ``i`` is stored
            row ``row_order()[i]``.
        value_offset: what the container adds to each value; a stored value is the canonical one plus it. GGUF
            stores the norm weights of gemma plus one.
        stored_rows: first and end row in the stored tensor where this is a part of a fused one (q, k and v,
            or gate and up, in one matrix), else None; `offset` and `nbytes` are those of the part.
    """

    name: str
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int
    rope_heads: int = 0
    value_offset: float = 0.0
    stored_rows: tuple[int, int] | None = None

    @property
    def stored_dtype(self) -> str:
        """What the file holds: `dtype`, but for a tensor whose `raw` gives it in another format."""
        return self.dtype

    @property
    def n_elements(self) -> int:
        """Number of values."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def n_rows(self) -> int:
        """Number of rows: the product of all axes but the last."""
        return self.n_elements // self.shape[-1] if self.n_elements else 0

    def raw(self) -> NDArray[np.uint8]:
        """The stored bytes as ``uint8[n_rows, bytes_per_row]``, memory-mapped read-only, in stored row order.

        Raises:
            InputError: the file is gone or has become shorter since it was opened.
        """
        return self.stored_bytes().reshape(self.n_rows, -1)

    def stored_bytes(self) -> NDArray[np.uint8]:
        """The bytes in the file as ``uint8[nbytes]``, memory-mapped read-only; errors as those of `raw`."""
        try:
            return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.nbytes,))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.file}: {self.name} cannot be read ({error}); did the file change?"
            ) from error

    def row_order(self) -> NDArray[np.int64] | None:
        """Stored row of each canonical row as ``int64[n_rows]``, or None where they are the same.

        GGUF stores row ``2 j + s`` of a head where Hugging Face has row ``s * head_dim / 2 + j``
        (llama.cpp, ``conversion``: ``LlamaModel.permute``).
        """
        if not self.rope_heads:
            return None
        stored = np.arange(self.n_rows, dtype=np.int64)
        head_dim = self.n_rows // self.rope_heads
        return stored.reshape(self.rope_heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def described(ref: TensorRef) -> dict[str, Any]:
    """What a tensor is, by the names of `TensorRef`'s fields: for tensors that are read in another way."""
    return {item.name: getattr(ref, item.name) for item in fields(TensorRef)}
