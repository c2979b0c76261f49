"""A download over HTTP that continues where it was cut, in this process or in a later one."""

from __future__ import annotations

import http.client
import ipaddress
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from driftscope.artifacts.sources.entry import Progress
from driftscope.errors import InputError

ATTEMPTS = 6
"""Requests in a row that may fail without `_HEADWAY` new bytes before the download is given up."""

FIRST_PAUSE = 0.5
"""Seconds before the first retry; doubled for each further one, at most `_LONGEST_PAUSE`."""

_LONGEST_PAUSE = 16.0
_TIMEOUT = 60.0
_CHUNK_BYTES = 1 << 20
_HEADWAY = 1 << 20
_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class _CutError(Exception):
    """The transfer stopped before its end; another request may get further."""


def is_loopback(host: str) -> bool:
    """Tell whether `host` names this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def download(
    url: str,
    part: Path,
    *,
    expected_bytes: int | None = None,
    headers: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Bring the whole of `url` into `part`.

    What `part` already holds is kept and the rest is asked for with a Range request; a server that
    answers with the whole file makes the download start over. A transfer that is cut is continued, a
    bounded number of times. The content is not judged here: the caller verifies it.

    Args:
        url: an http or https address.
        part: the partial file; it stays where it is if the download fails.
        expected_bytes: the pinned size; a `part` of that size is complete and nothing is requested. A
            body longer than twice this is refused, so that a wrong server cannot fill the disk.
        headers: sent with the request; `Authorization` is not sent on to another host.
        progress: called as the bytes arrive.

    Raises:
        InputError: the server refuses, cannot be reached, or keeps cutting; the disk is full.
    """
    shown = url.partition("?")[0]
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        if expected_bytes is not None and before == expected_bytes and part.exists():
            return
        if expected_bytes is not None and before > expected_bytes:
            part.unlink()
            before = 0
        try:
            _transfer(url, part, before, expected_bytes, headers or {}, progress)
            return
        except _CutError as cut:
            after = part.stat().st_size if part.exists() else 0
            failures = 1 if after - before >= _HEADWAY else failures + 1
            if failures >= ATTEMPTS:
                kept = f"; {after} bytes are kept, run again to continue" if after else ""
                raise InputError(f"{shown}: download failed after {failures} attempts: {cut}{kept}") from cut
        time.sleep(min(FIRST_PAUSE * 2 ** (failures - 1), _LONGEST_PAUSE))


def _transfer(
    url: str,
    part: Path,
    start: int,
    expected_bytes: int | None,
    headers: Mapping[str, str],
    progress: Progress | None,
) -> None:
    """Make one request for the bytes from `start` on and append them to `part`."""
    shown = url.partition("?")[0]
    request = urllib.request.Request(url, headers={**headers, "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = _opener(url).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and start:
                # The partial file is not a beginning of what the server has now.
                part.unlink()
                raise _CutError("the server has nothing from there on") from error
            if error.code in _RETRIED_STATUS:
                raise _CutError(f"HTTP {error.code} {error.reason}") from error
            raise InputError(f"{shown}: HTTP {error.code} {error.reason}{_hint(error.code)}") from error
    except ValueError as error:
        raise InputError(f"{shown}: not an address that can be requested: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise InputError(f"{shown}: {reason.verify_message or reason}") from error
        raise _CutError(str(reason) or type(error).__name__) from error
    with response:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InputError(f"{shown}: the server sends a compressed body that was not asked for")
        begin, total = _span(response, start)
        if begin not in {0, start}:
            raise InputError(f"{shown}: the server answered with bytes from {begin}, not from {start}")
        limit = None if expected_bytes is None else 2 * expected_bytes + _HEADWAY
        try:
            with part.open("r+b" if begin else "wb") as stream:
                stream.seek(begin)
                done = _copy(response, stream, begin, total or expected_bytes or 0, limit, shown, progress)
        except OSError as error:
            raise InputError(f"{part}: cannot be written: {error.strerror or error}") from error
    wanted = total if total is not None else expected_bytes
    if wanted is not None and done < wanted:
        raise _CutError(f"connection closed after {done} of {wanted} bytes")


def _copy(
    response: Any,
    stream: IO[bytes],
    done: int,
    total: int,
    limit: int | None,
    shown: str,
    progress: Progress | None,
) -> int:
    """Copy the body to `stream` and return the size reached; a read error is a cut, a write error is not."""
    while True:
        try:
            chunk = response.read(_CHUNK_BYTES)
        except http.client.IncompleteRead as error:
            stream.write(error.partial)
            stream.flush()
            raise _CutError("connection closed in the middle") from error
        except (OSError, http.client.HTTPException) as error:
            stream.flush()
            raise _CutError(str(error) or type(error).__name__) from error
        if not chunk:
            return done
        stream.write(chunk)
        done += len(chunk)
        if limit is not None and done > limit:
            raise InputError(f"{shown}: the server sends more than {limit} bytes, far above the pinned size")
        if progress is not None:
            progress(done, max(total, done))


def _span(response: Any, start: int) -> tuple[int, int | None]:
    """Return the offset of the body's first byte and the size of the whole file, if announced."""
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if match:
            return int(match[1]), None if match[2] == "*" else int(match[2])
        return start, None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _hint(status: int) -> str:
    return "; is a token or an accepted licence needed?" if status in {401, 403} else ""


class _CarefulRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but never from https to anything else and never with a token to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme != "https" and old.scheme != new.scheme:
            raise InputError(f"{req.full_url.partition('?')[0]}: redirects to {new.scheme}, https is needed")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            following.remove_header("Authorization")
        return following


def _opener(url: str) -> urllib.request.OpenerDirector:
    handlers: list[urllib.request.BaseHandler] = [_CarefulRedirects()]
    if is_loopback(urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy would reach its own loopback
    return urllib.request.build_opener(*handlers)
