"""Safetensors files, alone or as the shards of an index.

Layout (safetensors' ``README.md``, section Format): an 8-byte little-endian header length, a JSON header
that gives each tensor's dtype, shape and byte range, and the data without gaps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open

from driftscope.artifacts.files import member, parse_json_object, read_json_object, regular_file_size
from driftscope.errors import InputError

INDEX = "model.safetensors.index.json"

# Bits of a value of each dtype that the library's header knows.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
"""The dtypes whose name is also that of a format here; others are refused where a model's weights are one."""

# ``model-00002-of-00005.safetensors``.
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", re.DOTALL)

# Far above any model's; the safetensors library takes up to 100 MB.
_MAX_HEADER_BYTES = 64 * 2**20

# Far above any tensor's; more would make products of many thousand bits.
_MAX_DIMS = 64


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, with its offset from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one file; the tensor data is not touched.

    The safetensors library checks the header as well, so that nothing is accepted here that it refuses.

    Returns:
        Name to tensor, in the order of the data.

    Raises:
        InputError: truncated, inconsistent, or not a safetensors file.
    """
    size = regular_file_size(path)
    if size < 8:
        raise InputError(f"{path}: {size} bytes; expected a safetensors file")
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise InputError(
                    f"{path}: a header of {length} bytes in a file of {size}; is it a truncated or no "
                    "safetensors file?"
                )
            header = parse_json_object(stream.read(length), f"{path}: header")
        data_offset = 8 + length
        tensors = [
            _entry(name, entry, path, data_offset, size)
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes, tensor.name))
    position = data_offset
    for tensor in tensors:
        if tensor.offset != position:
            raise InputError(
                f"{path}: tensor {_short(tensor.name)} starts at byte {tensor.offset}; expected {position}"
            )
        position += tensor.nbytes
    if position != size:
        raise InputError(f"{path}: the tensors end at byte {position}, but the file has {size}")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not a usable safetensors file ({_short(str(error))})") from error
    return {tensor.name: tensor for tensor in tensors}


def read_sharded(folder: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...], tuple[Path, ...]]:
    """Read the headers of all shards that an index names.

    Returns:
        Name to tensor, for the tensors of the index; names in the shards that the index does not know;
        the index and the shards, sorted.

    Raises:
        InputError: an unusable index, a shard name that leaves the folder, a missing shard, a tensor that
            is not in its shard, or an unusable shard.
    """
    index = member(folder, INDEX)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not _is_plain_file_name(shard):
            raise InputError(
                f"{index}: {_short(name)} is in {_short(shard)}; "
                "expected a .safetensors file name without a path"
            )
    shards = {shard: read_safetensors(member(folder, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise InputError(f"{index}: {_short(name)} is not in {shard}, where the index says it is")
    _check_distinct(shards.values(), str(folder))
    listed = {name: shards[shard][name] for name, shard in weight_map.items()}
    unlisted = sorted(name for tensors in shards.values() for name in tensors if name not in weight_map)
    return listed, tuple(unlisted), (index, *(folder / shard for shard in sorted(shards)))


def read_files(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read the headers of files that hold one model together, without an index.

    Args:
        files: of one folder. Where they are numbered (``model-00002-of-00005.safetensors``), all are there.

    Returns:
        Name to tensor.

    Raises:
        InputError: a missing or unusable file, or a tensor that two files hold.
    """
    files = sorted(files)
    names = {file.name for file in files}
    for file in files:
        numbered = _SHARD.fullmatch(file.name)
        count = int(numbered[3]) if numbered else 0
        for number in range(1, count + 1):
            expected = f"{numbered[1]}{number:05d}-of-{count:05d}.safetensors" if numbered else ""
            if expected not in names:
                raise InputError(f"{file}: its neighbour {expected} is missing")
    shards = [read_safetensors(file) for file in files]
    _check_distinct(shards, str(files[0].parent))
    return {name: tensor for tensors in shards for name, tensor in tensors.items()}


def _check_distinct(shards: Iterable[Mapping[str, StoredTensor]], where: str) -> None:
    """No tensor is in two shards."""
    seen: dict[str, StoredTensor] = {}
    for tensors in shards:
        for name, tensor in tensors.items():
            if name in seen:
                files = f"{seen[name].file.name} and in {tensor.file.name}"
                raise InputError(f"{where}: {_short(name)} is in {files}; expected it once")
            seen[name] = tensor


def _entry(name: str, entry: Any, path: Path, data_offset: int, size: int) -> StoredTensor:
    """One entry of the header, checked against the file."""
    label = f"{path}: tensor {_short(name)}"
    if not isinstance(entry, Mapping):
        raise InputError(f"{label} is {_short(entry)}; expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise InputError(f"{label} has the dtype {_short(dtype)}")
    if not _are_counts(shape):
        raise InputError(f"{label} has the shape {_short(shape)}; expected a list of whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{label} has the data_offsets {_short(offsets)}; expected a range")
    begin, end = offsets
    if data_offset + end > size:
        raise InputError(
            f"{label} ends at byte {data_offset + end}, but the file has {size}; is it truncated?"
        )
    if dtype not in _BITS:
        raise InputError(f"{label} has the unknown dtype {_short(dtype)}; known are {', '.join(_BITS)}")
    if len(shape) > _MAX_DIMS:
        raise InputError(f"{label} has {len(shape)} dimensions; expected at most {_MAX_DIMS}")
    bits = _BITS[dtype]
    for dim in shape:
        bits *= dim
    if bits != 8 * (end - begin):
        takes = f"{bits // 8} bytes and {bits % 8} bits" if bits % 8 else f"{bits // 8}"
        raise InputError(f"{label} has {end - begin} bytes; {dtype} {_short(shape)} takes {_short(takes)}")
    return StoredTensor(name, tuple(shape), dtype, path, data_offset + begin, end - begin)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values
    )


def _is_plain_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(character in name for character in "/\\:\0")
    )


def _short(value: object) -> str:
    """A value for a message: printable, cut where it is long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
