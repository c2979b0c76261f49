from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from tests.helpers.hub_server import HubServer

from driftscope.artifacts.sources import LockedFile, LockEntry, fetch, parse_source, resolve
from driftscope.errors import InputError

DATA = random.Random(2).randbytes(50_000)


def test_resolve_then_fetch(server: HubServer, tmp_path: Path) -> None:
    server.static["/dir/model.gguf"] = DATA
    source = parse_source(f"{server.url}/dir/model.gguf")
    entry = resolve(source)
    digest = hashlib.sha256(DATA).hexdigest()
    assert entry.files == (LockedFile(name="model.gguf", bytes=len(DATA), sha256=digest),)
    server.cuts["/dir/model.gguf"] = [20_000]
    fetched = fetch(source, tmp_path / "out", entry)
    assert fetched.path == tmp_path / "out/model.gguf"
    assert fetched.path.read_bytes() == DATA


@pytest.mark.parametrize("changed", [b"X" * len(DATA), b"short", DATA + b"!"])
def test_a_changed_file_stops_with_both_digests(server: HubServer, tmp_path: Path, changed: bytes) -> None:
    server.static["/model.gguf"] = DATA
    source = parse_source(f"{server.url}/model.gguf")
    entry = resolve(source)
    server.static["/model.gguf"] = changed
    with pytest.raises(InputError) as caught:
        fetch(source, tmp_path / "out", entry)
    assert hashlib.sha256(DATA).hexdigest() in str(caught.value)
    assert hashlib.sha256(changed).hexdigest() in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_not_there(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HTTP 404"):
        resolve(parse_source(f"{server.url}/model.gguf"))
    entry = LockEntry(source="", files=(LockedFile(name="model.gguf", bytes=1, sha256="0" * 64),))
    with pytest.raises(InputError, match="HTTP 404"):
        fetch(parse_source(f"{server.url}/model.gguf"), tmp_path, entry)
