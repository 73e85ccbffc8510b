"""Exact nearest keys in the probed lists, each list visited once for all queries.

An inverted file searched query by query reads a list again for every query that probes it. Here
queries are grouped by list: its keys are read and converted once, and one matrix product compares
them with all its queries. The product is rounded: it only decides, with room for the rounding,
which pairs are near enough to be worth an exact distance (see ``near_pairs``). So nothing that lies
in a probed list is lost, and the k nearest are the first k of the k + 1 nearest.

Near enough is what lies within a limit: a distance that a sample of a query's keys says is a little
beyond its k-th nearest. Nothing but time depends on it: a query that found too few is searched
again without one, one that found too many keeps the nearest.
"""

import contextlib
import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from . import near_pairs

# One key in this many is sampled for the limits, ...
_SAMPLE = 16
# ... and a limit is set so that a miss is this many standard deviations away.
_SIGMAS = 3.5
# Elements of a matrix of keys, or of products: what stays in a core's cache.
_BLOCK = 1 << 20
_MAX_KEYS_OF_BLOCK = 1 << 12
# Matrices have a multiple of so many rows, ...
_ROWS_STEP = 64
# ... and of this share of the next lower power of two: a kernel is compiled for every shape.
_SIZES_OF_OCTAVE = 4
# What a thread works on at a time, of a matrix with a row for each query: elements, few enough to
# stay in a core's cache, ...
_ELEMENTS = 1 << 18
# ... and rows: threads take turns in Python, and many short ones cost more than the work.
ROWS = 1 << 10
# Ids share 64 bits with distances; one of them is none.
MAX_KEYS = (1 << 32) - 1
_NONE = np.iinfo(np.uint64).max
_SIGN = np.uint32(1 << 31)
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


class ListSearch:
    """Searches keys through their inverted lists.

    Args:
        keys (ndarray): shape (N, D), float16, N at most ``MAX_KEYS``.
        list_ids (callable): takes the number of a list, gives the rows of *keys* in it, int64.
        nlist (int): number of lists.
        metric (str): ``l2`` or ``ip``.
        pair_distances (callable): takes float32 arrays of shape (n, D) and (m, D) and int64 rows of
            either, each of shape (p,); gives p distances, float32, lower is closer.
    """

    def __init__(
        self, keys: np.ndarray, list_ids: Callable, nlist: int, metric: str, pair_distances
    ):
        self._keys = keys.view(np.ndarray)  # indexing a memmap is slower
        self._list_ids = list_ids
        self._sizes = np.array([len(list_ids(number)) for number in range(nlist)])
        self._metric = metric
        self._pair_distances = pair_distances
        self._type = near_pairs.rounded_type()
        self._columns = near_pairs.columns(keys.shape[1])
        self._keys_of_block = _fitting(self._columns, _MAX_KEYS_OF_BLOCK)
        self._center = near_pairs.center_of(self._keys, metric)
        self._of_thread = threading.local()
        self._memory = np.empty(0, dtype=np.uint64)

    def probed(self, probes: np.ndarray) -> int:
        """How many distances a search computes."""
        return int(np.where(probes < 0, 0, self._sizes[probes]).sum())

    def map(self, function: Callable, queries: np.ndarray, probes: np.ndarray, k: int) -> list:
        """Find the k nearest keys in the lists that each query probes, and use them.

        Of equal distances the lower id comes first.

        Args:
            function (callable): called for some of the queries at a time, from several threads,
                with a slice, the queries; distances, shape (n, k), float32, squared L2 or minus the
                inner product, nearest first, +inf where there is no neighbour; and ids, shape
                (n, k), int64, -1 where there is none.
            queries (ndarray): shape (N, D), float32.
            probes (ndarray): shape (N, P), int64, the lists of each query, each once; -1 for none.
            k (int): neighbours.

        Returns:
            list: the results of *function*, in order.
        """
        queries = queries - self._center
        self._workspace((len(queries), _room(k)), np.uint64)  # for what needs less as well
        with one_thread_each() as pool:
            limits = self._limits(queries, probes, k, pool)
            nearest = self._nearest(queries, probes, limits, k, pool, self._workspace)
            short = nearest.incomplete()
            if len(short):
                unlimited = np.full(len(short), np.inf, dtype=np.float32)
                again = self._nearest(queries[short], probes[short], unlimited, k, pool, np.empty)
                nearest.replace(short, again)
            parts = slices(len(queries), k)
            results = pool.map(lambda rows: function(rows, *nearest.of(rows)), parts)
            return list(results)

    def _workspace(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """Memory for an array, the same for every search; its content is undefined.

        Fresh memory costs more than what is done in it.
        """
        count = math.prod(shape)
        needed = -(-count * np.dtype(dtype).itemsize // self._memory.itemsize)
        if self._memory.size < needed:
            self._memory = np.empty(needed, dtype=np.uint64)
        return self._memory.view(dtype)[:count].reshape(shape)

    def _limits(self, queries, probes, k: int, pool) -> np.ndarray:
        """A distance for each query that probably a few more than k keys are within."""
        sizes = -(-self._sizes // _SAMPLE)
        ends = np.where(probes < 0, 0, sizes[probes]).cumsum(axis=1)
        sample = self._workspace((len(ends), max(1, ends[:, -1].max())), np.float32)
        flat = sample.reshape(-1)

        def visit(block):
            starts = ends[block.rows, block.slots] - sizes[block.number] + block.first
            starts += block.rows * sample.shape[1]
            windows = sliding_window_view(flat, len(block.ids), writeable=True)
            windows[starts] = block.products[:, : len(block.ids)].float().numpy()

        sides = self._query_sides(queries, np.zeros(len(queries), np.float32), pool, rounding=False)
        self._each_block(visit, sides, probes, _SAMPLE, pool)
        rank = _sampled_rank(k)
        if rank > sample.shape[1]:
            return np.full(len(sample), np.inf, dtype=np.float32)

        def partition(rows):
            part = sample[rows]
            np.copyto(part, np.inf, where=np.arange(part.shape[1]) >= ends[rows, -1:])
            part.partition(rank - 1, axis=1)

        list(pool.map(partition, slices(*sample.shape)))
        return sample[:, rank - 1].copy()

    def _nearest(self, queries, probes, limits, k: int, pool, allocate) -> "_Nearest":
        nearest = _Nearest(k, limits, allocate((len(queries), _room(k)), np.uint64))

        def visit(block):
            rows, columns = block.near()
            distances = self._pair_distances(queries, block.rows[rows], block.keys, columns)
            nearest.add(block.rows, rows, distances, block.ids[columns])

        sides = self._query_sides(queries, limits, pool)
        self._each_block(visit, sides, probes, 1, pool)
        nearest.sort(pool)
        return nearest

    def _query_sides(self, queries, limits, pool, rounding=True) -> torch.Tensor:
        """The left side of every product of a search."""
        sides = torch.zeros(len(queries), self._columns, dtype=self._type)

        def write(rows):
            part = queries[rows], limits[rows]
            near_pairs.write_queries(sides[rows], *part, self._metric, rounding)

        list(pool.map(write, slices(*sides.shape)))
        return sides

    def _each_block(self, visit: Callable, sides, probes, stride: int, pool) -> None:
        """Compare the keys of each list, or one in *stride*, with the queries that probe it."""
        groups = _Groups(probes, len(self._sizes))

        def visit_list(number):
            for block in self._blocks(sides, groups, number, stride):
                visit(block)

        list(pool.map(visit_list, groups.lists))

    def _blocks(self, sides, groups, number: int, stride: int) -> Iterator["_Block"]:
        """The blocks of a list; each is in the memory of the one before."""
        ids = self._list_ids(number)[::stride]
        rows, slots = groups.of(number)
        scratch = self._scratch()
        for first in range(0, len(ids), self._keys_of_block):
            block_ids = ids[first : first + self._keys_of_block]
            keys, right = self._read(block_ids, scratch)
            queries_of_block = _fitting(max(right.shape), len(rows))
            for begin in range(0, len(rows), queries_of_block):
                part = slice(begin, begin + queries_of_block)
                count = len(rows[part])
                left = _head(scratch.left, _padded(count), self._columns)
                torch.index_select(sides, 0, torch.from_numpy(rows[part]), out=left[:count])
                products = _head(scratch.products, len(left), len(right))
                torch.mm(left, right.t(), out=products)
                yield _Block(
                    number, rows[part], slots[part], first, block_ids, keys, products[:count]
                )

    def _read(self, ids: np.ndarray, scratch: "_Scratch"):
        """Keys in float32, relative to the center, and the right side of their products."""
        found, keys = scratch.found[: len(ids)], scratch.keys[: len(ids)]
        self._keys.take(ids, axis=0, out=found, mode="clip")
        torch.from_numpy(keys).copy_(torch.from_numpy(found))  # numpy converts slower
        if self._metric == "l2":
            keys -= self._center
        right = scratch.right[: _padded(len(ids))]
        near_pairs.write_keys(right[: len(ids)], keys, self._metric)
        right[len(ids) :] = 0
        return keys, right

    def _scratch(self) -> "_Scratch":
        if not hasattr(self._of_thread, "scratch"):
            count, dimension = self._keys_of_block, self._keys.shape[1]
            elements = max(_BLOCK, _ROWS_STEP * max(self._columns, _MAX_KEYS_OF_BLOCK))
            self._of_thread.scratch = _Scratch(
                np.empty((count, dimension), self._keys.dtype),
                np.empty((count, dimension), np.float32),
                torch.zeros(count, self._columns, dtype=self._type),
                *(torch.zeros(elements, dtype=self._type) for _ in range(2)),
            )
        return self._of_thread.scratch


def slices(count: int, width: int) -> Iterator[slice]:
    """Cut *count* queries, each of a row of *width* elements, into what a thread does at a time."""
    rows = max(1, min(ROWS, _ELEMENTS // width))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


@contextlib.contextmanager
def one_thread_each():
    """As many threads as torch has, and one for each product: a pool that does many at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


class _Scratch(NamedTuple):
    """Memory that a thread uses again and again.

    found (ndarray): keys as they are stored.
    keys (ndarray): the same, float32.
    right (Tensor): their side of a product; columns that are never written to are 0.
    left, products (Tensor): shape (elements,).
    """

    found: np.ndarray
    keys: np.ndarray
    right: torch.Tensor
    left: torch.Tensor
    products: torch.Tensor


def _step(count: int) -> int:
    return max(_ROWS_STEP, (1 << count.bit_length() - 1) // _SIZES_OF_OCTAVE)


def _padded(count: int) -> int:
    """Rows of a matrix for *count* of them."""
    return -(-count // _step(count)) * _step(count)


def _fitting(width: int, limit: int) -> int:
    """Rows of a block of *width* elements each, which fit in it padded."""
    most = max(_ROWS_STEP, _BLOCK // width)
    return min(most - most % _step(most), limit)


def _head(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    return buffer[: math.prod(shape)].view(shape)


class _Block(NamedTuple):
    """Some queries, some keys of a list that they probe, and which of them are near.

    number (int): of the list.
    rows, slots (ndarray): shape (n,), queries, and the place of the list among their probes.
    first (int): place of the first of the keys in their list.
    ids (ndarray): shape (m,), the keys.
    keys (ndarray): shape (m, D), float32.
    products (Tensor): shape (n, m or more), of the rows of ``near_pairs``; of no key: not negative.
    """

    number: int
    rows: np.ndarray
    slots: np.ndarray
    first: int
    ids: np.ndarray
    keys: np.ndarray
    products: torch.Tensor

    def near(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that are near: for each the number of its query in the block, and of its key."""
        near = near_pairs.are_near(self.products)
        # most eights of pairs have none that is near: half the time of np.flatnonzero(near)
        eights = near.reshape(-1).view(np.uint64)
        some = np.flatnonzero(eights != 0)
        within = np.flatnonzero(eights[some].view(bool))
        places = (some << 3)[within >> 3] + (within & 7)
        rows = places // near.shape[1]
        return rows, places - rows * near.shape[1]


class _Groups:
    """The queries of each list.

    Attributes:
        lists (list of int): those that any query probes.
    """

    def __init__(self, probes: np.ndarray, nlist: int):
        flat = probes.ravel()
        # numpy sorts short integers by their digits
        order = flat.astype(np.int16 if nlist < 1 << 15 else np.int64).argsort(kind="stable")
        counts = np.bincount(flat[flat >= 0], minlength=nlist)
        self._ends = (len(flat) - counts.sum()) + counts.cumsum()  # those of -1 stand in front
        self._starts = self._ends - counts
        self._rows, self._slots = np.divmod(order, probes.shape[1])
        self.lists = np.flatnonzero(counts).tolist()

    def of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The queries that probe a list, and at which place of their probes."""
        part = slice(self._starts[number], self._ends[number])
        return self._rows[part], self._slots[part]


class _Nearest:
    """Collects, for each query, at least its k nearest of what is added, from several threads.

    A distance and an id are one integer that sorts by distance, then by id.

    Args:
        k (int): neighbours.
        limits (ndarray): shape (N,), float32, distances that nothing is missing up to.
        kept (ndarray): shape (N, at least k), uint64, room for them.
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
        packed = _pack(distances, ids)
        with self._lock:
            full = self._counts[queries] + counts > self._kept.shape[1]
            if full.any():
                ends = counts.cumsum()
                for row in np.flatnonzero(full):
                    self._merge(queries[row], packed[ends[row] - counts[row] : ends[row]])
                packed, rows, counts = packed[~full[rows]], rows[~full[rows]], counts * ~full
            starts = self._counts[queries]
            # those of a query stand side by side
            first = queries * self._kept.shape[1] + starts - (counts.cumsum() - counts)
            self._kept.reshape(-1)[first[rows] + np.arange(len(rows))] = packed
            self._counts[queries] = starts + counts

    def _merge(self, query: int, packed: np.ndarray) -> None:
        """Keep the k nearest alone of what a query has and gets."""
        packed = np.concatenate([self._kept[query, : self._counts[query]], packed])
        packed.partition(self._k - 1)
        self._kept[query, : self._k] = packed[: self._k]
        self._counts[query] = self._k

    def sort(self, pool) -> None:
        """Bring what is kept of each query in order."""

        def sort(rows):
            counts = self._counts[rows]
            kept = self._kept[rows, : max(self._k, counts.max())]
            np.copyto(kept, _NONE, where=np.arange(kept.shape[1]) >= counts[:, None])
            kept.sort(axis=1)

        list(pool.map(sort, slices(*self._kept.shape)))

    def incomplete(self) -> np.ndarray:
        """Queries that had a limit and of which the k-th nearest is not within it."""
        farthest = _unpack(self._kept[:, self._k - 1 : self._k])[0][:, 0]
        return np.flatnonzero((farthest > self._limits) & (self._limits < np.inf))

    def replace(self, queries: np.ndarray, other: "_Nearest") -> None:
        """Take what *other* found for some of the queries."""
        self._kept[queries, : self._k] = other._kept[:, : self._k]

    def of(self, queries: slice) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids of the k nearest of some queries, once they are in order."""
        return _unpack(self._kept[queries, : self._k])


def nearest_first(distances: np.ndarray, ids: np.ndarray, k: int):
    """The k nearest of some candidates, nearest first; of equal distances the lower id first.

    Args:
        distances (ndarray): shape (n, m), float32; where there is none, above all others.
        ids (ndarray): shape (n, m), int64, -1 where there is none.

    Returns:
        tuple: distances, +inf where there is none, and ids, each of shape (n, k).
    """
    packed = _pack(distances, ids)
    packed.sort(axis=1)
    return _unpack(packed[:, :k])


def _sampled_rank(k: int) -> int:
    """Rank in the sample of a key that is very probably not among the k nearest of all."""
    expected = k / _SAMPLE
    return math.ceil(expected + _SIGMAS * math.sqrt(expected)) + 2


def _room(k: int) -> int:
    """How many keys a query may keep before it must drop some."""
    rank = _sampled_rank(k)
    return _SAMPLE * math.ceil(rank + 3 * math.sqrt(rank))


def _pack(distances: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Integers that sort by distance, then by id; -1 is the last of all ids."""
    packed = np.empty(distances.shape, dtype=np.uint64)
    halves = _halves(packed)
    halves[..., _LOW] = ids
    np.bitwise_xor(_sortable(distances.view(np.int32)).view(np.uint32), _SIGN, halves[..., _HIGH])
    return packed


def _unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances and ids of rows in order, shape (n, k); _NONE, too, is none."""
    halves = _halves(packed)
    distances = _sortable((halves[..., _HIGH] ^ _SIGN).view(np.int32)).view(np.float32)
    ids = halves[..., _LOW].astype(np.int64)
    if (ids[:, -1:] == MAX_KEYS).any():
        none = ids == MAX_KEYS
        distances[none], ids[none] = np.inf, -1
    return distances, ids


def _halves(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.uint32).reshape(*packed.shape, 2)


def _sortable(bits: np.ndarray) -> np.ndarray:
    """The bits of floats as integers that sort as they do, or back: negative ones are reversed."""
    if not bits.size or bits.min() >= 0:
        return bits
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
