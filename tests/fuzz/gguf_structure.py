"""A GGUF file as parts that can be changed one by one and written again, well-formed or not."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.mutations import NUMBERS, number, text_like

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass
class Text:
    """A string, and the length that the file says it has."""

    text: bytes
    stated: int | None = None

    def packed(self) -> bytes:
        """The bytes of it."""
        return struct.pack("<Q", len(self.text) if self.stated is None else self.stated) + self.text


@dataclass
class Key:
    """A key and its value: `items` has one for a scalar or a string."""

    name: Text
    kind: int
    element: int | None
    items: list[Text | bytes]
    stated: int | None = None

    def packed(self) -> bytes:
        """The bytes of it."""
        head = self.name.packed() + struct.pack("<I", self.kind)
        if self.element is not None:
            count = len(self.items) if self.stated is None else self.stated
            head += struct.pack("<IQ", self.element, count)
        return head + b"".join(item.packed() if isinstance(item, Text) else item for item in self.items)


@dataclass
class Tensor:
    """A tensor's description."""

    name: Text
    dims: list[int]
    kind: int
    offset: int
    stated: int | None = None

    def packed(self) -> bytes:
        """The bytes of it."""
        count = len(self.dims) if self.stated is None else self.stated
        dims = struct.pack(f"<{len(self.dims)}Q", *self.dims)
        return (
            self.name.packed() + struct.pack("<I", count) + dims + struct.pack("<IQ", self.kind, self.offset)
        )


@dataclass
class Structure:
    """A whole file."""

    version: int
    keys: list[Key]
    tensors: list[Tensor]
    data: bytes
    alignment: int = 32
    stated: dict[str, int] = field(default_factory=dict)

    def packed(self) -> bytes:
        """The bytes of it."""
        n_tensors = self.stated.get("tensors", len(self.tensors))
        n_keys = self.stated.get("keys", len(self.keys))
        head = b"GGUF" + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        head += b"".join(part.packed() for part in (*self.keys, *self.tensors))
        return head + bytes(-len(head) % self.alignment) + self.data


def structure_of(data: bytes) -> Structure | None:
    """The parts of a file that is well-formed up to its tensors, or None."""
    position = 4

    def take(form: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(form, data, position)
        position += struct.calcsize(form)
        return int(value)

    def slice_of(size: int) -> bytes:
        nonlocal position
        if position + size > len(data):
            raise ValueError
        position += size
        return data[position - size : position]

    def text() -> Text:
        return Text(slice_of(take("<Q")))

    def item(kind: int) -> Text | bytes:
        return text() if kind == _STRING else slice_of(_SIZES[kind])

    try:
        version, n_tensors, n_keys = take("<I"), take("<Q"), take("<Q")
        keys = []
        for _ in range(n_keys):
            name, kind = text(), take("<I")
            if kind == _ARRAY:
                element, count = take("<I"), take("<Q")
                keys.append(Key(name, kind, element, [item(element) for _ in range(count)]))
            else:
                keys.append(Key(name, kind, None, [item(kind)]))
        tensors = []
        for _ in range(n_tensors):
            name, n_dims = text(), take("<I")
            dims = [take("<Q") for _ in range(min(n_dims, 8))]
            tensors.append(Tensor(name, dims, take("<I"), take("<Q")))
    except (ValueError, KeyError, struct.error, MemoryError, OverflowError):
        return None
    return Structure(version, keys, tensors, data[-(-position // 32) * 32 :])


def change_gguf(random: Random, data: bytes) -> bytes | None:
    """One to three changes of a file's parts; None where it has none."""
    parts = structure_of(data)
    if parts is None:
        return None
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _change(random, parts)
    return parts.packed()


def _change(random: Random, parts: Structure) -> None:
    how = random.randrange(12)
    if how == 0:
        parts.stated[random.choice(("tensors", "keys"))] = number(random, len(parts.keys))
    elif how == 1:
        parts.version = number(random, parts.version, 32)
    elif how == 2:
        parts.alignment = random.choice((1, 8, 32, 64, 4096))
    elif how == 3:
        group: list[Key] | list[Tensor] = random.choice((parts.keys, parts.tensors))
        _regroup(random, group)
    elif how < 8 and parts.keys:
        _change_key(random, random.choice(parts.keys), [key.name for key in parts.keys])
    elif parts.tensors:
        _change_tensor(random, random.choice(parts.tensors), [tensor.name for tensor in parts.tensors])


def _regroup(random: Random, group: list[Key] | list[Tensor]) -> None:
    if not group:
        return
    at = random.randrange(len(group))
    how = random.randrange(3)
    if how == 0:
        del group[at]
    elif how == 1:
        group.insert(random.randrange(len(group)), group[at])  # type: ignore[arg-type]
    else:
        random.shuffle(group)


def _change_text(random: Random, text: Text, names: list[Text]) -> None:
    how = random.randrange(4)
    if how == 0:
        text.stated = number(random, len(text.text))
    elif how == 1:
        text.text = random.choice(names).text
    elif how == 2:
        text.text = random.randbytes(random.randrange(9))
    else:
        text.text = text_like(random, text.text.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")


def _change_key(random: Random, key: Key, names: list[Text]) -> None:
    how = random.randrange(8)
    if how == 0:
        key.name = Text(key.name.text)
        _change_text(random, key.name, names)
    elif how == 1:
        key.kind = random.choice((*range(14), 2**32 - 1))
    elif how == 2 and key.element is not None:
        if random.random() < 0.5:
            key.stated = number(random, len(key.items))
        else:
            key.element = random.choice((*range(14), 2**32 - 1))
    elif how == 3 and key.element is not None:
        # The same scalar as a list of one for each layer, or a list shortened.
        key.items = key.items[: random.randrange(len(key.items) + 1)]
    elif how == 4 and key.element is None:
        key.kind, key.element = _ARRAY, key.kind
        key.items = key.items * random.choice((1, 2, 3, 100))
    elif key.items:
        at = random.randrange(len(key.items))
        item = key.items[at]
        if isinstance(item, Text):
            key.items[at] = changed = Text(item.text)
            _change_text(random, changed, names)
        else:
            size = len(item)
            old = int.from_bytes(item, "little")
            floats = (0x7FC00000, 0x7F800000, 0x80000000, 1, 0x7F7FFFFF)
            new = (
                random.choice(floats)
                if key.kind == 6 and random.random() < 0.5
                else number(random, old, 8 * size)
            )
            key.items[at] = new.to_bytes(size, "little")


def _change_tensor(random: Random, tensor: Tensor, names: list[Text]) -> None:
    how = random.randrange(6)
    if how == 0:
        tensor.name = Text(tensor.name.text)
        _change_text(random, tensor.name, names)
    elif how == 1:
        at = random.randrange(len(tensor.dims) + 1)
        if at < len(tensor.dims):
            tensor.dims[at] = number(random, tensor.dims[at])
        else:
            tensor.dims.append(random.choice(NUMBERS))
    elif how == 2:
        tensor.kind = random.choice((*range(46), 2**31, 2**32 - 1))
    elif how == 3:
        tensor.offset = number(random, tensor.offset)
    elif how == 4:
        tensor.stated = number(random, len(tensor.dims), 32)
    else:
        random.shuffle(tensor.dims)
