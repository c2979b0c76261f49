"""`hf:org/repo[@revision]/file-or-glob`: files of a model repository on the Hugging Face Hub.

huggingface_hub resolves revisions, lists files and knows the endpoint, the token and the local cache
(`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`). The bytes themselves come over plain HTTP, which
the Hub serves for Xet-backed files as well: huggingface_hub drops a partial file when its process ends,
and a download of many gigabytes must survive that.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from driftscope.artifacts.sources.entry import LockedFile, LockEntry, Progress, is_plain_name, refuse
from driftscope.artifacts.sources.http import download
from driftscope.artifacts.sources.verify import matches, pin_file
from driftscope.errors import InputError

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_FORM = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^/@\s]+))?/(?P<pattern>[^\s].*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True)
class HubSource:
    """The files of `repo` at `revision` that `pattern` names: one path, or a glob."""

    text: str
    repo: str
    revision: str
    pattern: str

    @property
    def prefix(self) -> str:
        """The folder of the repository that names are relative to: the pattern's part without wildcards."""
        parts = self.pattern.split("/")[:-1]
        fixed = next((i for i, part in enumerate(parts) if _is_glob(part)), len(parts))
        return "".join(f"{part}/" for part in parts[:fixed])

    def resolve(self, staging: Path, progress: Progress | None) -> LockEntry:
        """Pin the commit and the files; those outside LFS have no SHA-256 on the Hub and are downloaded."""
        commit, listed = self._list()
        chosen = _select(self.pattern, sorted(listed))
        if not chosen:
            raise refuse(self.text, f"no file of {self.repo} at {self.revision} matches {self.pattern}")
        files = []
        for path in chosen:
            name = path.removeprefix(self.prefix)
            if not is_plain_name(path):
                raise refuse(self.text, f"the Hub lists the file name {path!r}, which is not plain")
            lfs = listed[path]
            if lfs is None:
                part = staging / "download"
                part.unlink(missing_ok=True)
                self._download(path, commit, part, None, progress)
                files.append(pin_file(part, name))
            else:
                files.append(LockedFile(name=name, bytes=lfs[0], sha256=lfs[1]))
        return LockEntry(source=self.text, revision=commit, files=tuple(files))

    def obtain(self, file: LockedFile, entry: LockEntry, part: Path, progress: Progress | None) -> None:
        """Take the file from the local Hub cache, or download it, continuing from what `part` holds."""
        from huggingface_hub import constants, try_to_load_from_cache

        commit = entry.revision or ""
        if not _COMMIT.fullmatch(commit):
            raise refuse(self.text, "the lock file gives no commit for it; run `driftscope lock`")
        path = self.prefix + file.name
        cached = try_to_load_from_cache(self.repo, path, revision=commit)
        if isinstance(cached, str) and matches(Path(cached), file):
            part.unlink(missing_ok=True)
            _link_or_copy(Path(cached).resolve(), part)
            if progress is not None:
                progress(file.bytes, file.bytes)
            return
        if constants.HF_HUB_OFFLINE:
            raise refuse(self.text, f"{path} is not in the local Hub cache and HF_HUB_OFFLINE is set")
        self._download(path, commit, part, file.bytes, progress)

    def _download(
        self, path: str, commit: str, part: Path, expected_bytes: int | None, progress: Progress | None
    ) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo, path, revision=commit, endpoint=constants.ENDPOINT)
        headers = {key: value for key, value in build_hf_headers().items() if isinstance(value, str)}
        download(url, part, expected_bytes=expected_bytes, headers=headers, progress=progress)

    def _list(self) -> tuple[str, dict[str, tuple[int, str] | None]]:
        """Return the commit, and by path the LFS size in bytes and SHA-256, or None outside LFS."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if constants.HF_HUB_OFFLINE:
            raise refuse(self.text, "a revision cannot be looked up while HF_HUB_OFFLINE is set")
        api = HfApi(endpoint=constants.ENDPOINT)
        try:
            info = api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=60)
        except GatedRepoError as error:
            raise refuse(
                self.text, f"access to {self.repo} is restricted: accept its terms, set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise refuse(
                self.text, f"no repository {self.repo} at {api.endpoint}, or it is private: set HF_TOKEN"
            ) from error
        except RevisionNotFoundError as error:
            raise refuse(self.text, f"{self.repo} has no revision {self.revision}") from error
        except Exception as error:  # the transport's own exceptions differ between versions of the library
            raise refuse(self.text, f"{api.endpoint} gave no answer: {_one_line(error)}") from error
        return _read_listing(self.text, info)


def parse(text: str, body: str, base: Path) -> HubSource:
    """Parse `hf:org/repo[@revision]/file-or-glob`; the revision defaults to `main`, a `/` in it is `%2F`.

    Raises:
        InputError: it is not of that form.
    """
    match = _FORM.fullmatch(body)
    if match is None:
        raise refuse(text, "expected hf:org/repo[@revision]/file-or-glob")
    pattern = match["pattern"]
    if not is_plain_name(re.sub(r"[*?]", "x", pattern)):
        raise refuse(text, f"{pattern!r} is not a plain path or glob")
    return HubSource(text, match["repo"], unquote(match["revision"] or "main"), pattern)


def _read_listing(text: str, info: Any) -> tuple[str, dict[str, tuple[int, str] | None]]:
    commit = info.sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise refuse(text, f"the Hub gave the commit {commit!r}")
    listed: dict[str, tuple[int, str] | None] = {}
    for sibling in info.siblings or []:
        lfs = sibling.lfs
        if lfs is None:
            listed[str(sibling.rfilename)] = None
        elif isinstance(lfs.size, int) and lfs.size >= 0 and _SHA256.fullmatch(str(lfs.sha256)):
            listed[str(sibling.rfilename)] = (lfs.size, lfs.sha256)
        else:
            raise refuse(text, f"the Hub gives no usable size and sha256 for {sibling.rfilename!r}")
    return commit, listed


def _is_glob(text: str) -> bool:
    return "*" in text or "?" in text


def _select(pattern: str, paths: list[str]) -> list[str]:
    """Return the paths that `pattern` names; as in a shell, `*` and `?` match no `/` and no leading dot."""
    if not _is_glob(pattern):
        return [path for path in paths if path == pattern]
    expression = "/".join(_segment(part) for part in pattern.split("/"))
    return [path for path in paths if re.fullmatch(expression, path)]


def _segment(part: str) -> str:
    wild = "".join("[^/]*" if c == "*" else "[^/]" if c == "?" else re.escape(c) for c in part)
    return rf"(?!\.){wild}" if part[:1] in {"*", "?"} else wild


def _link_or_copy(origin: Path, target: Path) -> None:
    try:
        os.link(origin, target)
    except OSError:
        try:
            shutil.copyfile(origin, target)
        except OSError as error:
            raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
