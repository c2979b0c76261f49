from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.hub_server import HubServer, Repository

from driftscope.artifacts.sources import fetch, parse_source, resolve
from driftscope.artifacts.sources.hf import _select
from driftscope.errors import InputError

SHARDS = {f"model-0000{n}-of-00004.safetensors": random.Random(n).randbytes(40_000 + n) for n in (1, 2, 3, 4)}
FILES = {
    ".gitattributes": b"* text=auto\n",
    "config.json": b'{"model_type": "qwen2"}\n',
    "empty.txt": b"",
    "model.safetensors.index.json": b'{"weight_map": {}}\n',
    "onnx/model.onnx": random.Random(9).randbytes(1000),
    **SHARDS,
}
LFS = frozenset({*SHARDS, "onnx/model.onnx"})
SHARD = "model-00002-of-00004.safetensors"
CONTENT = f"/content/{hashlib.sha256(SHARDS[SHARD]).hexdigest()}"


@pytest.fixture(params=[False, True], ids=["lfs", "xet"])
def repository(hub: HubServer, request: pytest.FixtureRequest) -> Repository:
    hub.repositories["org/model"] = Repository(FILES, LFS, xet=request.param)
    return hub.repositories["org/model"]


def test_lock_of_sharded_safetensors(hub: HubServer, repository: Repository) -> None:
    entry = resolve(parse_source("hf:org/model/*.safetensors"))
    assert entry.revision == repository.commit
    assert [(file.name, file.bytes, file.sha256) for file in entry.files] == [
        (name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(SHARDS.items())
    ]
    assert all(request.path.startswith("/api/") for request in hub.log), "LFS files need no download"


def test_lock_and_fetch_of_a_whole_repository(repository: Repository, tmp_path: Path) -> None:
    source = parse_source("hf:org/model/*")
    entry = resolve(source)
    names = sorted(name for name in FILES if "/" not in name and not name.startswith("."))
    assert [file.name for file in entry.files] == names
    seen: list[tuple[int, int]] = []
    fetched = fetch(source, tmp_path / "out", entry, progress=lambda done, total: seen.append((done, total)))
    assert fetched.path == tmp_path / "out"
    assert {path.name: path.read_bytes() for path in fetched.paths} == {name: FILES[name] for name in names}
    assert seen == sorted(seen)
    assert seen[-1] == (entry.total_bytes, entry.total_bytes)


def test_the_names_start_at_the_globs_folder(repository: Repository, tmp_path: Path) -> None:
    source = parse_source("hf:org/model/onnx/*.onnx")
    entry = resolve(source)
    assert [file.name for file in entry.files] == ["model.onnx"]
    assert fetch(source, tmp_path, entry).path.read_bytes() == FILES["onnx/model.onnx"]


def test_cut_and_resumed(hub: HubServer, repository: Repository, tmp_path: Path) -> None:
    source = parse_source(f"hf:org/model/{SHARD}")
    entry = resolve(source)
    hub.cuts[CONTENT] = [15_000]
    fetched = fetch(source, tmp_path, entry)
    assert fetched.path.read_bytes() == SHARDS[SHARD]
    first, second = hub.requests(CONTENT)
    assert (first.range, first.status, first.sent) == (None, 200, 15_000)
    assert (second.range, second.status, second.sent) == ("bytes=15000-", 206, len(SHARDS[SHARD]) - 15_000)


def test_cut_until_given_up_then_resumed_by_another_call(
    hub: HubServer, repository: Repository, tmp_path: Path
) -> None:
    source = parse_source(f"hf:org/model/{SHARD}")
    entry = resolve(source)
    hub.cuts[CONTENT] = [1000] * 6
    with pytest.raises(InputError, match="6000 bytes are kept"):
        fetch(source, tmp_path, entry)
    hub.log.clear()
    assert fetch(source, tmp_path, entry).path.read_bytes() == SHARDS[SHARD]
    (rest,) = hub.requests(CONTENT)
    assert (rest.range, rest.sent) == ("bytes=6000-", len(SHARDS[SHARD]) - 6000)


def test_wrong_content_stops_with_both_digests(
    hub: HubServer, repository: Repository, tmp_path: Path
) -> None:
    source = parse_source(f"hf:org/model/{SHARD}")
    entry = resolve(source)
    hub.tampered[CONTENT] = b"X" * len(SHARDS[SHARD])
    with pytest.raises(InputError) as caught:
        fetch(source, tmp_path, entry)
    assert entry.files[0].sha256 in str(caught.value)
    assert hashlib.sha256(hub.tampered[CONTENT]).hexdigest() in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_branch_that_moved_on_does_not_change_what_is_fetched(
    hub: HubServer, repository: Repository, tmp_path: Path
) -> None:
    source = parse_source("hf:org/model/config.json")
    entry = resolve(source)
    hub.repositories["org/model"] = Repository({**FILES, "config.json": b"{}"}, LFS)
    with pytest.raises(InputError, match="HTTP 404"):
        fetch(source, tmp_path, entry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:org/other/config.json", "no repository org/other .* set HF_TOKEN"),
        ("hf:org/model@v9/config.json", "org/model has no revision v9"),
        ("hf:org/model/other.json", "no file of org/model at main matches other.json"),
        ("hf:org/model/*.gguf", r"no file of org/model at main matches \*.gguf"),
    ],
)
@pytest.mark.usefixtures("repository")
def test_not_there(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(parse_source(text))


def test_a_revision_by_commit(repository: Repository) -> None:
    entry = resolve(parse_source(f"hf:org/model@{repository.commit}/config.json"))
    assert entry.revision == repository.commit


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("../evil.txt", ".*/evil.txt"),
        ("a/../../evil.txt", "a/.?/.?/*"),
        ("/etc/evil.txt", "*/*/*.txt"),
        ("a\\b.txt", "*.txt"),
    ],
)
def test_a_file_name_that_leads_elsewhere(hub: HubServer, name: str, pattern: str) -> None:
    hub.repositories["org/model"] = Repository({name: b"evil"})
    with pytest.raises(InputError, match="not plain"):
        resolve(parse_source(f"hf:org/model/{pattern}"))


def test_a_private_repository(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.repositories["org/model"] = Repository(FILES, LFS, token="hf_secret")
    source = parse_source(f"hf:org/model/{SHARD}")
    with pytest.raises(InputError, match="set HF_TOKEN"):
        resolve(source)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetched = fetch(source, tmp_path, resolve(source))
    assert fetched.path.read_bytes() == SHARDS[SHARD]
    assert [request.authorization for request in hub.requests(CONTENT)] == [None], "not for another host"


def test_a_gated_repository(hub: HubServer) -> None:
    hub.repositories["org/model"] = Repository(FILES, LFS, token="hf_secret", gated=True)
    with pytest.raises(InputError, match="accept its terms"):
        resolve(parse_source("hf:org/model/config.json"))


def test_no_answer(hub: HubServer, repository: Repository) -> None:
    hub.refusals["/api/models/org/model/revision/main"] = [500] * 20
    with pytest.raises(InputError, match="gave no answer"):
        resolve(parse_source("hf:org/model/config.json"))


def test_offline(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    source = parse_source(f"hf:org/model/{SHARD}")
    entry = resolve(source)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        resolve(source)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        fetch(source, tmp_path / "out", entry)
    cached = tmp_path / "hub-cache/models--org--model/snapshots" / repository.commit / SHARD
    cached.parent.mkdir(parents=True)
    cached.write_bytes(SHARDS[SHARD])
    assert fetch(source, tmp_path / "out", entry).path.read_bytes() == SHARDS[SHARD]
    assert hub.log == []


def test_a_damaged_cache_is_not_used(hub: HubServer, repository: Repository, tmp_path: Path) -> None:
    source = parse_source(f"hf:org/model/{SHARD}")
    entry = resolve(source)
    cached = tmp_path / "hub-cache/models--org--model/snapshots" / repository.commit / SHARD
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"X" * len(SHARDS[SHARD]))
    assert fetch(source, tmp_path / "out", entry).path.read_bytes() == SHARDS[SHARD]
    assert cached.read_bytes() == b"X" * len(SHARDS[SHARD])


def test_globs() -> None:
    paths = [".hidden", "a.txt", "b.bin", "sub/.hidden", "sub/c.txt", "sub/deep/d.txt"]
    assert _select("*", paths) == ["a.txt", "b.bin"]
    assert _select("?.txt", paths) == ["a.txt"]
    assert _select("*/*", paths) == ["sub/c.txt"]
    assert _select("sub/*.txt", paths) == ["sub/c.txt"]
    assert _select(".*", paths) == [".hidden"]
    assert _select("a.txt", paths) == ["a.txt"]
    assert _select("a.tx", paths) == []


@pytest.mark.parametrize("xet", ["0", "1"], ids=["with-xet", "xet-disabled"])
def test_the_environment_is_respected(hub: HubServer, tmp_path: Path, xet: str) -> None:
    """HF_ENDPOINT and HF_TOKEN are read when huggingface_hub is imported, so this needs a fresh process."""
    hub.repositories["org/model"] = Repository(FILES, LFS, xet=True, token="hf_secret")
    code = (
        "import sys; from pathlib import Path; from driftscope.artifacts.lock import *\n"
        "config, text = Path(sys.argv[1]), 'hf:org/model/*'\n"
        "lock_config({'teacher': text}, config)\n"
        "print(fetch_model('teacher', text, config, config.parent / 'out').path)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": xet}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "case.yaml")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}\n", "the library prints nothing of its own"
    assert (tmp_path / "out" / SHARD).read_bytes() == SHARDS[SHARD]


def test_the_server_speaks_the_protocol_of_huggingface_hub(hub: HubServer, tmp_path: Path) -> None:
    """The library's own listing and download work against the test server."""
    from huggingface_hub import HfApi, hf_hub_download

    hub.repositories["org/model"] = Repository(FILES, LFS)
    api = HfApi(endpoint=hub.url)
    assert sorted(api.list_repo_files("org/model")) == sorted(FILES)
    tree = {entry.path: entry.size for entry in api.list_repo_tree("org/model", recursive=True)}
    assert tree == {name: len(data) for name, data in FILES.items()}
    (info,) = api.get_paths_info("org/model", [SHARD])
    assert info.lfs is not None
    assert info.lfs.sha256 == hashlib.sha256(SHARDS[SHARD]).hexdigest()
    for name in (SHARD, "config.json"):
        path = hf_hub_download("org/model", name, endpoint=hub.url, local_dir=tmp_path / "local")
        assert Path(path).read_bytes() == FILES[name]
