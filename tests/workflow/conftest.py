"""One finished case, from which every test takes a copy."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from tests.workflow.case import Case


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Case:
    """The case after a complete run; several test processes share it. Not to be changed."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    folder = shared / "finished-case"
    with Path(shared / "finished-case.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mark = shared / "finished-case.done"
        if not mark.is_file():
            case = Case.create(folder)
            done = case.run()
            assert done.returncode == 0, done.stdout + done.stderr
            mark.touch()
    return Case(folder)


@pytest.fixture
def case(finished: Case, tmp_path: Path) -> Case:
    """A finished case of the test's own."""
    return finished.copy(tmp_path / "case")
