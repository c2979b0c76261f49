"""Links, patterns and files that are no files, in model folders."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from tests.helpers.tiny_models import save_tiny_model

from driftscope.artifacts.files import check_members, following_links, matches, member
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.safetensors import INDEX
from driftscope.artifacts.sources.file import parse
from driftscope.artifacts.sources.store import fetch
from driftscope.errors import InputError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards."""
    folder = tmp_path_factory.mktemp("original") / "model"
    save_tiny_model(folder, "llama")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def names(folder: Path) -> set[str]:
    return set(open_artifact(folder).tensors)


def hub_cache(original: Path, root: Path) -> Path:
    """The layout of the hub's cache: a snapshot of links to blobs; returns the snapshot."""
    blobs, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(original.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_followed(original: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(original, tmp_path)
    assert names(snapshot) == names(original)
    typed = tmp_path / "typed"
    typed.symlink_to(snapshot)
    assert names(typed) == names(original)
    assert set(open_artifact(snapshot / "*.safetensors").tensors) == names(original)


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "store").mkdir()
    for file in (*shards(folder), folder / "config.json", folder / INDEX):
        file.rename(folder / "store" / file.name)
        file.symlink_to(Path("store") / file.name)
    assert len(names(folder)) == 21


@pytest.mark.parametrize("name", ["shard", "config.json", INDEX, "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    path = shards(folder)[1] if name == "shard" else folder / name
    outside = tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("{}")
    path.symlink_to(outside)
    with pytest.raises(
        InputError, match=rf"{path.name}: a symbolic link to '.*outside', outside of the model"
    ):
        open_artifact(folder)


def test_blobs_of_another_model_are_outside(original: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(original, tmp_path)
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    config = snapshot / "config.json"
    shutil.copy(config, other / "x")
    config.unlink()
    config.symlink_to("../../../models--c--d/blobs/x")
    with pytest.raises(InputError, match=r"config\.json: a symbolic link to"):
        open_artifact(snapshot)


@pytest.mark.parametrize(
    "target", ["loop", "a" * 300, "nothing", "/dev/zero", "/proc/self/mem", ".", "../model"]
)
def test_links_to_no_file(folder: Path, target: str) -> None:
    path = folder / "tokenizer.json"
    path.symlink_to("tokenizer.json" if target == "loop" else target)
    with pytest.raises(InputError, match=r"tokenizer\.json: "):
        open_artifact(folder)


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "shard", INDEX])
def test_what_is_no_file_is_refused_by_name(folder: Path, kind: str, name: str) -> None:
    path = shards(folder)[0] if name == "shard" else folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(folder)  # A socket's path is short.
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    expected = "a symbolic link" if kind == "device" else f"a {kind}; expected a regular file"
    with pytest.raises(InputError, match=rf"{path.name}: {expected}"):
        open_artifact(folder)


def test_members_of_unbounded_size(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(InputError, match=r"chat_template\.jinja: 1099511627776 bytes; expected at most"):
        check_members(folder)


def test_what_a_person_types_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    """The rule holds for what a folder or an index names, not for the path itself."""
    one = tmp_path / "one"
    save_tiny_model(one, "llama", max_shard_size="1GB")
    link = tmp_path / "link.safetensors"
    link.symlink_to(one / "model.safetensors")
    shutil.copy(one / "config.json", tmp_path)
    assert len(open_artifact(link).tensors) == 21
    assert member(one, "model.safetensors") == one / "model.safetensors"


def test_links_that_driftscope_made_are_followed(folder: Path, tmp_path: Path) -> None:
    """A folder that is a ``file:`` source is linked to, file by file; what it links to itself is checked."""
    store = tmp_path / "store"
    source = parse("file:model", "model", tmp_path)
    entry = source.resolve(tmp_path, None)
    fetched = fetch(source, store, entry)
    assert all(file.is_symlink() for file in store.iterdir() if not file.name.startswith("."))
    with pytest.raises(InputError, match="a symbolic link to"):
        open_artifact(fetched.path)
    with following_links():
        assert set(open_artifact(fetched.path).tensors) == names(folder)
    with pytest.raises(InputError, match="a symbolic link to"):
        open_artifact(fetched.path)
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"tokenizer\.json: a symbolic link to '/etc/hostname'"):
        source.resolve(tmp_path, None)


# --- Patterns.


def test_patterns_of_shards(folder: Path) -> None:
    expected = open_artifact(folder)
    (folder / INDEX).unlink()
    found = open_artifact(folder / "model-*.safetensors")
    assert found.tensors == expected.tensors
    assert found.files == (folder / "config.json", *shards(folder))
    missing = shards(folder)[2]
    missing.unlink()
    with pytest.raises(InputError, match=f"its neighbour {missing.name} is missing"):
        open_artifact(folder / "model-*.safetensors")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    held = [name for name, shard in weight_map.items() if list(weight_map.values()).count(shard) > 1]
    first = folder / weight_map[held[0]]
    shutil.copy(first, folder / "more.safetensors")
    with pytest.raises(InputError, match=rf" is in {first.name} and in more\.safetensors; expected it once"):
        open_artifact(folder / "mo*.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {held[0]: "more.safetensors"}}))
    with pytest.raises(InputError, match=rf" is in {first.name} and in more\.safetensors; expected it once"):
        open_artifact(folder)


def test_patterns_that_name_no_one_model(folder: Path, tmp_path: Path) -> None:
    for pattern, message in (
        ("*.bin", "no file matches this pattern"),
        ("*o*", "expected safetensors files, or the parts of one GGUF model"),
        ("../*/*.safetensors", "matches files of several folders"),
    ):
        shutil.copytree(folder, tmp_path / "second", dirs_exist_ok=True)
        with pytest.raises(InputError, match=message):
            open_artifact(folder / pattern)


def test_a_name_that_looks_like_a_pattern(folder: Path, tmp_path: Path) -> None:
    odd = folder.rename(tmp_path / "model [a]*")
    assert matches(odd) == []
    assert len(open_artifact(odd).tensors) == 21
    assert matches(tmp_path / "plain") == []
    (tmp_path / "a1").mkdir()
    assert matches(tmp_path / "a?") == [tmp_path / "a1"]
