from __future__ import annotations

import os
import threading

import pytest

from driftscope.kernels.parallel import over_rows


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("n_rows", "grain"), [(0, 1), (1, 4), (17, 4), (100, 1), (100, 33)])
def test_every_row_once_in_ranges_that_begin_at_the_grain(threads: int, n_rows: int, grain: int) -> None:
    ranges: list[tuple[int, int]] = []
    over_rows(lambda first, end: ranges.append((first, end)), n_rows, threads=threads, grain=grain)
    assert sorted(row for first, end in ranges for row in range(first, end)) == list(range(n_rows))
    assert all(first % grain == 0 for first, _ in ranges)


def test_threads_work_at_once_and_are_kept() -> None:
    barrier = threading.Barrier(3, timeout=20)
    seen: list[set[int]] = []
    for _ in range(2):
        workers: set[int] = set()

        def work(first: int, end: int, workers: set[int] = workers) -> None:
            if threading.get_ident() not in workers:
                workers.add(threading.get_ident())
                barrier.wait()

        over_rows(work, 3, threads=3, grain=1)
        seen.append(workers)
        assert len(workers) == 3
    assert threading.get_ident() in seen[0] & seen[1]


def test_calls_within_calls_come_to_an_end() -> None:
    rows: list[int] = []

    def outer(first: int, end: int) -> None:
        over_rows(lambda a, b: rows.extend(range(a, b)), 4, threads=2)

    over_rows(outer, 16, threads=2, grain=2)
    assert len(rows) % 4 == 0
    assert len(rows) > 0


@pytest.mark.parametrize("failing", [0, 99])
def test_an_error_reaches_the_caller(failing: int) -> None:
    def work(first: int, end: int) -> None:
        if first <= failing < end:
            raise ValueError(f"row {failing}")

    with pytest.raises(ValueError, match=f"row {failing}"):
        over_rows(work, 100, threads=2)
    over_rows(lambda first, end: None, 100, threads=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    over_rows(lambda first, end: None, 8, threads=2)
    child = os.fork()
    if child == 0:
        over_rows(lambda first, end: None, 8, threads=2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
