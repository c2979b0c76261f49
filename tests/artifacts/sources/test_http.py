from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.helpers.hub_server import HubServer

from driftscope.artifacts.sources import http
from driftscope.artifacts.sources.http import ATTEMPTS, download
from driftscope.errors import InputError

DATA = random.Random(1).randbytes(300_000)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "a.part"


def test_download(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    seen: list[tuple[int, int]] = []
    download(f"{server.url}/a", part, progress=lambda done, total: seen.append((done, total)))
    assert part.read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))


def test_a_cut_is_continued_with_the_rest_only(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    server.cuts["/a"] = [100_000]
    download(f"{server.url}/a", part)
    assert part.read_bytes() == DATA
    first, second = server.requests("/a")
    assert (first.range, first.status, first.sent) == (None, 200, 100_000)
    assert (second.range, second.status, second.sent) == ("bytes=100000-", 206, 200_000)


def test_cut_twice(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    server.cuts["/a"] = [100_000, 150_000]
    download(f"{server.url}/a", part, expected_bytes=len(DATA))
    assert part.read_bytes() == DATA
    assert [request.range for request in server.requests("/a")] == [None, "bytes=100000-", "bytes=250000-"]
    assert sum(request.sent for request in server.requests("/a")) == len(DATA)


def test_a_later_process_continues(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    part.write_bytes(DATA[:123_456])
    download(f"{server.url}/a", part)
    assert part.read_bytes() == DATA
    (only,) = server.requests("/a")
    assert (only.range, only.sent) == ("bytes=123456-", len(DATA) - 123_456)


def test_a_server_without_ranges_starts_over(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    server.ranges = False
    server.cuts["/a"] = [100_000]
    download(f"{server.url}/a", part)
    assert part.read_bytes() == DATA
    assert [(request.range, request.status) for request in server.requests("/a")] == [
        (None, 200),
        ("bytes=100000-", 200),
    ]


def test_a_server_that_announces_no_length(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    server.announce_length = False
    server.cuts["/a"] = [100_000]
    download(f"{server.url}/a", part, expected_bytes=len(DATA))
    assert part.read_bytes() == DATA


def test_retries_are_bounded_and_keep_what_came(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    server.cuts["/a"] = [1000] * 100
    with pytest.raises(InputError, match="6000 bytes are kept, run again to continue"):
        download(f"{server.url}/a", part)
    assert len(server.requests("/a")) == ATTEMPTS
    assert part.read_bytes() == DATA[:6000]


def test_a_download_that_gets_on_is_not_given_up(
    server: HubServer, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_HEADWAY", 10_000)
    server.static["/a"] = DATA
    server.cuts["/a"] = [20_000] * 14
    download(f"{server.url}/a", part)
    assert part.read_bytes() == DATA


def test_a_complete_part_asks_for_nothing(server: HubServer, part: Path) -> None:
    part.write_bytes(DATA)
    download(f"{server.url}/a", part, expected_bytes=len(DATA))
    assert server.log == []


@pytest.mark.parametrize("expected", [len(DATA), None])
def test_a_part_longer_than_the_file_starts_over(server: HubServer, part: Path, expected: int | None) -> None:
    server.static["/a"] = DATA
    part.write_bytes(DATA + b"more")
    download(f"{server.url}/a", part, expected_bytes=expected)
    assert part.read_bytes() == DATA


def test_an_empty_file(server: HubServer, part: Path) -> None:
    server.static["/a"] = b""
    download(f"{server.url}/a", part, expected_bytes=0)
    assert part.read_bytes() == b""


def test_busy_servers_are_asked_again(server: HubServer, part: Path) -> None:
    server.static["/a"] = DATA
    server.refusals["/a"] = [503, 429, 500]
    download(f"{server.url}/a", part)
    assert part.read_bytes() == DATA


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(server: HubServer, part: Path, status: int) -> None:
    server.refusals["/a"] = [status] * 9
    with pytest.raises(InputError, match=f"/a: HTTP {status}"):
        download(f"{server.url}/a?signature=secret", part)
    assert len(server.log) == 1


def test_nobody_listens(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.0)
    with pytest.raises(InputError, match="after 6 attempts"):
        download("http://127.0.0.1:9/a", part)


def test_far_too_much_is_refused(server: HubServer, part: Path) -> None:
    server.static["/a"] = bytes(4 << 20)
    with pytest.raises(InputError, match="far above the pinned size"):
        download(f"{server.url}/a", part, expected_bytes=10)


def test_a_redirect_to_another_host_carries_no_token(server: HubServer, part: Path) -> None:
    server.static |= {"/b": DATA, "/c": DATA}
    server.moved |= {"/a": f"{server.content_url}/b", "/near": f"{server.url}/c"}
    headers = {"Authorization": "Bearer secret"}
    download(f"{server.url}/a", part, headers=headers)
    assert server.requests("/a")[0].authorization == "Bearer secret"
    assert server.requests("/b")[0].authorization is None
    part.unlink()
    download(f"{server.url}/near", part, headers=headers)
    assert server.requests("/c")[0].authorization == "Bearer secret"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:text/plain,a"])
def test_a_redirect_to_another_scheme_is_refused(server: HubServer, part: Path, target: str) -> None:
    server.moved["/a"] = target
    with pytest.raises(InputError):
        download(f"{server.url}/a", part)
    assert not part.exists()


def test_a_full_disk(server: HubServer) -> None:
    server.static["/a"] = DATA
    with pytest.raises(InputError, match="/dev/full: cannot be written: No space left on device"):
        http._transfer(f"{server.url}/a", Path("/dev/full"), 0, None, {}, None)
