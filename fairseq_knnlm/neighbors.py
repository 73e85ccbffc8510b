"""Neighbours, and finding them in several datastores as if they were one.

With arrays on the host, or with tensors that stay on the device that searches.
"""

from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple

import numpy as np
import torch

from .datastore import Datastore
from .list_search import slices

# Queries whose neighbours are handed over at a time, as tensors on a device.
_ROWS = 1 << 12


class Neighbors(NamedTuple):
    """The nearest entries of each query, nearest first.

    distances (Tensor): shape (N, k), float32, squared L2 or minus the inner product; +inf where
        there is no neighbour.
    values (LongTensor): shape (N, k), the token that followed; 0 where there is no neighbour.
    ids (LongTensor): shape (N, k), rows of the datastores, counted through all of them in the
        order they were named; -1 where there is no neighbour.
    """

    distances: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor


class HostSearch:
    """Searches indexes with arrays.

    Args:
        datastores (list of Datastore): what is searched.
        indexes (list of SearchIndex): of each.
        nprobe (int): inverted lists visited.
    """

    def __init__(self, datastores: Sequence[Datastore], indexes: Sequence, nprobe: int):
        self._datastores, self._indexes, self._nprobe = datastores, indexes, nprobe

    def map(self, function: Callable, queries: torch.Tensor, k: int) -> list:
        """See ``Retriever.map``; *function* gets tensors on the CPU, and is called by threads."""
        flat = np.ascontiguousarray(queries.float().cpu().numpy())
        if len(self._datastores) == 1:
            (index,), (datastore,) = self._indexes, self._datastores
            return index.map(
                lambda rows, *found: function(rows, _with_values(datastore, 0, *found)),
                flat, k, self._nprobe,
            )  # fmt: skip
        each = list(self._search_each(flat, k))
        return [
            function(rows, _merge(([part[rows] for part in found] for found in each), k))
            for rows in slices(len(flat), k * len(self._datastores))
        ]

    def _search_each(self, queries: np.ndarray, k: int) -> Iterator[Neighbors]:
        first_id = 0
        for datastore, index in zip(self._datastores, self._indexes):
            found = index.search(queries, min(k, len(datastore)), self._nprobe)
            yield _with_values(datastore, first_id, *found)
            first_id += len(datastore)


class DeviceSearch:
    """Searches with tensors that stay on one device.

    Args:
        datastores (list of Datastore): what is searched.
        searches (list of callable): one for each: takes queries and k, gives tensors of distances
            and ids, shape (N, k), on the device; id -1 where there is none.
        device (torch.device): of the values.
    """

    def __init__(self, datastores: Sequence[Datastore], searches: Sequence[Callable], device):
        self._searches = searches
        self._values = [
            torch.from_numpy(datastore.values.astype(np.int32)).to(device)
            for datastore in datastores
        ]

    def map(self, function: Callable, queries: torch.Tensor, k: int) -> list:
        """See ``Retriever.map``; *function* gets tensors on the device."""
        each = list(self._search_each(queries, k))
        neighbors = each[0] if len(each) == 1 else _merge(each, k)
        starts = range(0, len(queries), _ROWS)
        return [
            function(slice(start, start + len(found[0])), Neighbors(*found))
            for start, found in zip(starts, zip(*(part.split(_ROWS) for part in neighbors)))
        ]

    def _search_each(self, queries: torch.Tensor, k: int) -> Iterator[Neighbors]:
        first_id = 0
        for search, values in zip(self._searches, self._values):
            distances, ids = search(queries, min(k, len(values)))
            missing = ids < 0
            found = values[ids.clamp(min=0)].long().masked_fill_(missing, 0)
            yield Neighbors(distances, found, (ids + first_id).masked_fill_(missing, -1))
            first_id += len(values)


def _with_values(datastore: Datastore, first_id: int, distances, ids) -> Neighbors:
    if (ids[:, -1:] < 0).any():  # nearest first, none last
        missing = ids < 0
        values = np.where(missing, 0, datastore.values.take(np.where(missing, 0, ids)))
        ids = np.where(missing, -1, ids + first_id)
    else:
        values, ids = datastore.values.take(ids), ids + first_id if first_id else ids
    return Neighbors(
        *(torch.from_numpy(part) for part in (distances, values.astype(np.int64), ids))
    )


def _merge(each, k: int) -> Neighbors:
    distances, values, ids = (torch.cat(parts, dim=1) for parts in zip(*each))
    distances, order = distances.topk(k, dim=1, largest=False, sorted=True)
    return Neighbors(distances, values.gather(1, order), ids.gather(1, order))
