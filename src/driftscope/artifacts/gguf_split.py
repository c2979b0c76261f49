"""GGUF models in several files, as llama.cpp's ``gguf-split`` writes them.

Each part is a GGUF file of its own. The first has the metadata; every part has ``split.no``, its number from
zero, ``split.count`` and ``split.tensors.count``, which is that of all parts together. The name says both
numbers again, the first from one: ``model-00002-of-00003.gguf``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from driftscope.artifacts.files import member
from driftscope.artifacts.gguf import GgufFile, read_gguf
from driftscope.errors import InputError

_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"

# Five digits in a name.
_MAX_PARTS = 99_999


def read_gguf_model(path: Path) -> GgufFile:
    """Read the headers of a GGUF file and, where it is one part of a model, of all the others.

    Args:
        path: the file, or any of the parts.

    Returns:
        The file; of parts, one that has the first one's metadata without the keys of the split, and the
        tensors of all.

    Raises:
        InputError: an unusable file; a part that is missing, has another number than its name says, or
            does not fit the others.
    """
    opened = read_gguf(path)
    count = _number(opened, _COUNT, 1)
    if count in (0, 1):
        return opened
    number = _number(opened, _NO, None)
    if count > _MAX_PARTS or number >= count:
        raise InputError(f"{path}: says that it is part {number + 1} of {count}")
    ending = part_ending(number, count)
    if not path.name.endswith(ending):
        raise InputError(f"{path}: is part {number + 1} of {count}; expected a name that ends in {ending}")
    stem = path.name.removesuffix(ending)
    parts = []
    for index in range(count):
        if index == number:
            parts.append(opened)
            continue
        neighbour = member(path.parent, stem + part_ending(index, count), beside=path)
        parts.append(_part(neighbour, index, count))
    return _joined(parts)


def part_ending(number: int, count: int) -> str:
    """What the name of part `number`, from zero, ends in."""
    return f"-{number + 1:05d}-of-{count:05d}.gguf"


def _part(path: Path, index: int, count: int) -> GgufFile:
    try:
        part = read_gguf(path)
    except InputError as error:
        raise InputError(f"part {index + 1} of {count} cannot be used: {error}") from error
    found, of = _number(part, _NO, None), _number(part, _COUNT, None)
    if (found, of) != (index, count):
        raise InputError(
            f"{path}: says that it is part {found + 1} of {of}; expected part {index + 1} of {count}"
        )
    return part


def _joined(parts: list[GgufFile]) -> GgufFile:
    """One model of all parts."""
    first = parts[0]
    total = _number(first, _TENSORS, None)
    for part in parts[1:]:
        if _number(part, _TENSORS, total) != total:
            raise InputError(
                f"{part.path}: {_TENSORS} is {part.metadata[_TENSORS]}; {first.path.name} says {total}"
            )
        for key, value in part.metadata.items():
            if key not in (_NO, _COUNT, _TENSORS, "general.alignment") and first.metadata.get(key) != value:
                raise InputError(f"{part.path}: {key[:120]} is not what {first.path.name} says")
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    seen: dict[str, Path] = {}
    for tensor in tensors:
        if tensor.name in seen:
            raise InputError(
                f"{tensor.file}: the tensor {tensor.name[:120]!r} is in {seen[tensor.name].name} as well"
            )
        seen[tensor.name] = tensor.file
    if len(tensors) != total:
        raise InputError(
            f"{first.path}: {_TENSORS} is {total}, but the {len(parts)} parts hold {len(tensors)}"
        )
    metadata = {key: value for key, value in first.metadata.items() if key not in (_NO, _COUNT, _TENSORS)}
    return replace(first, metadata=metadata, tensors=tensors, files=tuple(part.path for part in parts))


def _number(part: GgufFile, key: str, default: int | None) -> int:
    """A whole number of the metadata; without a default it must be there."""
    value: Any = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        problem = "is missing" if value is None else f"is {str(value)[:80]}"
        raise InputError(f"{part.path}: {key} {problem}; expected a whole number")
    return value
