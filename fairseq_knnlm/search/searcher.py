"""The protocol of searching: queries go in, batches of neighbours come out, in order.

``retriever.Retriever`` has one searcher for each datastore. Three implement the protocol:

- ``exhaustive_search.ExhaustiveSearch`` compares all keys by matrix products, on any device;
- ``index_search.IndexSearch`` takes the entries that a FAISS index finds;
- ``list_search.ListSearch`` compares all keys of the probed inverted lists, and reads each list
  once for all queries.

Two combine others: ``exact_search.ExactSearch`` chooses between the latter two by the numbers of
neighbours, queries and keys, and ``several.SeveralSearch`` merges the neighbours of several
datastores.

Batches keep memory bounded: the neighbours of 98,304 queries at k = 1024 are 2 GB, a batch is a few
MB that are still in the processor's cache when probabilities are made of it.
"""

from collections.abc import Iterable, Iterator
from typing import Callable, Protocol, Union

import numpy as np
import torch

from ..neighbors import Neighbors

# Consecutive rows of the queries, and their neighbours.
Batch = tuple[slice, Neighbors]

# Called with ids, a range or an array, whose keys a search reads; refuses damaged ones. Those that
# are less than 0 are of no key.
CheckRows = Callable[[Union[range, np.ndarray]], None]


def trust(ids) -> None:
    """The ``CheckRows`` of keys that need no check."""


class Searcher(Protocol):
    """Finds the nearest entries of one datastore. Metric, nprobe and device are fixed when made."""

    def batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """Search.

        Args:
            queries (Tensor): shape (N, D), any float dtype and device.
            k (int): neighbours per query, at most the number of entries.

        Yields:
            tuple of slice and Neighbors: some rows of *queries* and their k nearest entries, of
            shape (rows, k), on the device that searched. The slices follow each other from 0 to N.
        """


def gather(batches: Iterable[Batch], k: int, device: torch.device) -> Neighbors:
    """All batches of a search as one.

    Args:
        batches (iterable of Batch): from a searcher.
        k (int): neighbours per query, for a search without any query.
        device (torch.device): where the result is wanted.
    """
    parts = [neighbors for _, neighbors in batches]
    if not parts:
        empty = torch.empty(0, k)
        parts = [Neighbors(empty, empty.long(), empty.long())]
    return Neighbors(*(torch.cat(columns).to(device) for columns in zip(*parts)))


def as_tensor(queries) -> torch.Tensor:
    """Queries as a tensor.

    Args:
        queries (Tensor or ndarray): any shape and dtype; an array that may not be written to, such
            as the keys of a datastore, is copied.
    """
    if isinstance(queries, torch.Tensor):
        return queries
    return torch.from_numpy(np.require(queries, requirements=["C", "W"]))


def as_array(queries: torch.Tensor) -> np.ndarray:
    """Queries as FAISS and numpy take them: float32, C-ordered, on the host."""
    return np.ascontiguousarray(queries.float().cpu().numpy())


def with_values(distances: np.ndarray, ids: np.ndarray, values: np.ndarray) -> Neighbors:
    """Neighbours on the host.

    Args:
        distances (ndarray): shape (n, k), float32, nearest first, +inf where there is none.
        ids (ndarray): shape (n, k), int64, -1 where there is none.
        values (ndarray): shape (entries,), of the datastore.
    """
    missing = ids < 0 if (ids[:, -1:] < 0).any() else None  # nearest first, so the last tells
    tokens = values.take(ids if missing is None else np.where(missing, 0, ids)).astype(np.int64)
    if missing is not None:
        tokens[missing] = 0
    return Neighbors(*map(torch.from_numpy, (distances, tokens, ids)))
