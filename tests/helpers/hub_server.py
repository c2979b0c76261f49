"""A loopback server that speaks the Hub's protocol as huggingface_hub uses it, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-")


@dataclass
class Repository:
    """A model repository at one commit. Files in `lfs` have a SHA-256 and come from another host."""

    files: dict[str, bytes]
    lfs: frozenset[str] = frozenset()
    xet: bool = False
    token: str | None = None
    gated: bool = False

    @property
    def commit(self) -> str:
        """The commit, made from the content as Git would: 40 hexadecimal digits."""
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.files.items())
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """What the Hub's API says about a file, as in a tree listing."""
        data = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name in self.lfs:
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
            if self.xet:
                entry["xetHash"] = digest
        return entry


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; `sent` counts the bytes of the body."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    authorization: str | None


@dataclass
class HubServer:
    """The Hub, a content host that its LFS redirects lead to, and plain files; a context manager.

    Attributes:
        repositories: by `org/name`.
        static: plain files by path, e.g. `/model.gguf`.
        ranges: whether Range requests are honoured.
        cuts: by path as requested, the bodies to cut and after how many bytes, first come first served.
        refusals: by path, statuses to answer with before anything else.
        moved: by path, where to redirect to.
        tampered: by path, a body to send in place of the true one.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    static: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    announce_length: bool = True
    cuts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    refusals: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    moved: dict[str, str] = field(default_factory=dict)
    tampered: dict[str, bytes] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self)) for _ in range(2)]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """The Hub's address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def content_url(self) -> str:
        """The address of the host that LFS files come from."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def requests(self, path: str, method: str = "GET") -> list[Request]:
        """The requests so far for a path."""
        return [request for request in self.log if (request.path, request.method) == (path, method)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean; `HubServer.log` has it all."""

    def do_HEAD(self) -> None:
        self._route()

    do_GET = do_POST = do_HEAD  # noqa: N815

    def _route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.refusals[path]:
            self._answer(self.hub.refusals[path].pop(0), {}, b"")
        elif path in self.hub.moved:
            self._answer(302, {"Location": self.hub.moved[path]}, b"")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree|paths-info)/(.+?)/?", url.path):
            self._api(match[1], match[2], unquote(match[3]), parse_qs(url.query), body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        elif path.startswith("/content/"):
            digest = path.removeprefix("/content/")
            for repository in self.hub.repositories.values():
                for data in repository.files.values():
                    if hashlib.sha256(data).hexdigest() == digest:
                        self._file(path, data, {"ETag": f'"{digest}"'})
                        return
            self._answer(404, {}, b"")
        elif path in self.hub.static:
            self._file(path, self.hub.static[path], {})
        else:
            self._answer(404, {}, b"")

    def _find(self, name: str, revision: str) -> Repository | None:
        """The repository, after answering if it cannot be used."""
        repository = self.hub.repositories.get(name)
        token = repository.token if repository else None
        if repository is None or (
            token and self.headers.get("Authorization") != f"Bearer {token}" and not repository.gated
        ):
            self._answer(401, {"X-Error-Code": "RepoNotFound"}, b"")
        elif repository.gated and self.headers.get("Authorization") != f"Bearer {token}":
            self._answer(403, {"X-Error-Code": "GatedRepo"}, b"")
        elif revision not in {"main", repository.commit}:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        else:
            return repository
        return None

    def _api(self, name: str, verb: str, revision: str, query: dict[str, list[str]], body: bytes) -> None:
        repository = self._find(name, revision.partition("/")[0])
        if repository is None:
            return
        entries = [repository.entry(path) for path in repository.files]
        if verb == "paths-info":
            wanted = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            document: Any = [entry for entry in entries if entry["path"] in wanted]
        elif verb == "tree":
            document = entries
        else:
            siblings = []
            for entry in entries:
                sibling = {"rfilename": entry["path"]}
                if "blobs" in query:
                    sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                    if "lfs" in entry:
                        lfs = entry["lfs"]
                        sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}
                siblings.append(sibling)
            document = {"_id": "0", "id": name, "modelId": name, "sha": repository.commit}
            document |= {"private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit}
        if path not in repository.files:
            self._answer(404, {**headers, "X-Error-Code": "EntryNotFound"}, b"")
            return
        data = repository.files[path]
        entry = repository.entry(path)
        if "lfs" in entry:
            digest = entry["lfs"]["oid"]
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"{self.hub.content_url}/content/{digest}?signature=secret"
            if repository.xet:
                refresh = f"{self.hub.url}/api/models/{name}/xet-read-token/{repository.commit}"
                headers |= {"X-Xet-Hash": digest, "Link": f'<{refresh}>; rel="xet-auth"'}
            self._answer(302, headers, b"")
        else:
            self._file(unquote(urlsplit(self.path).path), data, {**headers, "ETag": f'"{entry["oid"]}"'})

    def _file(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        data = self.hub.tampered.get(path, data)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match and self.hub.ranges:
            start = int(match[1])
            if start >= len(data):
                self._answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
                return
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206, {**headers, "Content-Range": span}, data[start:], path)
        else:
            accept = {"Accept-Ranges": "bytes"} if self.hub.ranges else {}
            self._answer(200, {**headers, **accept}, data, path)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut_key: str = "") -> None:
        cuts = self.hub.cuts[cut_key] if cut_key and self.command == "GET" else []
        sent = body if self.command != "HEAD" else b""
        cut = cuts.pop(0) if cuts else None
        if cut is not None:
            sent = sent[:cut]
        path = unquote(urlsplit(self.path).path)
        seen = (self.headers.get("Range"), status, len(sent), self.headers.get("Authorization"))
        self.hub.log.append(Request(self.command, path, *seen))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if self.hub.announce_length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(sent)
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
