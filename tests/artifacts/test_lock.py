from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from driftscope.artifacts.lock import Lock, check, fetch_model, lock_config, lock_path, read_lock, write_lock
from driftscope.artifacts.sources import LockedFile, LockEntry
from driftscope.errors import InputError

FILE = LockedFile(name="a.gguf", bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())
ENTRY = LockEntry(source="pypi:a==1/a.gguf", revision="1", archive=FILE, files=(FILE,))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "a.gguf").write_bytes(b"abc")
    (tmp_path / "b.gguf").write_bytes(b"other")
    return tmp_path / "case.yaml"


def test_path() -> None:
    assert lock_path(Path("config/config.yaml")) == Path("config/config.lock.yaml")
    assert lock_path(Path("config/qwen2.5-coder-7b.yaml")) == Path("config/qwen2.5-coder-7b.lock.yaml")


def test_round_trip(tmp_path: Path) -> None:
    lock = Lock(models={"source": ENTRY, "other": LockEntry(source="file:ü.gguf", files=(FILE,))})
    write_lock(tmp_path / "a.lock.yaml", lock)
    assert read_lock(tmp_path / "a.lock.yaml") == lock


def test_the_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    entries = {"b": ENTRY, "a": ENTRY}
    write_lock(tmp_path / "one.yaml", Lock(models=entries))
    write_lock(tmp_path / "two.yaml", Lock(models=dict(reversed(entries.items()))))
    assert (tmp_path / "one.yaml").read_bytes() == (tmp_path / "two.yaml").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        "{",
        "\t",
        "models: {}\nunknown: 1",
        "schema_version: 2",
        "models: {a: {source: x, files: []}}",
        "models: {a: {source: x, files: [{name: ../a, bytes: 1, sha256: %s}]}}" % ("0" * 64),
        "models: {a: {source: x, files: [{name: /a, bytes: 1, sha256: %s}]}}" % ("a" * 64),
        "models: {a: {source: x, files: [{name: a, bytes: -1, sha256: %s}]}}" % ("a" * 64),
        "models: {a: {source: x, files: [{name: a, bytes: '1', sha256: %s}]}}" % ("a" * 64),
        "models: {a: {source: x, files: [{name: a, bytes: 1, sha256: %s}]}}" % ("A" * 64),
        "models: {a: {source: x, files: [{name: a, bytes: 1}]}}",
        "models: {a: {source: x, files: [&f {name: a, bytes: 1, sha256: %s}, *f]}}" % ("a" * 64),
        "a: !!python/object/apply:os.getcwd []",
        "a: &a [*a]",
        "a: 2024-13-45",
        "[" * 5000,
    ],
)
def test_what_is_not_a_lock_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.lock.yaml"
    path.write_text(text)
    if text == "":
        path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"a\.lock\.yaml") as caught:
        read_lock(path)
    assert "\n" not in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no lock file; run `driftscope lock`"):
        read_lock(tmp_path / "a.lock.yaml")


def test_check() -> None:
    lock = Lock(models={"source": ENTRY})
    path = Path("a.lock.yaml")
    assert check(lock, "source", ENTRY.source, path) == ENTRY
    with pytest.raises(InputError, match=r"`other` .*is not locked; run `driftscope lock`"):
        check(lock, "other", ENTRY.source, path)
    with pytest.raises(InputError, match=r"locked to pypi:a==1/a.gguf, the configuration says pypi:a==2/a"):
        check(lock, "source", "pypi:a==2/a.gguf", path)


def test_lock_then_fetch(config: Path) -> None:
    models = {"b": "file:b.gguf", "a": "file:a.gguf"}
    seen: list[str] = []
    path = lock_config(models, config, progress=lambda model_id, done, total: seen.append(model_id))
    assert path == config.with_name("case.lock.yaml")
    assert read_lock(path).models["a"].files == (FILE,)
    assert seen == ["a", "b"]
    fetched = fetch_model("a", "file:a.gguf", config, config.parent / "out")
    assert fetched.path.read_bytes() == b"abc"
    with pytest.raises(InputError, match="run `driftscope lock`"):
        fetch_model("a", "file:b.gguf", config, config.parent / "out")


def test_locking_one_model_keeps_the_pins_of_the_others(config: Path) -> None:
    models = {"a": "file:a.gguf", "b": "file:b.gguf"}
    path = lock_config(models, config)
    before = read_lock(path)
    (config.parent / "a.gguf").write_bytes(b"changed")
    (config.parent / "b.gguf").write_bytes(b"changed too")
    after = read_lock(lock_config(models, config, only={"b"}))
    assert after.models["a"] == before.models["a"]
    assert after.models["b"] != before.models["b"]
    with pytest.raises(InputError, match="no model `c`"):
        lock_config(models, config, only={"c"})


def test_a_source_that_cannot_be_resolved_leaves_the_lock(config: Path) -> None:
    path = lock_config({"a": "file:a.gguf"}, config)
    before = path.read_bytes()
    with pytest.raises(InputError):
        lock_config({"a": "file:a.gguf", "z": "file:missing.gguf"}, config)
    assert path.read_bytes() == before


def test_the_lock_cannot_be_written(config: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_lock(config.parent / "missing/a.lock.yaml", Lock())
