"""An .apr file as an artifact: names, row orders and formats mapped to the canonical ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from driftscope.artifacts.apr.config import (
    HF_CONFIG,
    architecture_of,
    config_from_apr,
    rows_are_interleaved,
)
from driftscope.artifacts.apr.container import AprEntry, AprFile, Progress, read_apr
from driftscope.artifacts.apr.dtypes import APR_Q4, APR_Q8, apr_tensor
from driftscope.artifacts.apr.tokenizer import with_gguf_keys
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import GGUF_ARCHITECTURES, gguf_parts, hf_parts
from driftscope.artifacts.parts import assembled, parts_of
from driftscope.artifacts.rope_factors import with_stored_factors
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.transforms import rope_heads, value_offset
from driftscope.errors import InputError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# GGUF architectures of which some engine wants the rows of a head interleaved.
_INTERLEAVED = ("llama",)

# A file that says one of these holds a copy of the embedding as its head, or no head.
_TIED = ("tied_embeddings", "tie_word_embeddings")

# Bytes of head and embedding that are compared at a time.
_SLAB = 2**24


def open_apr(path: Path, *, verified: bool = False, progress: Progress | None = None) -> Artifact:
    """Open an .apr file.

    Args:
        path: the file.
        verified: its checksum has been verified since it was last written.
        progress: called with (bytes read, bytes in all) while the checksum is verified.

    Raises:
        InputError: what `read_apr` refuses, an unknown architecture, or a nonsensical or missing value.
    """
    file = read_apr(path, verified=verified, progress=progress)
    where = str(path)
    architecture = GGUF_ARCHITECTURES[architecture_of(file.metadata, where)]
    names = {entry.name: _canonical(entry, architecture) for entry in file.tensors}
    tied = _has_tied_copy(file, names)
    shapes = {found[0]: entry.shape for entry in file.tensors if len(found := names[entry.name]) == 1}
    if rows_are_interleaved(file.metadata, where) and architecture not in _INTERLEAVED:
        raise InputError(
            f"{where}: rope_type is 0 (NORM) for {architecture}, whose biases and norms of q and k it would "
            "reorder as well; expected 2 (NEOX)"
        )
    config = config_from_apr(file.metadata, shapes, where, tied=True if tied else None)
    tensors: list[TensorRef] = []
    unmapped: list[str] = []
    for entry in file.tensors:
        if tied and names[entry.name] == (_HEAD,):
            continue
        parts = _tensors(entry, names[entry.name], file, config)
        tensors += parts
        if not parts:
            unmapped.append(entry.name)
    if HF_CONFIG not in file.metadata:
        by_name = {tensor.name: tensor for tensor in tensors}
        config = with_stored_factors(config, by_name, file.metadata, where)
    return assembled(path, "apr", config, tensors, unmapped, (path,), with_gguf_keys(file.metadata))


def _canonical(entry: AprEntry, architecture: str) -> tuple[str, ...]:
    """Canonical names of what a tensor holds; some writers keep Hugging Face's names, some GGUF's."""
    return hf_parts(entry.name) or gguf_parts(entry.name, architecture)


def _tensors(entry: AprEntry, names: tuple[str, ...], file: AprFile, config: ModelConfig) -> list[TensorRef]:
    """The tensors of the model that a stored one holds."""
    label = f"{file.path}: {entry.name}"
    whole = TensorRef(
        name=entry.name,
        stored_name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        file=file.path,
        offset=entry.offset,
        nbytes=entry.nbytes,
    )
    if not names:
        return []
    if not entry.shape or not entry.nbytes:
        raise InputError(f"{label} has the shape {list(entry.shape)}; expected values in it")
    if len(names) > 1 and (entry.dtype == APR_Q8 or (entry.dtype == APR_Q4 and entry.shape[-1] % 32)):
        raise InputError(f"{label} holds {len(names)} tensors as {entry.dtype}, whose rows cannot be parted")
    found = []
    for part in parts_of(whole, names, config):
        heads, offset = _order(part, file.metadata, config)
        if heads and part.shape[0] % (2 * heads):
            raise InputError(
                f"{label} has {part.shape[0]} rows; expected an even number for each of {heads} heads"
            )
        found.append(apr_tensor(replace(part, rope_heads=heads, value_offset=offset)))
    return found


def _order(part: TensorRef, metadata: Mapping[str, Any], config: ModelConfig) -> tuple[int, float]:
    """Heads whose rows are interleaved, and what is added to each value.

    What ``rope_type`` says counts: it is how an engine turns the rows. Where it is missing, and for the
    values, a tensor with GGUF's name is as GGUF has it, and one with Hugging Face's as that has it.
    """
    architecture = GGUF_ARCHITECTURES[config.architecture]
    is_gguf = not hf_parts(part.stored_name)
    heads = rope_heads(part.name, architecture, config)
    interleaved = rows_are_interleaved(metadata, str(part.file))
    if not (is_gguf if interleaved is None else interleaved):
        heads = 0
    return heads, value_offset(part.name, architecture) if is_gguf else 0.0


def _has_tied_copy(file: AprFile, names: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the head is stored too although it is the embedding: as some engines want it.

    A head that is said to be tied and differs is a head of its own.
    """
    found = {names[entry.name]: entry for entry in file.tensors}
    embedding, head = found.get((_EMBEDDING,)), found.get((_HEAD,))
    own = file.metadata.get(HF_CONFIG)
    says_so = [file.metadata.get(key) for key in _TIED]
    if isinstance(own, Mapping):
        says_so.append(own.get("tie_word_embeddings"))
    if embedding is None or head is None or True not in says_so:
        return False
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        return False
    data = np.memmap(file.path, dtype=np.uint8, mode="r")
    return all(
        np.array_equal(
            data[embedding.offset + start : embedding.offset + min(start + _SLAB, embedding.nbytes)],
            data[head.offset + start : head.offset + min(start + _SLAB, embedding.nbytes)],
        )
        for start in range(0, embedding.nbytes, _SLAB)
    )
