"""Times, hosts and versions, kept beside the evidence so that the evidence repeats byte for byte."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

from driftscope.evidence.atomic import write_text

_STARTED = time.time()
_PACKAGES = ("driftscope", "numpy", "numba", "gguf", "safetensors", "polars")

_device: dict[str, str] = {"kind": "cpu", "name": ""}


def note_device(kind: str, name: str) -> None:
    """Say what this process runs its kernels on: ``cpu`` or ``cuda``, and the card's name."""
    _device.update(kind=kind, name=name)


def provenance_path(path: Path) -> Path:
    """Return where the provenance of the evidence file `path` is kept."""
    return path.with_name(f"{path.name}.provenance.json")


def write_provenance(path: Path) -> None:
    """Record when, where and with which versions the evidence file `path` was made."""
    document = {
        "file": path.name,
        "finished_unix_seconds": time.time(),
        "process_seconds": time.time() - _STARTED,
        "host": platform.node(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "device": dict(_device),
        "packages": {name: version(name) for name in _PACKAGES},
    }
    write_text(provenance_path(path), json.dumps(document, indent=1) + "\n")
