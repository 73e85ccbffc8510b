"""Exact distances the straightforward way, as the public implementations compute them.

Each batch of the model is searched for by itself in an IVF-PQ index, and the keys of each query's
candidates are gathered from the memory-mapped file.
"""

import faiss
import numpy as np
from quality import as_neighbors

from fairseq_knnlm.search.index_build import load


def straightforward_factory(datastore):
    """The paper's 64-byte codes, in as many lists as the index of *datastore* has."""
    nlist = datastore.manifest["index"]["nlist"] or max(1, round(len(datastore) ** 0.5))
    return f"IVF{nlist},PQ{sub_quantizers(datastore.dimension, 64)}"


def sub_quantizers(dimension, most):
    """The largest number of parts, of at most *most*, that a key can be cut into."""
    return max(number for number in range(1, most + 1) if dimension % number == 0)


class Straightforward:
    """Finds candidates in an index, and computes their distances query by query.

    Args:
        datastore (Datastore): holds keys and values.
        index_path (str): an IVF-PQ index of its keys.
        k (int): neighbours per query.
        nprobe (int): inverted lists visited.
    """

    def __init__(self, datastore, index_path, k, nprobe):
        self._datastore, self._k = datastore, k
        self._index = load(index_path)
        self._params = faiss.SearchParametersIVF(nprobe=nprobe)

    def search(self, queries):
        """The k nearest by the index, not in order, with their exact distances.

        Args:
            queries (Tensor): shape (N, D).
        """
        queries = np.ascontiguousarray(queries.float().cpu().numpy())
        _, ids = self._index.search(queries, self._k, params=self._params)
        distances = np.full(ids.shape, np.inf, dtype=np.float32)
        for query, candidates, row in zip(queries, ids, distances):
            found = candidates >= 0
            row[found] = self._distances(query, candidates[found])
        return as_neighbors(distances, ids, self._datastore)

    def _distances(self, query, candidates):
        keys = self._datastore.keys[candidates].astype(np.float32)
        if self._datastore.manifest["metric"] == "ip":
            return -(keys @ query)
        return np.square(keys - query).sum(axis=1)
