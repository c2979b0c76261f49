"""`https://…`: one file from a web server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from driftscope.artifacts.sources.entry import LockedFile, LockEntry, Progress, is_plain_name, refuse
from driftscope.artifacts.sources.http import download, is_loopback
from driftscope.artifacts.sources.verify import pin_file


@dataclass(frozen=True)
class HttpsSource:
    """The file `name` at the address `text`."""

    text: str
    name: str

    def resolve(self, staging: Path, progress: Progress | None) -> LockEntry:
        """Download the file and pin what arrived."""
        part = staging / "download"
        download(self.text, part, progress=progress)
        return LockEntry(source=self.text, files=(pin_file(part, self.name),))

    def obtain(self, file: LockedFile, entry: LockEntry, part: Path, progress: Progress | None) -> None:
        """Download the file, continuing from what `part` holds."""
        download(self.text, part, expected_bytes=file.bytes, progress=progress)


def parse(text: str, body: str, base: Path) -> HttpsSource:
    """Parse an https address; http is accepted for this machine only.

    Raises:
        InputError: another scheme, no host, credentials in the address, a fragment, no file name.
    """
    try:
        url = urlsplit(text)
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise refuse(text, f"not an address: {error}") from error
    if url.scheme == "http" and not is_loopback(host or ""):
        raise refuse(text, "plain http is not accepted; use https")
    if not host or not text.isascii() or not text.isprintable() or " " in text:
        raise refuse(text, "expected https://host/path/file, in ASCII with anything else percent-encoded")
    if url.username is not None or url.password is not None:
        raise refuse(text, "credentials do not belong in an address")
    if url.fragment:
        raise refuse(text, "an address with a #fragment is not accepted")
    name = unquote(url.path.rpartition("/")[2])
    if "/" in name or not is_plain_name(name):
        raise refuse(text, "the address must end in a file name")
    return HttpsSource(text, name)
