"""Changes to bytes, numbers and JSON that readers are known to trip over."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 255, 256, 257, 65535, 65536),
    *(
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 1,
        2**53,
        2**61,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 32,
        2**64 - 1,
    ),
)
"""Numbers at which a width, a sign or a product overflows."""

TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\0",
        "a" * 300,
        "ÿ",
        "\U0001f600",
        "e\u0301",
        "../x",
        "/etc/passwd",
        "/dev/zero",
        "%s%n",
        "{{",
    ),
    *(
        "model.safetensors",
        "config.json",
        "a.safetensors",
        "sub/a.safetensors",
        ".",
        "..",
        "-1",
        "1e999",
        "nan",
    ),
)


@dataclass(frozen=True)
class Raw:
    """JSON text that stands as it is."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """A JSON object that may have a key twice."""


RAWS = (
    *(
        "NaN",
        "-Infinity",
        "1e999",
        "-0",
        "1" * 400,
        "1e-400",
        "[" * 2000,
        "[" * 900 + "]" * 900,
        "[" * 70 + "]" * 70,
        '"\\ud800"',
        '"\\u0000"',
        "",
        "0x10",
    ),
    *("9223372036854775808", "18446744073709551616", "-9223372036854775809", "1.5", "1e3", "true", "null"),
)


def number(random: Random, old: int = 0, bits: int = 64) -> int:
    """A number near to the old one, or one of `NUMBERS`, in so many bits."""
    how = random.randrange(5)
    if how == 0:
        new = old + random.choice((-1, 1, -8, 8, 32))
    elif how == 1:
        new = old ^ (1 << random.randrange(bits))
    elif how == 2:
        new = old * random.choice((2, 3, 256, 2**32))
    else:
        new = random.choice(NUMBERS)
    return new % (1 << bits)


def change_bytes(random: Random, data: bytes, other: bytes) -> bytes:
    """One change somewhere in `data`; a splice takes what follows from `other`."""
    if not data:
        return random.randbytes(random.randrange(64))
    at = random.randrange(len(data))
    # The structure stands in front: half of the changes are made there.
    if random.random() < 0.5:
        at = random.randrange(min(len(data), 512))
    end = min(len(data), at + random.choice((1, 2, 4, 8, 16, 64, 1024)))
    how = random.randrange(9)
    if how == 0:
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if how == 1:
        return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
    if how == 2:
        size = random.choice((2, 4, 8))
        new = random.choice(NUMBERS) % (1 << (8 * size))
        return data[:at] + new.to_bytes(size, "little") + data[at + size :]
    if how == 3:
        return data[:at]
    if how == 4:
        return data[:at] + data[end:]
    if how == 5:
        return data[:end] + data[at:]
    if how == 6:
        return data[:at] + random.randbytes(end - at) + data[end:]
    if how == 7:
        return data[:at] + random.choice((b"\0", b"\xff")) * (end - at) + data[end:]
    return data[:at] + other[random.randrange(len(other) + 1) :]


def change_json(random: Random, text: bytes, other: bytes) -> bytes:
    """One to three changes in the tree of a JSON document, or in its text where it has none."""
    document = parsed(text)
    if document is None or random.random() < 0.1:
        return change_bytes(random, text, other)
    try:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            document = change_tree(random, document)
        return dumped(document).encode("utf-8", "surrogatepass")
    except RecursionError:  # a deep one, which was kept because it was new
        return change_bytes(random, text, other)


def parsed(text: bytes) -> Any:
    """The tree of a document, objects as `Pairs`, or None."""
    try:
        return json.loads(text, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return None


def dumped(node: Any) -> str:
    """The text of a tree."""
    if isinstance(node, Raw):
        return node.text
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dumped(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(dumped, node)) + "]"
    return json.dumps(node)


def places(node: Any, above: Callable[[Any], Any] | None = None) -> list[tuple[Any, Callable[[Any], None]]]:
    """Every node of a tree with a function that puts another in its stead; long lists only in part."""
    found: list[tuple[Any, Callable[[Any], None]]] = []
    if isinstance(node, list):
        pairs = isinstance(node, Pairs)
        for index in (*range(min(len(node), 40)), *range(max(40, len(node) - 10), len(node))):

            def put(new: Any, index: int = index) -> None:
                node[index] = (node[index][0], new) if pairs else new

            child = node[index][1] if pairs else node[index]
            found.append((child, put))
            found.extend(places(child))
    return found


def change_tree(random: Random, document: Any) -> Any:
    """One change in a tree; returns the tree."""
    found = places(document)
    if not found:
        return value(random, document)
    node, put = random.choice(found)
    containers = [item for item, _ in found if isinstance(item, list) and item] + [document]
    how = random.randrange(10)
    holder = random.choice(containers)
    if how < 4 or not isinstance(holder, list) or not holder:
        put(value(random, node))
    elif how == 4:
        put(deepcopy(random.choice(found)[0]))  # a tree that held itself would have no end
    elif how == 5:
        del holder[random.randrange(len(holder))]
    elif how == 6:
        holder.insert(random.randrange(len(holder) + 1), random.choice(holder))
    elif how == 7:
        random.shuffle(holder)
    elif isinstance(holder, Pairs):
        index = random.randrange(len(holder))
        names = [key for item in containers if isinstance(item, Pairs) for key, _ in item]
        name = random.choice(names) if random.random() < 0.5 else text_like(random, holder[index][0])
        holder[index] = (name, holder[index][1])
    else:
        holder.append(value(random, holder[-1]))
    return document


def value(random: Random, old: Any) -> Any:
    """A value in place of another: mostly of its kind."""
    how = random.randrange(8)
    if how == 0:
        return Raw(random.choice(RAWS))
    if how == 1:
        return random.choice((None, True, False, 0, 0.0, -1, 1.5, "", [], Pairs(), [[]], [None]))
    if isinstance(old, str):
        return text_like(random, old)
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int):
        return -number(random, old) if random.random() < 0.2 else number(random, old)
    if isinstance(old, float):
        return random.choice((-old, old * 1e300, 0.0, 1e-320, -1.0))
    return random.choice((None, [old], Pairs([("a", old)]), 7))


def text_like(random: Random, old: str) -> str:
    """A text near to the old one, or one of `TEXTS`."""
    at = random.randrange(len(old) + 1)
    how = random.randrange(5)
    if how == 0:
        return old[:at]
    if how == 1:
        return old[:at] + random.choice(TEXTS) + old[at:]
    if how == 2:
        return (
            old[:at]
            + chr(random.choice((0, 10, 32, 34, 46, 47, 48, 57, 92, 127, 0xD800, 0x2581)))
            + old[at + 1 :]
        )
    if how == 3:
        return old * 2
    return random.choice(TEXTS)
