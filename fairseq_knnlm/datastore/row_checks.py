"""Verification as it is read: each chunk of an array is compared with its checksum once.

Whoever is about to use rows of an array says which. The chunks that they lie in and that no one has
asked for before in this process are read and compared, side by side in as many threads as there are
cores: zlib's CRC-32 takes half a millisecond for a MB, and leaves Python to other threads. When all
are verified, asking costs a function call.
"""

import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Optional, Union

import numpy as np

from ..errors import UserError
from ..files import checksum_of_range
from .layout import npy_header


class RowChecks:
    """Verifies the rows of an array as they are asked for; called with the rows.

    Threads may call it at a time. No chunk is verified twice, and a thread waits for those that it
    needs and another one is at. The file is read beside the mapping that rows are taken from: pages
    of a mapping would count as memory of the process.

    Args:
        path (str): a ``.npy`` file.
        shape (tuple of int): of its array, rows first.
        dtype (numpy.dtype): of its array.
        ends (sequence of int): the row behind each chunk; they do not decrease.
        checksums (sequence of str): of each chunk.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        ends: Sequence[int],
        checksums: Sequence[str],
    ):
        self._path = path
        self._file = open(path, "rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._count = shape[0]
        self._header_bytes = len(npy_header(shape, dtype))
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._ends = np.asarray(ends, dtype=np.int64)
        self._checksums = checksums
        self._lock = threading.Lock()
        self._begun: dict[int, Future] = {}
        # A chunk without rows is never asked for.
        self._verified = np.diff(self._ends, prepend=0) == 0
        self._complete = bool(self._verified.all())

    def __call__(self, rows: Union[range, np.ndarray]) -> None:
        """Verify the chunks of some rows, but for those that are verified already.

        Args:
            rows (range or ndarray of int): of any shape and in any order; negative ones are none.

        Raises:
            UserError: if a chunk is not what was written, naming its bytes; also when the same
                chunk is asked for again.
            OSError: if it cannot be read.
        """
        if self._complete:
            return
        needed = self._unverified(rows)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            with self._lock:
                for number in needed:
                    if number not in self._begun:
                        self._begun[number] = pool.submit(self._verify, number)
            for number in needed:
                self._begun[number].result()

    def all_rows(self) -> None:
        """Verify the whole array.

        Raises:
            UserError: if a chunk is not what was written.
        """
        self(range(self._count))

    def fault(self, number: int) -> Optional[str]:
        """What is wrong with a chunk: its bytes in the file; None: nothing."""
        start, stop = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        first, last = (self._header_bytes + row * self._row_bytes for row in (start, stop))
        if checksum_of_range(self._file, first, last - first) == self._checksums[number]:
            return None
        return f"damaged between bytes {first} and {last - 1}"

    def faults(self) -> Iterator[str]:
        """Read everything: what is wrong with each damaged chunk."""
        return filter(None, map(self.fault, range(len(self._ends))))

    def _unverified(self, rows) -> list[int]:
        """The chunks of rows that nobody has verified yet."""
        if isinstance(rows, range):
            rows = np.arange(rows.start, rows.stop, rows.step)
        wanted = np.zeros(len(self._ends), dtype=bool)
        wanted[self._ends.searchsorted(rows[rows >= 0], side="right")] = True
        return np.flatnonzero(wanted & ~self._verified).tolist()

    def _verify(self, number: int) -> None:
        fault = self.fault(number)
        if fault:
            raise UserError(refusal(self._path, fault))
        with self._lock:
            self._verified[number] = True
            self._complete = bool(self._verified.all())


def refusal(path: str, fault: str) -> str:
    """The text of an error about a damaged file.

    Args:
        path (str): of the file.
        fault (str): what it is, bytes named.
    """
    return (
        f"{path} is {fault}: they are not what was written; copy the file again where it was "
        "copied from, or build the datastore again"
    )
