"""Files that are small on disk and would be large in memory: read under a limit, in a process of its own."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# What the interpreter and the libraries take before a file is opened does not count.
_READ = """
import resource, sys, time
from pathlib import Path
from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError

pages = int(Path("/proc/self/statm").read_text().split()[5])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # without the pages of a mapped file
start = time.process_time()
try:
    check_complete(open_artifact(sys.argv[1]))
except InputError as error:
    print(f"{time.process_time() - start:.3f} {error}")
"""


def refusal(path: Path) -> str:
    """The message with which a file is refused, within 5 seconds and 1 GiB."""
    ended = subprocess.run(
        [sys.executable, "-c", _READ, str(path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    seconds, _, message = ended.stdout.partition(" ")
    assert float(seconds) < 5
    assert message.count("\n") == 1
    return message


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_head(n_keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, n_keys)


def array(name: str, element: int, length: int) -> bytes:
    return text(name) + struct.pack("<IIQ", 9, element, length)


def many_arrays(path: Path) -> None:
    """A byte on disk is eight and more as an object."""
    with path.open("wb") as stream:
        stream.write(gguf_head(40))
        for number in range(40):
            stream.write(array(f"k{number}", 2, 2**22))
            stream.seek(2 * 2**22, os.SEEK_CUR)
        stream.truncate()


def empty_strings(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(gguf_head(8))
        for number in range(8):
            stream.write(array(f"k{number}", 8, 2**22))
            stream.seek(8 * 2**22, os.SEEK_CUR)
        stream.truncate()


def long_strings(path: Path) -> None:
    """Strings of 64 MiB each, which are one hole in the file."""
    with path.open("wb") as stream:
        stream.write(gguf_head(64))
        for number in range(64):
            stream.write(text(f"k{number}") + struct.pack("<IQ", 8, 2**26))
            stream.seek(2**26, os.SEEK_CUR)
        stream.truncate()


def many_tensors(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0))
    os.truncate(path, 2**42)


def header_of(document: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(len(document).to_bytes(8, "little") + document)

    return write


def keys_of(count: int) -> bytes:
    return b"{" + b",".join(b'"k%d":{}' % number for number in range(count)) + b"}"


CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "many arrays": ("m.gguf", many_arrays, "have more than 8388608 elements together"),
    "empty strings": ("m.gguf", empty_strings, "have more than 8388608 elements together"),
    "long strings": ("m.gguf", long_strings, "expected at most 134217728"),
    "many tensors": ("m.gguf", many_tensors, "tensor count is"),
    "lists": (
        "m.safetensors",
        header_of(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
        "values and keys of JSON",
    ),
    "just few enough lists": (
        "m.safetensors",
        header_of(b'{"a":[' + b"[]," * 1_999_000 + b"[]]}"),
        "tensor a is",
    ),
    "just few enough keys": ("m.safetensors", header_of(keys_of(1_300_000)), "tensor k0 has the dtype None"),
    "a key twice, the last of many": (
        "m.safetensors",
        header_of(keys_of(600_000)[:-1] + b',"k599999":1}'),
        "the key 'k599999' is there twice",
    ),
    "text": (
        "m.safetensors",
        header_of('{"\U0001f600'.encode() + b"a" * (63 * 2**20) + b'":1}'),
        "expected an object",
    ),
    "a long header": ("m.safetensors", header_of(b" " * (65 * 2**20)), "a header of 68157440 bytes"),
}


@pytest.mark.parametrize("case", CASES)
def test_little_time_and_memory(tmp_path: Path, case: str) -> None:
    name, write, message = CASES[case]
    write(tmp_path / name)
    assert message in refusal(tmp_path / name)


def test_a_large_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (folder / "config.json").write_text(json.dumps({"a": "x" * (65 * 2**20)}))
    assert "expected at most 67108864" in refusal(folder)
