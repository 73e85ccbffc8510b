"""Threads of the host: how many, and how much each does at a time."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

# Elements of a matrix that a thread works on, a row for each query: they stay in a core's cache.
_ELEMENTS = 1 << 18
# Rows of such a matrix, at most. Threads take turns in Python, and shorter turns would cost more
# than the work.
ROWS = 1 << 10


def slices(count: int, width: int) -> Iterator[slice]:
    """Cut queries into what a thread does at a time.

    Args:
        count (int): queries.
        width (int): elements of the row of each.
    """
    rows = max(1, min(ROWS, _ELEMENTS // width))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


@contextlib.contextmanager
def one_thread_each():
    """A pool of as many threads as torch has, within each of which torch uses one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
