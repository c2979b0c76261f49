from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from tests.helpers.hub_server import HubServer

from driftscope.artifacts.sources import LockedFile, LockEntry, fetch, parse_source
from driftscope.errors import InputError

DATA = random.Random(3).randbytes(30_000)


def pin(name: str, data: bytes) -> LockedFile:
    return LockedFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def url(server: HubServer) -> str:
    server.static["/model.gguf"] = DATA
    return f"{server.url}/model.gguf"


def test_what_is_there_is_verified_and_kept(server: HubServer, url: str, tmp_path: Path) -> None:
    entry = LockEntry(source=url, files=(pin("model.gguf", DATA),))
    first = fetch(parse_source(url), tmp_path, entry)
    before = first.path.stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    fetch(parse_source(url), tmp_path, entry, progress=lambda done, total: seen.append((done, total)))
    assert len(server.log) == 1
    assert first.path.stat().st_mtime_ns == before
    assert seen == [(len(DATA), len(DATA))]


@pytest.mark.parametrize("damaged", [b"", b"X" * len(DATA), DATA[:-1], DATA + b"!"])
def test_what_was_damaged_is_brought_again(url: str, tmp_path: Path, damaged: bytes) -> None:
    entry = LockEntry(source=url, files=(pin("model.gguf", DATA),))
    (tmp_path / "model.gguf").write_bytes(damaged)
    assert fetch(parse_source(url), tmp_path, entry).path.read_bytes() == DATA


def test_a_mismatch_leaves_the_earlier_file(url: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"earlier and good")
    entry = LockEntry(source=url, files=(pin("model.gguf", b"something else"),))
    with pytest.raises(InputError, match="checksum mismatch"):
        fetch(parse_source(url), tmp_path, entry)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == b"earlier and good"


def test_an_interrupted_fetch_leaves_a_part_that_the_next_one_continues(
    server: HubServer, url: str, tmp_path: Path
) -> None:
    entry = LockEntry(source=url, files=(pin("model.gguf", DATA),))
    server.cuts["/model.gguf"] = [2_000] * 6
    with pytest.raises(InputError, match="12000 bytes are kept"):
        fetch(parse_source(url), tmp_path, entry)
    assert not (tmp_path / "model.gguf").exists()
    server.log.clear()
    assert fetch(parse_source(url), tmp_path, entry).path.read_bytes() == DATA
    (rest,) = server.log
    assert (rest.range, rest.sent) == ("bytes=12000-", 18_000)
    assert not list(tmp_path.glob("*.part"))


def test_the_part_of_another_version_is_not_continued(server: HubServer, url: str, tmp_path: Path) -> None:
    other = LockEntry(source=url, files=(pin("model.gguf", b"another version" * 2000),))
    server.cuts["/model.gguf"] = [2_000] * 6
    with pytest.raises(InputError, match="12000 bytes are kept"):
        fetch(parse_source(url), tmp_path, other)
    server.log.clear()
    entry = LockEntry(source=url, files=(pin("model.gguf", DATA),))
    assert fetch(parse_source(url), tmp_path, entry).path.read_bytes() == DATA
    assert [request.range for request in server.log] == [None]


def test_a_left_over_link_is_not_written_through(url: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(b"the user's own")
    folder = tmp_path / "out"
    folder.mkdir()
    file = pin("model.gguf", DATA)
    (folder / f"model.gguf.{file.sha256[:12]}.part").symlink_to(precious)
    (folder / "model.gguf").symlink_to(precious)
    fetched = fetch(parse_source(url), folder, LockEntry(source=url, files=(file,)))
    assert fetched.path.read_bytes() == DATA
    assert not fetched.path.is_symlink()
    assert precious.read_bytes() == b"the user's own"


def test_files_of_an_earlier_pin_are_removed_and_others_are_not(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "out"
    (model / "sub").mkdir(parents=True)
    old = {"sub/old.bin": b"old", "kept.bin": b"kept"}
    for name, data in old.items():
        (model / name).write_bytes(data)
    source = parse_source("file:model", tmp_path)
    fetch(source, folder, LockEntry(source="", files=tuple(pin(*item) for item in old.items())))
    (folder / "notes.txt").write_text("mine")
    fetch(source, folder, LockEntry(source="", files=(pin("kept.bin", b"kept"),)))
    assert not (folder / "sub/old.bin").exists()
    assert (folder / "kept.bin").read_bytes() == b"kept"
    assert (folder / "notes.txt").exists()
    assert (model / "sub/old.bin").exists()


@pytest.mark.parametrize("manifest", ["not json", "7", '["../../precious", 3, "/precious"]'])
def test_a_forged_manifest_removes_nothing_outside(url: str, tmp_path: Path, manifest: str) -> None:
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    (folder / ".fetched.json").write_text(manifest)
    fetch(parse_source(url), folder, LockEntry(source=url, files=(pin("model.gguf", DATA),)))
    assert (tmp_path / "precious").exists()


def test_a_folder_that_cannot_be_made(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    entry = LockEntry(source=url, files=(pin("model.gguf", DATA),))
    with pytest.raises(InputError, match="cannot be written"):
        fetch(parse_source(url), tmp_path / "file/out", entry)
