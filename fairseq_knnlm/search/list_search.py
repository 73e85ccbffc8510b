"""Exact nearest keys in the probed lists, each list visited once for all queries.

An inverted file searched query by query reads a list again for every query that probes it. Here
queries are grouped by list: its keys are read and converted once, and one matrix product compares
them with all its queries. The product is rounded: it only decides, with room for the rounding,
which pairs are near enough to be worth an exact distance (see ``near_pairs``). So no key of a
probed list is lost, and a larger k only adds neighbours behind those of a smaller one.

Near enough is what lies within a limit: a distance that a sample of a query's keys says is a little
beyond its k-th nearest. Nothing but time depends on it: a query with fewer than k keys within its
limit is searched again without one, and one with many more keeps the nearest.
"""

import threading
from collections.abc import Iterator
from typing import Callable

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from ..neighbors import Neighbors
from ..progress import track
from .float_products import columns
from .inverted_lists import InvertedLists, pair_distances
from .list_blocks import (
    Block,
    Groups,
    Scratch,
    Workspace,
    keys_of_block,
    padded,
    queries_of_block,
)
from .near_pairs import center_of
from .nearest import SAMPLE, Nearest, capacity, sampled_rank
from .product_type import choose_products
from .searcher import Batch, CheckRows, as_array, gather, trust, with_values
from .threads import one_thread_each, slices


class ListSearch:
    """Compares all keys of the probed lists (the protocol of ``searcher.Searcher``).

    Of equal distances the lower id comes first.

    Args:
        keys (ndarray): shape (entries, D), float16, at most ``ordering.MAX_KEYS`` of them.
        values (ndarray): shape (entries,), the token of each entry.
        metric (str): ``l2`` or ``ip``.
        lists (InvertedLists): the rows of *keys* in each list, and which lists a query probes.
        check_rows (callable): see ``searcher.CheckRows``.
    """

    def __init__(
        self,
        keys: np.ndarray,
        values: np.ndarray,
        metric: str,
        *,
        lists: InvertedLists,
        check_rows: CheckRows = trust,
    ):
        self._keys = keys.view(np.ndarray)  # indexing a memmap is slower
        self._check_rows = check_rows
        self._values = values
        self._lists = lists
        self._metric = metric
        self._pair_distances = pair_distances(metric)
        self._keys_of_block = keys_of_block(columns(keys.shape[1]))
        typical = min(self._keys_of_block, max(1, int(lists.sizes.mean())))
        self._products = choose_products(metric, keys.shape[1], typical)
        self._center = center_of(self._keys, metric, check_rows)
        self._of_thread = threading.local()
        self._workspace = Workspace()

    def search(self, queries: torch.Tensor, k: int) -> Neighbors:
        """All batches as one, on the device of *queries*, see ``batches``."""
        return gather(self.batches(queries, k), k, queries.device)

    def batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """Search, see ``searcher.Searcher.batches``.

        All queries are searched before the first batch is made; a batch only unpacks what is kept
        of its queries.
        """
        # What is kept lies in the workspace until the last batch is made. Another search that
        # begins before gets a workspace of its own.
        workspace, self._workspace = self._workspace, Workspace()
        try:
            array = as_array(queries)
            nearest = self._search(array - self._center, self._lists.probes(array), k, workspace)
            for rows in slices(len(array), k):
                yield rows, with_values(*nearest.of(rows), self._values)
        finally:
            self._workspace = workspace

    def _search(self, queries, probes, k: int, workspace: Workspace) -> Nearest:
        """The k nearest keys of each query, in order.

        Args:
            queries (ndarray): shape (N, D), float32, relative to the center.
            probes (ndarray): shape (N, P), int64, the lists of each query, each once; -1 for none.
        """
        shape = len(queries), capacity(k)
        workspace.array(shape, np.uint64)  # the limits need less: memory is fetched once
        with one_thread_each() as pool:
            limits = self._limits(queries, probes, k, pool, workspace)
            kept = workspace.array(shape, np.uint64)
            nearest = self._nearest(queries, probes, limits, pool, Nearest(k, limits, kept))
            short = nearest.incomplete()
            if len(short):
                unlimited = np.full(len(short), np.inf, dtype=np.float32)
                again = Nearest(k, unlimited, np.empty((len(short), capacity(k)), np.uint64))
                self._nearest(queries[short], probes[short], unlimited, pool, again)
                nearest.replace(short, again)
        return nearest

    def _limits(self, queries, probes, k: int, pool, workspace: Workspace) -> np.ndarray:
        """A distance for each query that probably a few more than k keys are within."""
        sizes = -(-self._lists.sizes // SAMPLE)
        ends = np.where(probes < 0, 0, sizes[probes]).cumsum(axis=1)
        sample = workspace.array((len(ends), max(1, ends[:, -1].max(initial=0))), np.float32)
        flat = sample.reshape(-1)

        def visit(block):
            starts = ends[block.rows, block.slots] - sizes[block.number] + block.first
            starts += block.rows * sample.shape[1]
            windows = sliding_window_view(flat, len(block.ids), writeable=True)
            windows[starts] = block.products[:, : len(block.ids)].float().numpy()

        sides = self._query_sides(queries, np.zeros(len(queries), np.float32), pool, rounding=False)
        self._each_block(visit, sides, probes, SAMPLE, pool)
        rank = sampled_rank(k)
        if rank > sample.shape[1]:
            return np.full(len(sample), np.inf, dtype=np.float32)

        def partition(rows):
            part = sample[rows]
            np.copyto(part, np.inf, where=np.arange(part.shape[1]) >= ends[rows, -1:])
            part.partition(rank - 1, axis=1)

        list(pool.map(partition, slices(*sample.shape)))
        return sample[:, rank - 1].copy()

    def _nearest(self, queries, probes, limits, pool, nearest: Nearest) -> Nearest:
        """Fill *nearest* with the keys within the limits, and sort it."""

        def visit(block):
            rows, columns = block.near()
            distances = self._pair_distances(queries, block.rows[rows], block.keys, columns)
            nearest.add(block.rows, rows, distances, block.ids[columns])

        sides = self._query_sides(queries, limits, pool)
        self._each_block(visit, sides, probes, 1, pool)
        nearest.sort(pool)
        return nearest

    def _query_sides(self, queries, limits, pool, rounding=True):
        """The left side of every product of a search."""
        sides = self._products.query_sides(queries)

        def write(rows):
            self._products.write_queries(sides, rows, limits, rounding)

        list(pool.map(write, slices(*queries.shape)))
        return sides

    def _each_block(self, visit: Callable, sides, probes, stride: int, pool) -> None:
        """Compare the keys of each list, or one in *stride*, with the queries that probe it."""
        groups = Groups(probes, len(self._lists.sizes))

        def visit_list(number):
            for block in self._blocks(sides, groups, number, stride):
                visit(block)

        what = f"neighbours, pass {2 if stride == 1 else 1} of 2"
        for _ in track(what, pool.map(visit_list, groups.lists), len(groups.lists)):
            pass

    def _blocks(self, sides, groups: Groups, number: int, stride: int) -> Iterator[Block]:
        """The blocks of a list; each is in the memory of the one before."""
        ids = self._lists.ids(number)[::stride]
        rows, slots = groups.of(number)
        scratch = self._scratch()
        for first in range(0, len(ids), self._keys_of_block):
            block_ids = ids[first : first + self._keys_of_block]
            keys = self._read(block_ids, scratch)
            right = self._products.write_keys(scratch.of_products, keys)
            width = max(padded(len(keys)), columns(keys.shape[1]))
            step = queries_of_block(width, len(rows))
            for begin in range(0, len(rows), step):
                part = slice(begin, begin + step)
                products = self._products.multiply(scratch.of_products, sides, rows[part], right)
                yield Block(number, rows[part], slots[part], first, block_ids, keys, products)

    def _read(self, ids: np.ndarray, scratch: Scratch) -> np.ndarray:
        """Keys in float32, relative to the center."""
        self._check_rows(ids)
        stored, keys = scratch.stored[: len(ids)], scratch.keys[: len(ids)]
        self._keys.take(ids, axis=0, out=stored, mode="clip")
        torch.from_numpy(keys).copy_(torch.from_numpy(stored))  # numpy converts slower
        if self._metric == "l2":
            keys -= self._center
        return keys

    def _scratch(self) -> Scratch:
        if not hasattr(self._of_thread, "scratch"):
            shape = self._keys_of_block, self._keys.shape[1]
            self._of_thread.scratch = Scratch(
                np.empty(shape, self._keys.dtype),
                np.empty(shape, np.float32),
                self._products.scratch(self._keys_of_block),
            )
        return self._of_thread.scratch
