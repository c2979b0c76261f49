"""Floors for a person at the command line: calibrated once for each version of the code, and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from driftscope.analysis.floors import Floors
from driftscope.artifacts.files import read_json_object
from driftscope.errors import InputError
from driftscope.evidence.atomic import write_text
from driftscope.evidence.digest import code_digest


def kept_floors(progress: Callable[[int, int], None] = lambda done, total: None) -> Floors:
    """The calibrated floors of this version, from the user's cache where they are there.

    A cache that cannot be read or written costs a calibration and is no error. What is kept has the bytes
    that a calibration gives: the name of the file is the digest of the code that decides them.
    """
    file = _folder() / f"{code_digest('floors')}.json"
    with suppress(InputError):
        return Floors.from_dict(read_json_object(file), str(file))
    from driftscope.analysis.calibration import calibrate

    floors = calibrate(progress=progress)
    with suppress(InputError):
        write_text(file, json.dumps(floors.to_dict()) + "\n")
    return floors


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "driftscope" / "floors"
