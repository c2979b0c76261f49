"""Rows over threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise


def over_rows(work: Callable[[int, int], None], n_rows: int, *, threads: int = 1, grain: int = 1) -> None:
    """Call ``work(first, end)`` on consecutive ranges that together cover ``range(n_rows)``.

    Ranges begin at multiples of `grain`. There are a few for each thread, so that a slow core does not
    hold up the others. `work` must write nothing but what belongs to its rows and must compute each row
    in a way that does not depend on the range: then the result does not depend on `threads`.

    Args:
        work: called from several threads at once where `threads` > 1; should release the GIL.
        n_rows: number of rows.
        threads: number of threads; 1 calls `work` once, in this thread.
        grain: rows are not split more finely than this.
    """
    n_grains = -(-n_rows // grain)
    n_ranges = min(n_grains, 4 * threads) if threads > 1 else min(n_grains, 1)
    if n_ranges <= 1:
        if n_rows:
            work(0, n_rows)
        return
    edges = [min(n_rows, grain * (n_grains * i // n_ranges)) for i in range(n_ranges + 1)]
    with ThreadPoolExecutor(min(threads, n_ranges)) as pool:
        for done in [pool.submit(work, first, end) for first, end in pairwise(edges)]:
            done.result()
