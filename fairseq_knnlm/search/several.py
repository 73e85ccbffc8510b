"""Several datastores searched as if they were one."""

from collections.abc import Iterator, Sequence

import torch

from ..neighbors import Neighbors
from .searcher import Batch, Searcher, gather
from .threads import slices


class SeveralSearch:
    """Merges the neighbours of several searchers (the protocol of ``searcher.Searcher``).

    Ids count through all datastores in their order.

    Args:
        searchers (list of Searcher): one for each datastore.
        counts (list of int): entries of each datastore.
    """

    def __init__(self, searchers: Sequence[Searcher], counts: Sequence[int]):
        self._searchers, self._counts = list(searchers), list(counts)

    def batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """Search, see ``searcher.Searcher.batches``."""
        each, first_id = [], 0
        for searcher, count in zip(self._searchers, self._counts):
            nearest = min(k, count)
            neighbors = gather(searcher.batches(queries, nearest), nearest, queries.device)
            ids = (neighbors.ids + first_id).masked_fill_(neighbors.ids < 0, -1)
            each.append(neighbors._replace(ids=ids))
            first_id += count
        for rows in slices(len(queries), k * len(each)):
            yield rows, _merge([Neighbors(*(part[rows] for part in one)) for one in each], k)


def _merge(each: Sequence[Neighbors], k: int) -> Neighbors:
    """The k nearest of the neighbours in several datastores."""
    distances, values, ids = (torch.cat(columns, dim=1) for columns in zip(*each))
    distances, order = distances.topk(k, dim=1, largest=False, sorted=True)
    return Neighbors(distances, values.gather(1, order), ids.gather(1, order))
