"""`file:path`: an artifact that is already on this machine, a file or a folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from driftscope.artifacts.files import member
from driftscope.artifacts.sources.entry import LockedFile, LockEntry, Progress, is_plain_name, refuse
from driftscope.artifacts.sources.verify import pin_file


@dataclass(frozen=True)
class FileSource:
    """A file or folder at `target`, an absolute path."""

    text: str
    target: Path

    def resolve(self, staging: Path, progress: Progress | None) -> LockEntry:
        """Pin the file, or every file of the folder that is not hidden, in the order of their names."""
        files = self._files()
        total = sum(path.stat().st_size for _, path in files)
        pinned: list[LockedFile] = []
        for name, path in files:
            pinned.append(pin_file(path, name))
            if progress is not None:
                progress(sum(file.bytes for file in pinned), total)
        return LockEntry(source=self.text, files=tuple(pinned))

    def obtain(self, file: LockedFile, entry: LockEntry, part: Path, progress: Progress | None) -> None:
        """Link to the file; a model is large and is not copied where the file system can link."""
        origin = self.target / PurePosixPath(file.name) if self.target.is_dir() else self.target
        if not origin.is_file():
            raise refuse(self.text, f"no file {origin}")
        part.unlink(missing_ok=True)
        try:
            part.symlink_to(origin)
        except OSError:
            shutil.copyfile(origin, part)
        if progress is not None:
            progress(file.bytes, file.bytes)

    def _files(self) -> list[tuple[str, Path]]:
        if self.target.is_file():
            if not is_plain_name(self.target.name):
                raise refuse(self.text, "the file's name has characters that are not allowed")
            return [(self.target.name, self.target)]
        if not self.target.is_dir():
            raise refuse(self.text, f"no file or folder {self.target}")
        found = []
        for path in sorted(self.target.rglob("*")):
            name = path.relative_to(self.target).as_posix()
            if any(part.startswith(".") for part in name.split("/")) or not path.is_file():
                continue
            if not is_plain_name(name):
                raise refuse(self.text, f"the file name {name!r} has characters that are not allowed")
            member(self.target, name)
            found.append((name, path))
        if not found:
            raise refuse(self.text, f"the folder {self.target} holds no files")
        return found


def parse(text: str, body: str, base: Path) -> FileSource:
    """Parse `file:path`; a relative path starts at `base`.

    Raises:
        InputError: no path is given.
    """
    if not body.strip() or "\0" in body:
        raise refuse(text, "expected file:path, relative to the configuration file or absolute")
    return FileSource(text, (base / Path(body).expanduser()).absolute())
