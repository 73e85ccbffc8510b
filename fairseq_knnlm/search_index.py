"""Search an index: on a CPU or on GPUs, with its own distances or with exact ones."""

import logging
import math
import re
import struct
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch

from .errors import UserError
from .exhaustive import in_order
from .index import METRICS, faiss, inverted_file, load
from .list_search import ListSearch, nearest_first, one_thread_each, slices

logger = logging.getLogger(__name__)

# Exact distances are computed for at least this many candidates of the index, ...
MIN_CANDIDATES = 128
# ... for this many a neighbour while these are few, ...
CANDIDATES_PER_NEIGHBOR = 8
MANY_CANDIDATES = 1024
# ... and for this many a neighbour beyond. (2M real keys: perplexity is within 1e-5 of that of all
# keys in the probed lists up to k = 64; at k = 1024 it is 0.0003 from brute force.)
CANDIDATES_OF_MANY = 1.5
# For more neighbours than this, and at least one query for so many keys, visiting each list once
# costs less than candidates for each query.
FEW_NEIGHBORS = 16
KEYS_PER_QUERY = 100
# The index is asked for a few more, so that of those at one distance it is known which come first.
TIES = 32
# What FAISS returns at a time: fresh memory costs more than what is done in it.
_FOUND_BYTES = 1 << 24
# Limits of FAISS's GPU indexes.
GPU_MAX_K = 2048
GPU_MAX_NPROBE = 2048
GPU_SUB_QUANTIZERS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)


def gpu_available() -> bool:
    """Whether this FAISS can search on a GPU of this machine."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def choose_device(device: str, factory: str, k: int, nprobe: int) -> str:
    """Where an index is searched: *device*, or for ``auto`` a GPU if that is possible.

    Raises:
        UserError: if ``cuda`` is asked for and impossible, saying why.
    """
    if device == "cpu":
        return "cpu"
    obstacle = _gpu_obstacle(factory, k, nprobe)
    if device == "cuda" and obstacle:
        raise UserError(
            f"fairseq_knnlm: --knn-device cuda: {obstacle}; use --knn-device cpu, or "
            "--knn-distances exhaustive, which needs no index"
        )
    if obstacle and torch.cuda.is_available():
        logger.info(f"the index is searched on the CPU: {obstacle}")
    return "cpu" if obstacle else "cuda"


def _gpu_obstacle(factory: str, k: int, nprobe: int) -> Optional[str]:
    if not gpu_available():
        return "FAISS sees no GPU (is faiss-gpu installed?)"
    if re.search(r"fs|Refine|RaBitQ|HNSW", factory):
        return f"FAISS has no GPU version of the index {factory}; IVF4096,PQ64 has one"
    quantizer = re.search(r"(?<![A-Z])PQ(\d+)(?:x(\d+))?", factory)
    if quantizer and (int(quantizer[1]) not in GPU_SUB_QUANTIZERS or int(quantizer[2] or 8) != 8):
        return (
            f"FAISS's product quantisers on a GPU have 8 bits and one of {GPU_SUB_QUANTIZERS} "
            f"sub-quantisers, the index is {factory}"
        )
    if k > GPU_MAX_K:
        return f"FAISS finds at most {GPU_MAX_K} neighbours on a GPU, --knn-k is {k}"
    if nprobe > GPU_MAX_NPROBE:
        return f"FAISS visits at most {GPU_MAX_NPROBE} lists on a GPU, --knn-nprobe is {nprobe}"
    return None


def _to_gpu(index):
    options = faiss.GpuMultipleClonerOptions()
    # 64 sub-quantisers need more shared memory for float32 tables than a block has
    options.useFloat16 = True
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, options)


class Found(NamedTuple):
    """Result of a search.

    distances (ndarray): shape (N, k), float32, lower is closer; +inf where there is none.
    ids (ndarray): shape (N, k), int64; -1 where there is none.
    """

    distances: np.ndarray
    ids: np.ndarray


class SearchIndex:
    """An index on disk, loaded for searching.

    Exact distances are computed from the keys. For many queries of an inverted file, each of its
    lists is visited once and all that is in the probed ones compared; for few, and for other kinds
    of index, more candidates than are asked for are taken from the index and re-scored.

    Args:
        path (str): the file.
        metric (str): ``l2`` or ``ip``.
        keys (ndarray): shape (N, D), float16, a memory-mapped ``.npy`` file: distances are exact.
            None: as the index returns them.
        device (str): ``cpu`` or ``cuda``.
    """

    def __init__(self, path: str, metric: str, keys: Optional[np.ndarray], device: str = "cpu"):
        self._metric = metric
        self._index = load(path)
        self._on_gpu = device == "cuda"
        self._params = _search_params(self._index)
        self._exhaustive = isinstance(self._index, faiss.IndexFlat)
        self._ivf = inverted_file(self._index)
        self._keys = _KeysIndex(keys, metric) if keys is not None else None
        self._lists = None
        if self._keys is not None and self._ivf is not None and not self._on_gpu:
            self._lists = self._list_search(keys)
        if self._on_gpu:
            self._index = _to_gpu(self._index)
        if self._keys is not None:
            self._refined = faiss.IndexRefine(self._index, self._keys.index)

    def search(self, queries: np.ndarray, k: int, nprobe: int) -> Found:
        """The k nearest entries, nearest first.

        Args:
            queries (ndarray): shape (N, D), float32.
            k (int): at most the number of entries.
            nprobe (int): inverted lists visited; all where the index has fewer.
        """
        found = Found(
            np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), np.int64)
        )

        def keep(rows, distances, ids):
            found.distances[rows], found.ids[rows] = distances, ids

        self.map(keep, queries, k, nprobe)
        return found

    def map(self, function: Callable, queries: np.ndarray, k: int, nprobe: int) -> list:
        """Search, and use what is found for some queries at a time, by several threads.

        Args:
            function (callable): takes a slice of the queries, and their distances and ids as
                ``Found`` has them.

        Returns:
            list: its results, in the order of the queries.
        """
        if self._visits_lists(len(queries), k):
            return self._lists.map(function, queries, self._probes(queries, nprobe), k)
        count = self._candidates(k)
        step = max(1, min(len(queries), _FOUND_BYTES // (12 * count)))
        room = Found(np.empty((step, count), np.float32), np.empty((step, count), np.int64))
        results: list = []
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            found, order = self._candidate_search(part, count, nprobe, room)
            places = order.argsort()

            def use(rows, start=start, found=found, places=places):
                distances, ids = (each[places[rows]] for each in found)
                return function(
                    slice(start + rows.start, start + rows.stop), *nearest_first(distances, ids, k)
                )

            with one_thread_each() as pool:
                results += pool.map(use, slices(len(part), count))
        return results

    @property
    def takes_tensors(self) -> bool:
        """Whether queries on a GPU are searched there without a copy on the host.

        Exact distances are computed from keys on the host, and the results of several GPUs are
        merged there.
        """
        return self._on_gpu and self._keys is None and faiss.get_num_gpus() == 1

    def search_tensors(self, queries: torch.Tensor, k: int, nprobe: int):
        """As ``search`` without exact distances, for tensors on the device of the index.

        Returns:
            tuple: distances, shape (N, k), float32, and ids, shape (N, k), int64, on that device.
        """
        queries = queries.float().contiguous()
        count = self._candidates(k)
        distances = queries.new_empty(len(queries), count)
        ids = queries.new_empty(len(queries), count, dtype=torch.long)
        # FAISS works in a stream of its own
        _wait_for(queries.device)
        # what the Python method calls with the addresses of arrays
        self._index.search_c(
            len(queries),
            faiss.cast_integer_to_float_ptr(queries.data_ptr()),
            count,
            faiss.cast_integer_to_float_ptr(distances.data_ptr()),
            faiss.cast_integer_to_idx_t_ptr(ids.data_ptr()),
            self._params(nprobe),
        )
        _wait_for(queries.device)
        if self._metric == "ip":
            distances.neg_()
        distances.masked_fill_(ids < 0, math.inf)
        distances, ids = in_order(distances, ids)
        return distances[:, :k], ids[:, :k]

    def _visits_lists(self, queries: int, k: int) -> bool:
        return (
            self._lists is not None
            and k > FEW_NEIGHBORS
            and self._index.ntotal <= KEYS_PER_QUERY * queries
        )

    def _list_search(self, keys: np.ndarray) -> ListSearch:
        lists = self._ivf.invlists

        def ids_of(number):
            size = lists.list_size(number)
            ids = lists.get_ids(number) if size else None
            return faiss.rev_swig_ptr(ids, size) if size else np.empty(0, dtype=np.int64)

        return ListSearch(keys, ids_of, self._ivf.nlist, self._metric, _PAIRS[self._metric])

    def _probes(self, queries: np.ndarray, nprobe: int) -> np.ndarray:
        """Lists nearest to each query, shape (N, nprobe), int64."""
        index = faiss.downcast_index(self._index)
        while not isinstance(index, faiss.IndexIVF):
            if isinstance(index, faiss.IndexPreTransform):
                for number in range(index.chain.size()):
                    transform = faiss.downcast_VectorTransform(index.chain.at(number))
                    queries = transform.apply(queries)
                index = faiss.downcast_index(index.index)
            else:
                index = faiss.downcast_index(index.base_index)
        return index.quantizer.search(queries, min(nprobe, index.nlist))[1]

    def _candidate_search(self, queries: np.ndarray, count: int, nprobe: int, room: Found):
        """The nearest entries as FAISS finds them, and which of the queries each row is of."""
        params, index, order = self._params(nprobe), self._index, np.arange(len(queries))
        if self._keys is not None:
            params = faiss.IndexRefineSearchParameters(k_factor=1, base_index_params=params)
            index, order = self._refined, self._neighbourly(queries)
        distances, ids = (part[: len(queries)] for part in room)
        index.search(queries[order], count, D=distances, I=ids, params=params)
        if self._metric == "ip":
            np.negative(distances, out=distances)
        if (ids[:, -1:] < 0).any():  # nearest first, none last
            distances[ids < 0] = np.inf
        return Found(distances, ids), order

    def _neighbourly(self, queries: np.ndarray) -> np.ndarray:
        """An order of the queries in which those of one list stand side by side.

        They share candidates, whose keys are then in the cache: a quarter less time of re-scoring.
        """
        if not isinstance(self._index, faiss.IndexIVF):
            return np.arange(len(queries))
        return self._index.quantizer.assign(queries, 1)[:, 0].argsort(kind="stable")

    def _candidates(self, k: int) -> int:
        """How many entries FAISS is asked for."""
        wanted = k + TIES
        if self._keys is not None and not self._exhaustive:
            few = min(CANDIDATES_PER_NEIGHBOR * k, MANY_CANDIDATES)
            wanted = max(wanted, MIN_CANDIDATES, few, math.ceil(CANDIDATES_OF_MANY * k))
        return min(wanted, self._index.ntotal, GPU_MAX_K if self._on_gpu else wanted)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pair_distances(compute: Callable, sign: int) -> Callable:
    """What ``ListSearch`` measures pairs with."""

    def distances(queries, rows, keys, columns):
        faiss.omp_set_num_threads(1)  # of this thread of a pool
        result = np.empty(len(rows), dtype=np.float32)
        pointers = [faiss.swig_ptr(part) for part in (queries, rows, keys, columns, result)]
        compute(keys.shape[1], len(rows), *pointers)
        return np.negative(result, out=result) if sign < 0 else result

    return distances


_PAIRS = {
    "l2": _pair_distances(faiss.pairwise_indexed_L2sqr, 1),
    "ip": _pair_distances(faiss.pairwise_indexed_inner_product, -1),
}


def _search_params(index) -> Callable:
    """What makes the search parameters for an nprobe, in the form that this kind of index takes."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVF):
        nlist = index.nlist
        return lambda nprobe: faiss.SearchParametersIVF(nprobe=min(nprobe, nlist))
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_params(index.index)
        return lambda nprobe: faiss.SearchParametersPreTransform(index_params=inner(nprobe))
    if isinstance(index, faiss.IndexRefine):
        base, k_factor = _search_params(index.base_index), index.k_factor
        return lambda nprobe: faiss.IndexRefineSearchParameters(
            k_factor=k_factor, base_index_params=base(nprobe)
        )
    return lambda nprobe: None


class _KeysIndex:
    """FAISS's view of the keys of a datastore, without a copy of them.

    FAISS reads an index from memory and can leave the vectors where they are. Its header for a
    float16 index is shorter than that of a ``.npy`` file, so it is written over the end of the
    latter in a private mapping of the file: in memory only, on one page.
    """

    def __init__(self, keys: np.ndarray, metric: str):
        count, dimension = keys.shape
        empty = faiss.IndexScalarQuantizer(
            dimension, faiss.ScalarQuantizer.QT_fp16, METRICS[metric]
        )
        empty.is_trained = True
        empty.ntotal = count
        # the header ends with the number of bytes that follow
        header = faiss.serialize_index(empty)[:-8].tobytes() + struct.pack("<Q", keys.nbytes)
        self._mapping = np.memmap(keys.filename, dtype=np.uint8, mode="c")
        start = keys.offset - len(header)
        self._mapping[start : keys.offset] = np.frombuffer(header, dtype=np.uint8)
        view = self._mapping[start:]
        self._reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(view), view.nbytes)
        self.index = faiss.read_index(self._reader, faiss.IO_FLAG_MMAP_IFC)
