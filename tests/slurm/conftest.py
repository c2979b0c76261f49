"""Tests marked `slurm` run only when asked for, by `pytest -m slurm`; else they count as deselected."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tests.slurm.one_node import OneNode, one_node


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, visibly, what needs Slurm's daemons, unless the marker expression names it."""
    if re.search(r"\bslurm\b", config.getoption("markexpr")):
        return
    left_out = [item for item in items if item.get_closest_marker("slurm")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneNode]:
    """A Slurm of this one machine, in a folder of its own; its clients' environment is set."""
    with one_node(tmp_path_factory.mktemp("slurm")) as node, pytest.MonkeyPatch.context() as patch:
        for name, value in node.environment.items():
            patch.setenv(name, value)
        yield node
