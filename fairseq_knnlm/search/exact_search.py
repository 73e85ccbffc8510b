"""Exact distances over an index: by its lists for many queries, by its candidates for few."""

from collections.abc import Iterator
from typing import Optional

import numpy as np
import torch

from ..neighbors import Neighbors
from .index_search import IndexSearch
from .list_search import ListSearch
from .searcher import Batch, gather

# Visiting each list once costs less than candidates for each query, for more neighbours than this
# and at least one query for so many keys.
FEW_NEIGHBORS = 16
KEYS_PER_QUERY = 100


class ExactSearch:
    """Searches an index with distances computed from the stored keys (``searcher.Searcher``).

    Args:
        path (str): file of the index.
        metric (str): ``l2`` or ``ip``.
        values (ndarray): shape (entries,), the token of each entry.
        keys (ndarray): shape (entries, D), float16, a memory-mapped ``.npy`` file.
        nprobe (int): inverted lists visited by each query.
        device (str): ``cpu`` or ``cuda``: where the index is.
    """

    def __init__(
        self,
        path: str,
        metric: str,
        values: np.ndarray,
        keys: np.ndarray,
        nprobe: int = 32,
        device: str = "cpu",
    ):
        self._count = len(keys)
        self._by_candidates = IndexSearch(path, metric, values, nprobe, keys, device)
        lists = self._by_candidates.lists
        self._by_lists: Optional[ListSearch] = None
        if lists is not None:
            self._by_lists = ListSearch(keys, values, lists, metric)

    def search(self, queries: torch.Tensor, k: int) -> Neighbors:
        """All batches as one, on the device of *queries*, see ``batches``."""
        return gather(self.batches(queries, k), k, queries.device)

    def batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """Search, see ``searcher.Searcher.batches``."""
        if (
            self._by_lists is not None
            and k > FEW_NEIGHBORS
            and self._count <= KEYS_PER_QUERY * len(queries)
        ):
            return self._by_lists.batches(queries, k)
        return self._by_candidates.batches(queries, k)
