"""From stored tensors to an artifact: fused ones taken apart, layers beyond the last left out, the order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from driftscope.artifacts.complete import layer_shapes
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import canonical_order, layer_of, suffix_of
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError


def assembled(
    path: Path,
    container: str,
    config: ModelConfig,
    tensors: list[TensorRef],
    unmapped: list[str],
    files: tuple[Path, ...],
    metadata: Mapping[str, Any],
) -> Artifact:
    """The artifact of a container's tensors, in canonical order.

    Raises:
        InputError: two stored tensors hold the same one.
    """
    ordered = sorted(tensors, key=lambda tensor: canonical_order(tensor.name))
    for before, after in pairwise(ordered):
        if before.name == after.name:
            raise InputError(f"{path}: both {before.stored_name} and {after.stored_name} hold {after.name}")
    return Artifact(
        path=path,
        container=container,
        config=config,
        tensors={tensor.name: tensor for tensor in ordered},
        unmapped=tuple(sorted(set(unmapped))),
        files=tuple(sorted(files)),
        metadata=metadata,
    )


def is_known(name: str, config: ModelConfig) -> bool:
    """Whether a name belongs to a layer that the model has, or to none."""
    layer = layer_of(name)
    return layer is None or layer < config.num_layers


def parts_of(whole: TensorRef, names: tuple[str, ...], config: ModelConfig) -> list[TensorRef]:
    """The tensors of one model that a stored one holds; none where the model has no such layer or tensor.

    Args:
        whole: the stored tensor, whose rows are whole blocks of its dtype.
        names: canonical names of its parts, in the order of its rows.
        config: the model's.

    Raises:
        InputError: a fused tensor cannot be cut into its parts.
    """
    if not names or not all(is_known(name, config) for name in names):
        return []
    if len(names) == 1:
        return [replace(whole, name=names[0])]
    shapes = [layer_shapes(config).get(suffix_of(name)) for name in names]
    expected = [shape for shape in shapes if shape is not None]
    if len(expected) != len(names):
        return []
    counts = [shape[0] for shape in expected]
    if whole.shape[0] != sum(counts):
        raise InputError(
            f"{whole.file}: {whole.stored_name} has {whole.shape[0]} rows; expected {sum(counts)} "
            f"({' + '.join(map(str, counts))})"
        )
    if len(whole.shape) != len(expected[0]) or whole.nbytes % whole.shape[0]:
        raise InputError(
            f"{whole.file}: {whole.stored_name} is {whole.dtype} {'x'.join(map(str, whole.shape))}, which "
            f"cannot be cut into {' + '.join(map(str, counts))}"
        )
    # Rows of a matrix, values of a bias; either way whole blocks, which a format never splits.
    nbytes = whole.nbytes // whole.shape[0]
    parts = []
    first = 0
    for name, rows in zip(names, counts, strict=True):
        parts.append(
            replace(
                whole,
                name=name,
                shape=(rows, *whole.shape[1:]),
                offset=whole.offset + first * nbytes,
                nbytes=rows * nbytes,
                stored_rows=(first, first + rows),
            )
        )
        first += rows
    return parts
