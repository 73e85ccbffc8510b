"""The inverted lists of a FAISS index, and exact distances of pairs: what ``ListSearch`` reads."""

from typing import Callable

import numpy as np

from .faiss_import import faiss
from .index_factory import inverted_file


class InvertedLists:
    """The lists of an index and which of them each query probes.

    Args:
        index: a FAISS index with an inverted file in it.
        nprobe (int): lists probed by each query; all where there are fewer.

    Attributes:
        sizes (ndarray): shape (nlist,), int64, entries of each list.
    """

    def __init__(self, index, nprobe: int):
        self._index = index  # the inverted file is a part of it, and must not outlive it
        self._ivf = inverted_file(index)
        self._nprobe = min(nprobe, self._ivf.nlist)
        lists = self._ivf.invlists
        self.sizes = np.array([lists.list_size(number) for number in range(self._ivf.nlist)])

    def ids(self, number: int) -> np.ndarray:
        """Rows of the keys in a list, shape (size,), int64."""
        size = int(self.sizes[number])
        if not size:
            return np.empty(0, dtype=np.int64)
        return faiss.rev_swig_ptr(self._ivf.invlists.get_ids(number), size)

    def probes(self, queries: np.ndarray) -> np.ndarray:
        """The lists nearest to each query.

        Args:
            queries (ndarray): shape (N, D), float32.

        Returns:
            ndarray: shape (N, nprobe), int64, numbers of lists, nearest first.
        """
        index = faiss.downcast_index(self._index)
        while not isinstance(index, faiss.IndexIVF):
            if isinstance(index, faiss.IndexPreTransform):
                for number in range(index.chain.size()):
                    transform = faiss.downcast_VectorTransform(index.chain.at(number))
                    queries = transform.apply(queries)
                index = faiss.downcast_index(index.index)
            else:
                index = faiss.downcast_index(index.base_index)
        return index.quantizer.search(queries, self._nprobe)[1]


def pair_distances(metric: str) -> Callable:
    """The function that measures given pairs of queries and keys.

    Args:
        metric (str): ``l2`` or ``ip``.

    Returns:
        callable: takes float32 queries (n, D), int64 rows of them (p,), float32 keys (m, D) and
        int64 rows of those (p,); gives p distances, float32, lower is closer.
    """
    compute = {
        "l2": faiss.pairwise_indexed_L2sqr,
        "ip": faiss.pairwise_indexed_inner_product,
    }[metric]

    def distances(queries, rows, keys, columns):
        faiss.omp_set_num_threads(1)  # it is called by threads of a pool, each with a core
        result = np.empty(len(rows), dtype=np.float32)
        pointers = [faiss.swig_ptr(part) for part in (queries, rows, keys, columns, result)]
        compute(keys.shape[1], len(rows), *pointers)
        return np.negative(result, out=result) if metric == "ip" else result

    return distances
