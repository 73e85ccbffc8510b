"""Collects the nearest keys of many queries, while threads bring them list by list."""

import math
import threading

import numpy as np

from .ordering import NO_ENTRY, pack, unpack
from .threads import slices

# One key in this many is in the sample that the limits of a search are set from.
SAMPLE = 16
# A limit is so high that a miss is this many standard deviations of the sample away.
_SIGMAS = 3.5


def sampled_rank(k: int) -> int:
    """Rank in the sample of a key that is very probably not among the k nearest of all."""
    expected = k / SAMPLE
    return math.ceil(expected + _SIGMAS * math.sqrt(expected)) + 2


def capacity(k: int) -> int:
    """How many keys a query may keep before it must drop the farthest of them."""
    rank = sampled_rank(k)
    return SAMPLE * math.ceil(rank + 3 * math.sqrt(rank))


class Nearest:
    """Collects, for each query, at least its k nearest of what is added, from several threads.

    A distance and an id are one integer that sorts by distance, then by id.

    Args:
        k (int): neighbours.
        limits (ndarray): shape (N,), float32: all keys within this distance of a query are added.
        kept (ndarray): shape (N, at least k), uint64, memory to keep them in.
    """

    def __init__(self, k: int, limits: np.ndarray, kept: np.ndarray):
        self._k = k
        self._limits = limits
        self._kept = kept
        self._counts = np.zeros(len(limits), dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, queries, rows, distances, ids) -> None:
        """Add pairs.

        Args:
            queries (ndarray): shape (n,), int64, each once.
            rows (ndarray): shape (p,), int64, ascending: which of *queries* each pair is of.
            distances, ids (ndarray): shape (p,).
        """
        counts = np.bincount(rows, minlength=len(queries))
        packed = pack(distances, ids)
        with self._lock:
            full = self._counts[queries] + counts > self._kept.shape[1]
            if full.any():
                ends = counts.cumsum()
                for row in np.flatnonzero(full):
                    self._merge(queries[row], packed[ends[row] - counts[row] : ends[row]])
                packed, rows, counts = packed[~full[rows]], rows[~full[rows]], counts * ~full
            starts = self._counts[queries]
            # The pairs of one query stand side by side.
            first = queries * self._kept.shape[1] + starts - (counts.cumsum() - counts)
            self._kept.reshape(-1)[first[rows] + np.arange(len(rows))] = packed
            self._counts[queries] = starts + counts

    def _merge(self, query: int, packed: np.ndarray) -> None:
        """Keep only the k nearest of what a query has and of *packed*."""
        packed = np.concatenate([self._kept[query, : self._counts[query]], packed])
        packed.partition(self._k - 1)
        self._kept[query, : self._k] = packed[: self._k]
        self._counts[query] = self._k

    def sort(self, pool) -> None:
        """Bring what is kept of each query in order."""

        def sort(rows):
            counts = self._counts[rows]
            kept = self._kept[rows, : max(self._k, counts.max())]
            np.copyto(kept, NO_ENTRY, where=np.arange(kept.shape[1]) >= counts[:, None])
            kept.sort(axis=1)

        list(pool.map(sort, slices(*self._kept.shape)))

    def incomplete(self) -> np.ndarray:
        """Queries of which the k-th nearest is not within their limit."""
        farthest = unpack(self._kept[:, self._k - 1 : self._k])[0][:, 0]
        return np.flatnonzero(farthest > self._limits)

    def replace(self, queries: np.ndarray, other: "Nearest") -> None:
        """Take what was collected elsewhere for some of the queries.

        Args:
            queries (ndarray): shape (n,), int64.
            other (Nearest): of these queries, in this order.
        """
        self._kept[queries, : self._k] = other._kept[:, : self._k]

    def of(self, queries: slice) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids of the k nearest of some queries, once they are in order."""
        return unpack(self._kept[queries, : self._k])
