"""The entries that a FAISS index finds, with its own distances or with exact ones."""

import math
from collections.abc import Iterator
from typing import Optional

import numpy as np
import torch

from ..neighbors import Neighbors
from ..options import DEFAULT_NPROBE
from ..progress import track
from .devices import GPU_MAX_K, to_gpu
from .faiss_import import faiss
from .index_factory import inverted_file
from .inverted_lists import InvertedLists
from .keys_index import KeysIndex
from .ordering import in_order, nearest_first
from .searcher import Batch, CheckRows, as_array, gather, trust, with_values
from .threads import one_thread_each, slices

# The fewest candidates of the index that get exact distances. On 2M real keys this and the next
# three leave perplexity within 1e-5 of that of all keys in the probed lists up to k = 64, and
# within 0.0003 of brute force at k = 1024.
MIN_CANDIDATES = 128
# Candidates for each neighbour, as long as these are not more than MANY_CANDIDATES.
CANDIDATES_PER_NEIGHBOR = 8
MANY_CANDIDATES = 1024
# Candidates for each neighbour beyond that, so that there is always a choice.
CANDIDATES_OF_MANY = 1.5
# The index is asked for a few more than k. Of several entries at the distance of the k-th, those
# with the lowest ids are wanted.
TIES = 32
# Size of what FAISS returns in one call. It is written into the same memory again and again,
# because fresh memory costs more than what is done in it.
_CALL_BYTES = 1 << 24
# Bytes of a distance and an id.
_ENTRY_BYTES = 12
# Rows of a batch on a GPU.
_DEVICE_ROWS = 1 << 12


class IndexSearch:
    """Searches a FAISS index (the protocol of ``searcher.Searcher``).

    With the stored keys, more candidates than are asked for are taken from the index, and their
    exact distances decide.

    Args:
        keys (ndarray): shape (entries, D), float16, a memory-mapped ``.npy`` file: distances are
            exact. None: they are as the index has them.
        values (ndarray): shape (entries,), the token of each entry.
        metric (str): ``l2`` or ``ip``.
        index: a FAISS index of the keys, from ``index_build.load`` or ``index_check.load_checked``.
        nprobe (int): inverted lists visited by each query; all where the index has fewer.
        device (str): ``cpu`` or ``cuda``.
        check_rows (callable): see ``searcher.CheckRows``.
    """

    def __init__(
        self,
        keys: Optional[np.ndarray],
        values: np.ndarray,
        metric: str,
        *,
        index,
        nprobe: int = DEFAULT_NPROBE,
        device: str = "cpu",
        check_rows: CheckRows = trust,
    ):
        self._metric = metric
        self._values = values
        self._nprobe = nprobe
        self._device_values: Optional[torch.Tensor] = None
        self._check_rows = check_rows
        self._on_gpu = device == "cuda"
        self._params = _search_params(index, nprobe)
        self._compares_all = isinstance(index, faiss.IndexFlat)
        self._keys = KeysIndex(keys, metric) if keys is not None else None
        self._index = to_gpu(index) if self._on_gpu else index
        if self._keys is not None:
            self._refined = faiss.IndexRefine(self._index, self._keys.index)

    @property
    def lists(self) -> Optional[InvertedLists]:
        """The inverted lists; None where the index has none, or is on a GPU."""
        if self._on_gpu or inverted_file(self._index) is None:
            return None
        return InvertedLists(self._index, self._nprobe)

    def search(self, queries: torch.Tensor, k: int) -> Neighbors:
        """All batches as one, on the device of *queries*, see ``batches``."""
        return gather(self.batches(queries, k), k, queries.device)

    def batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """Search, see ``searcher.Searcher.batches``."""
        if queries.is_cuda and self._takes_tensors:
            return self._device_batches(queries, k)
        return self._host_batches(as_array(queries), k)

    # -- on the host ---------------------------------------------------------------------------

    def _host_batches(self, queries: np.ndarray, k: int) -> Iterator[Batch]:
        count = self._candidates(k)
        step = max(1, min(len(queries), _CALL_BYTES // (_ENTRY_BYTES * count)))
        out = np.empty((step, count), np.float32), np.empty((step, count), np.int64)
        starts = range(0, len(queries), step)
        for start in track("neighbours", starts, len(starts)):
            part = queries[start : start + step]
            candidates, order = self._candidate_search(part, count, out)
            places = order.argsort()

            def sort(rows, candidates=candidates, places=places):
                distances, ids = (each[places[rows]] for each in candidates)
                return with_values(*nearest_first(distances, ids, k), self._values)

            cuts = list(slices(len(part), count))
            with one_thread_each() as pool:
                nearest = list(pool.map(sort, cuts))
            for rows, neighbors in zip(cuts, nearest):
                yield slice(start + rows.start, start + rows.stop), neighbors

    def _candidate_search(self, queries: np.ndarray, count: int, out):
        """The nearest entries as FAISS finds them, and which query each row of them is of.

        Args:
            out (tuple of ndarray): what distances and ids are written into, at least (N, count).

        Returns:
            tuple: distances and ids, each (N, count), and the order of the queries, (N,).
        """
        params, index, order = self._params, self._index, np.arange(len(queries))
        if self._keys is not None:
            params = faiss.IndexRefineSearchParameters(k_factor=1, base_index_params=params)
            index, order = self._refined, self._list_order(queries)
        distances, ids = (part[: len(queries)] for part in out)
        index.search(queries[order], count, D=distances, I=ids, params=params)
        if self._keys is not None:  # FAISS has read the keys of these, and of no others
            self._check_rows(ids)
        if self._metric == "ip":
            np.negative(distances, out=distances)
        if (ids[:, -1:] < 0).any():  # nearest first, so the last tells
            distances[ids < 0] = np.inf
        return (distances, ids), order

    def _list_order(self, queries: np.ndarray) -> np.ndarray:
        """An order of the queries in which those nearest to one list stand side by side.

        They share candidates, whose keys are then in the cache: a quarter less time of re-scoring.
        """
        if not isinstance(self._index, faiss.IndexIVF):
            return np.arange(len(queries))
        return self._index.quantizer.assign(queries, 1)[:, 0].argsort(kind="stable")

    def _candidates(self, k: int) -> int:
        """How many entries FAISS is asked for."""
        wanted = k + TIES
        if self._keys is not None and not self._compares_all:
            few = min(CANDIDATES_PER_NEIGHBOR * k, MANY_CANDIDATES)
            wanted = max(wanted, MIN_CANDIDATES, few, math.ceil(CANDIDATES_OF_MANY * k))
        return min(wanted, self._index.ntotal, GPU_MAX_K if self._on_gpu else wanted)

    # -- on a GPU ------------------------------------------------------------------------------

    @property
    def _takes_tensors(self) -> bool:
        """Whether queries on a GPU are searched there without a copy on the host.

        Exact distances are computed from keys on the host, and the results of several GPUs are
        merged there.
        """
        return self._on_gpu and self._keys is None and faiss.get_num_gpus() == 1

    def _device_batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """As ``_host_batches`` without exact distances, on the device of the index."""
        values = self._values_on(queries.device)
        for start in range(0, len(queries), _DEVICE_ROWS):
            part = queries[start : start + _DEVICE_ROWS]
            distances, ids = self._device_search(part, k)
            missing = ids < 0
            tokens = values[ids.clamp(min=0)].long().masked_fill_(missing, 0)
            yield slice(start, start + len(part)), Neighbors(distances, tokens, ids)

    def _values_on(self, device: torch.device) -> torch.Tensor:
        """The values on a device, copied there once: a step of generation is one search."""
        if self._device_values is None or self._device_values.device != device:
            self._device_values = torch.from_numpy(self._values.astype(np.int32)).to(device)
        return self._device_values

    def _device_search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and ids, shape (n, k), on the device of the queries, which the index is on."""
        queries = queries.float().contiguous()
        count = self._candidates(k)
        distances = queries.new_empty(len(queries), count)
        ids = queries.new_empty(len(queries), count, dtype=torch.long)
        _wait_for(queries.device)  # FAISS works in a stream of its own
        # This is what FAISS's Python method calls with the addresses of arrays.
        self._index.search_c(
            len(queries),
            faiss.cast_integer_to_float_ptr(queries.data_ptr()),
            count,
            faiss.cast_integer_to_float_ptr(distances.data_ptr()),
            faiss.cast_integer_to_idx_t_ptr(ids.data_ptr()),
            self._params,
        )
        _wait_for(queries.device)
        if self._metric == "ip":
            distances.neg_()
        distances.masked_fill_(ids < 0, math.inf)
        distances, ids = in_order(distances, ids)
        return distances[:, :k], ids[:, :k]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _search_params(index, nprobe: int):
    """The search parameters for an nprobe, in the form that this kind of index takes."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(nprobe, index.nlist))
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_search_params(index.index, nprobe))
    if isinstance(index, faiss.IndexRefine):
        return faiss.IndexRefineSearchParameters(
            k_factor=index.k_factor, base_index_params=_search_params(index.base_index, nprobe)
        )
    return None
