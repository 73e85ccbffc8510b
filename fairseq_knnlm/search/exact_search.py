"""Exact distances over an index: by its lists for many queries, by its candidates for few."""

import functools
from collections.abc import Iterator

import numpy as np
import torch

from ..neighbors import Neighbors
from .index_search import IndexSearch
from .list_search import ListSearch
from .searcher import Batch, CheckRows, gather, trust

# With at most this many keys for each query, visiting each list once for all costs less than
# candidates for each query.
KEYS_PER_QUERY = 100
# Up to this many neighbours, candidates cost less even so.
FEW_NEIGHBORS = 16
# Up to this many keys the difference is small, and lists are visited for few neighbours as well:
# candidates of coarse codes miss some of the nearest, lists none.
FEW_KEYS = 1 << 16


class ExactSearch:
    """Searches an index with distances computed from the stored keys (``searcher.Searcher``).

    Args:
        index: a FAISS index.
        metric (str): ``l2`` or ``ip``.
        values (ndarray): shape (entries,), the token of each entry.
        keys (ndarray): shape (entries, D), float16, a memory-mapped ``.npy`` file.
        nprobe (int): inverted lists visited by each query.
        device (str): ``cpu`` or ``cuda``: where the index is.
        check_rows (callable): see ``searcher.CheckRows``.
    """

    def __init__(
        self,
        index,
        metric: str,
        values: np.ndarray,
        keys: np.ndarray,
        nprobe: int = 32,
        device: str = "cpu",
        check_rows: CheckRows = trust,
    ):
        self._count = len(keys)
        self._by_candidates = IndexSearch(index, metric, values, nprobe, keys, device, check_rows)
        self._lists = self._by_candidates.lists
        self._of_lists = keys, values, self._lists, metric, check_rows

    def search(self, queries: torch.Tensor, k: int) -> Neighbors:
        """All batches as one, on the device of *queries*, see ``batches``."""
        return gather(self.batches(queries, k), k, queries.device)

    def batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """Search, see ``searcher.Searcher.batches``."""
        searcher = self._by_lists if self._visits_lists(len(queries), k) else self._by_candidates
        return searcher.batches(queries, k)

    def _visits_lists(self, queries: int, k: int) -> bool:
        many_queries = self._count <= KEYS_PER_QUERY * queries
        costs_less = k > FEW_NEIGHBORS or self._count <= FEW_KEYS
        return self._lists is not None and many_queries and costs_less

    @functools.cached_property
    def _by_lists(self) -> ListSearch:
        """Made when it is needed: it looks at keys everywhere, which few queries do not."""
        return ListSearch(*self._of_lists)
