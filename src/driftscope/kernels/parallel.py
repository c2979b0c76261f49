"""Rows over threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

# Threads are kept from call to call: a product with one token takes less time than starting a thread.
_pool: ThreadPoolExecutor | None = None
_size = 0


def over_rows(work: Callable[[int, int], None], n_rows: int, *, threads: int = 1, grain: int = 1) -> None:
    """Call ``work(first, end)`` on consecutive ranges that together cover ``range(n_rows)``.

    Ranges begin at multiples of `grain`. There are a few for each thread, so that a slow core does not
    hold up the others. `work` must write nothing but what belongs to its rows and must compute each row
    in a way that does not depend on the range: then the result does not depend on `threads`.

    Args:
        work: called from several threads at once where `threads` > 1; should release the GIL.
        n_rows: number of rows.
        threads: number of threads, this one included; 1 calls `work` once, in this thread.
        grain: rows are not split more finely than this.
    """
    n_grains = -(-n_rows // grain)
    n_ranges = min(n_grains, 4 * threads) if threads > 1 else min(n_grains, 1)
    if n_ranges <= 1:
        if n_rows:
            work(0, n_rows)
        return
    edges = [min(n_rows, grain * (n_grains * i // n_ranges)) for i in range(n_ranges + 1)]
    ranges = deque(pairwise(edges))

    def take() -> None:
        while True:
            try:
                first, end = ranges.popleft()
            except IndexError:
                return
            work(first, end)

    helpers = min(threads, n_ranges) - 1
    pool = _threads(helpers)
    others = [pool.submit(take) for _ in range(helpers)]
    try:
        take()
    finally:
        # Whoever has not begun by now has nothing left to do.
        running = [other for other in others if not other.cancel()]
        errors = [other.exception() for other in running]
    for error in errors:
        if error is not None:
            raise error


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _size
    if _pool is None or _size < count:
        _size = max(count, os.cpu_count() or 1)
        _pool = ThreadPoolExecutor(_size, thread_name_prefix="driftscope")
    return _pool


def _forget() -> None:
    global _pool, _size
    _pool, _size = None, 0


# A child process has none of its parent's threads.
os.register_at_fork(after_in_child=_forget)
