"""One workbench for all tests of the benchmark: its models are written once."""

from __future__ import annotations

import pytest

from driftscope.faultbench.subjects import Workbench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("faultbench"))
