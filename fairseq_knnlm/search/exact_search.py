"""Exact distances over an index: by its lists for many queries, by its candidates for few."""

import functools
from collections.abc import Iterator

import numpy as np
import torch

from ..neighbors import Neighbors
from ..options import DEFAULT_NPROBE
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
        keys (ndarray): shape (entries, D), float16, a memory-mapped ``.npy`` file.
        values (ndarray): shape (entries,), the token of each entry.
        metric (str): ``l2`` or ``ip``.
        index: a FAISS index of the keys.
        nprobe (int): inverted lists visited by each query.
        device (str): ``cpu`` or ``cuda``: where the index is.
        check_rows (callable): see ``searcher.CheckRows``.
    """

    def __init__(
        self,
        keys: np.ndarray,
        values: np.ndarray,
        metric: str,
        *,
        index,
        nprobe: int = DEFAULT_NPROBE,
        device: str = "cpu",
        check_rows: CheckRows = trust,
    ):
        self._count = len(keys)
        self._stored, self._check_rows = (keys, values, metric), check_rows
        self._by_candidates = IndexSearch(
            *self._stored, index=index, nprobe=nprobe, device=device, check_rows=check_rows
        )
        self._lists = self._by_candidates.lists

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
        return ListSearch(*self._stored, lists=self._lists, check_rows=self._check_rows)
