"""How good neighbours are: against all keys, compared one by one.

Exhaustive search is the reference. Whatever distances a method worked with, the entries that it
found are judged by their exact ones, so that of equally near entries any is right.
"""

from typing import NamedTuple

import numpy as np
import torch

from fairseq_knnlm.neighbors import Neighbors
from fairseq_knnlm.probability.knn import knn_log_probs
from fairseq_knnlm.probability.metrics import perplexity
from fairseq_knnlm.probability.mixture import mix
from fairseq_knnlm.search.exhaustive_search import ExhaustiveSearch

# Elements of gathered candidates.
_GATHERED = 1 << 26
# Rows whose neighbours are turned into probabilities at a time.
_ROWS = 256


class Queries(NamedTuple):
    """The first tokens of a split.

    keys (Tensor): shape (N, D), the queries.
    targets (LongTensor): shape (N,).
    log_p_lm (Tensor): shape (N,), natural log, of the language model alone.
    """

    keys: torch.Tensor
    targets: torch.Tensor
    log_p_lm: torch.Tensor

    def first(self, count):
        """The first *count* of them."""
        return Queries(*(part[:count] for part in self))


class Mixture(NamedTuple):
    """Weight and temperature of p_knn."""

    knn_lambda: float
    temperature: float

    def perplexity(self, queries, neighbors):
        """Of the language model mixed with the neighbours of *queries*."""
        pieces = (
            part.cpu().split(_ROWS)
            for part in (neighbors.distances, neighbors.values, queries.targets)
        )
        log_p_knn = torch.cat([knn_log_probs(*piece, self.temperature) for piece in zip(*pieces)])
        return perplexity(mix(queries.log_p_lm.cpu(), log_p_knn, knn_lambda=self.knn_lambda))


def exact_distances(queries, ids, keys, metric):
    """Distances of queries to the entries *ids*, computed from the stored keys.

    Args:
        queries (ndarray): shape (N, D), float32.
        ids (ndarray): shape (N, k); -1 where there is none.
        keys (ndarray): shape (entries, D).
        metric (str): ``l2`` or ``ip``.

    Returns:
        ndarray: shape (N, k), float32; +inf where there is none.
    """
    keys = keys.view(np.ndarray)  # fancy indexing of a memmap is slower
    distances = np.empty(ids.shape, dtype=np.float32)
    step = max(1, _GATHERED // (ids.shape[1] * keys.shape[1]))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        near = torch.from_numpy(keys[np.maximum(ids[rows], 0)]).float()
        query = torch.from_numpy(queries[rows])[:, None]
        gaps = (near - query).square_().sum(2) if metric == "l2" else -(near * query).sum(2)
        distances[rows] = gaps.numpy()
    distances[ids < 0] = np.inf
    return distances


def exhaustive_search(datastore, device):
    """Search of all keys of a datastore on a device."""
    stored = datastore.keys, datastore.values, datastore.manifest["metric"]
    return ExhaustiveSearch(*stored, device=device)


def exhaustive_neighbors(queries, ids, datastore):
    """What exhaustive search found, with distances free of the rounding of matrix products.

    Args:
        queries (Tensor): shape (N, D).
        ids (LongTensor): shape (N, k).
        datastore (Datastore): what was searched.

    Returns:
        Neighbors: nearest first, on the CPU.
    """
    queries, ids = queries.float().cpu().numpy(), ids.cpu().numpy()
    exact = exact_distances(queries, ids, datastore.keys, datastore.manifest["metric"])
    order = exact.argsort(axis=1, kind="stable")
    exact, ids = (np.take_along_axis(part, order, axis=1) for part in (exact, ids))
    return as_neighbors(exact, ids, datastore)


def as_neighbors(distances, ids, datastore):
    """``Neighbors`` of arrays of distances and ids, with the values of *datastore*."""
    values = datastore.values[np.maximum(ids, 0)].astype(np.int64)
    values[ids < 0] = 0
    return Neighbors(*(torch.from_numpy(part) for part in (distances, values, ids)))


class Judge:
    """Compares neighbours with those of exhaustive search.

    Args:
        queries (Queries): whose neighbours are judged.
        datastore (Datastore): what is searched.
        mixture (Mixture): what perplexities and masses are of.
        reference (Neighbors): of all *queries*, by exhaustive search.
    """

    def __init__(self, queries, datastore, mixture, reference):
        self._queries, self._datastore, self._mixture = queries, datastore, mixture
        self._reference = reference

    def reference_perplexity(self, k, count):
        """Of exhaustive search for *k* neighbours, on the first *count* queries."""
        reference = Neighbors(*(part[:count, :k] for part in self._reference))
        return self._mixture.perplexity(self._queries.first(count), reference)

    def __call__(self, neighbors):
        """Figures of the neighbours of the first queries, as many as there are rows.

        Returns:
            dict: ``recall``, share of the k nearest found; ``mass_recall``, share of the sum of
            exp(-d / T) over the k nearest found, both in [0, 1], higher is better;
            ``perplexity``, with the distances as given; ``perplexity_gap``, relative to that of
            exhaustive search.
        """
        neighbors = Neighbors(*(part.cpu() for part in neighbors))
        count, k = neighbors.ids.shape
        queries = self._queries.first(count)
        found_perplexity = self._mixture.perplexity(queries, neighbors)
        return {
            "perplexity": found_perplexity,
            "perplexity_gap": found_perplexity / self.reference_perplexity(k, count) - 1,
            **self._recalls(queries.keys.float().cpu().numpy(), neighbors.ids.numpy()),
        }

    def _recalls(self, queries, ids):
        manifest, keys = self._datastore.manifest, self._datastore.keys
        count, k = ids.shape
        exact = self._reference.distances[:count, :k].numpy()
        found = exact_distances(queries, ids, keys, manifest["metric"])
        # products and differences are rounded differently
        slack = 1e-5 * np.abs(exact[:, -1:]) + 1e-6 * np.square(queries).sum(1, keepdims=True)
        masses = [
            np.exp((exact[:, :1] - part) / self._mixture.temperature, dtype=np.float64).sum(axis=1)
            for part in (np.where(found <= exact[:, -1:] + slack, found, np.inf), exact)
        ]
        return {
            "recall": float((found <= exact[:, -1:] + slack).mean()),
            "mass_recall": float(np.minimum(masses[0] / masses[1], 1).mean()),
        }
