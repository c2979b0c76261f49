"""What the tests of judging share."""

from __future__ import annotations

import pytest

from driftscope.analysis.calibration import calibrate
from driftscope.analysis.floors import Floors


@pytest.fixture(scope="session")
def floors() -> Floors:
    """The floors of a calibration."""
    return calibrate()
