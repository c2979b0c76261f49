"""Which lines of the readers an input reaches: what tells a new kind of input from one more of the same."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import driftscope.artifacts

_FOLDER = str(Path(driftscope.artifacts.__file__).parent)


class Lines:
    """Counts the lines of `driftscope.artifacts` that have run, each once.

    A function whose every line has run is no longer traced, so that the price falls as the run goes on.
    """

    def __init__(self) -> None:
        self._unseen: dict[CodeType, set[int]] = {}
        self.count = 0

    def __enter__(self) -> Lines:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        unseen = self._unseen.get(code)
        if unseen is None:
            ours = code.co_filename.startswith(_FOLDER)
            unseen = {line for _, _, line in code.co_lines() if line} if ours else set()
            self._unseen[code] = unseen
        return self._line if unseen else None

    def _line(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        unseen = self._unseen[frame.f_code]
        if frame.f_lineno in unseen:
            unseen.discard(frame.f_lineno)
            self.count += 1
        return self._line
