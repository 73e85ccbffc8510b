"""The only door to FAISS: choose, train, fill, save, load and search an index."""

import contextlib
import logging
import math
import os
import re
import struct
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional

import numpy as np

from .errors import UserError
from .list_search import MAX_KEYS, ListSearch, nearest_first, one_thread_each, slices

# FAISS tells at INFO, in seven lines, which of its builds it loads
logging.getLogger("faiss.loader").setLevel(logging.WARNING)
try:
    import faiss
except (ImportError, RuntimeError) as error:  # a broken CUDA library raises RuntimeError
    raise UserError(
        f"fairseq_knnlm: FAISS cannot be imported ({error}): pip install 'fairseq_knnlm[cpu]', or "
        "'fairseq_knnlm[gpu]' where there is a GPU, never both"
    ) from error

METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}

# Below this many keys an exhaustive search costs less than training an index.
FLAT_BELOW = 8192
# The paper's WikiText-103 index has 4096 lists for 103M keys.
MAX_NLIST = 4096
# FAISS warns below 39 training keys a list and ignores more than 256.
TRAINING_KEYS_PER_LIST = 64
# Rows added before the index is saved: what an interrupted build loses at most, ...
PART_ROWS = 1 << 23
# ... or this share of it, once that is more: all that is ever saved is three times the index.
PART_SHARE = 0.5
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
# A limit of FAISS's GPU indexes.
GPU_MAX_K = 2048
_BLOCK_BYTES = 1 << 26
_SEED = 1234


def faiss_version() -> str:
    """Version of the FAISS that is running."""
    return faiss.__version__


def default_factory(count: int, dimension: int) -> str:
    """A FAISS factory string for *count* keys.

    About 1.7 sqrt(N) lists, up to the paper's 4096, and 64-byte codes: 128
    sub-quantisers of 4 bits, which are scanned in registers, in place of the paper's 64 of 8.
    """
    if count < FLAT_BELOW:
        return "Flat"
    nlist = min(MAX_NLIST, 64 * round(1.7 * math.sqrt(count) / 64))
    sub_quantizers = max(m for m in range(1, 129) if dimension % m == 0)
    return f"IVF{nlist},PQ{sub_quantizers}x4fs"


def make_index(factory: str, dimension: int, metric: str):
    """An empty, untrained FAISS index.

    Raises:
        UserError: if FAISS does not know the factory string.
    """
    # "PQ16" would turn on polysemous training, 30 times slower and not used here
    plain = re.sub(r"(?<![A-Z])(PQ\d+(x\d+)?)(?=$|,)", r"\1np", factory)
    try:
        return faiss.index_factory(dimension, plain, METRICS[metric])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"fairseq_knnlm: --knn-index {factory!r} is no FAISS index for {dimension} dimensions "
            f"({reason}); see the FAISS wiki, 'The index factory', e.g. IVF4096,PQ64 or Flat"
        ) from None


def estimate_bytes(factory: str, count: int, dimension: int, metric: str) -> int:
    """About how large the index will be on disk."""
    index = make_index(factory, dimension, metric)
    ivf = _ivf(index)
    if ivf is None:
        try:
            return count * index.sa_code_size()
        except RuntimeError:
            return count * 4 * dimension
    # fast-scan codes fill blocks, of which the last of a list is half empty on average
    empty = ivf.nlist * (getattr(ivf, "bbs", 0) // 2)
    centroids = ivf.nlist + (ivf.pq.ksub if hasattr(ivf, "pq") else 0)
    return (count + empty) * ivf.code_size + count * 8 + centroids * dimension * 4


class IndexCost(NamedTuple):
    """What an index costs, in bytes, as far as can be told before it is there.

    Of memory, what comes to that of the process.

    file (int): the finished file.
    parts (int): on the disk beside it while it is built.
    training (int): memory while it is trained.
    building (int): memory while it is filled and saved.
    loaded (int): memory of searching it, but for queries and results.
    """

    file: int
    parts: int
    training: int
    building: int
    loaded: int


def estimate_cost(factory: str, count: int, dimension: int, metric: str) -> IndexCost:
    """What it costs to build an index of *count* keys, and to search it."""

    def size(rows):
        return estimate_bytes(factory, rows, dimension, metric)

    saved = 0
    while _part_end(saved, count) < count:
        saved = _part_end(saved, count)
    index = make_index(factory, dimension, metric)
    # a list has room for up to twice its codes, the next power of two
    grown = size(count) * (2 if _ivf(index) is not None else 1)
    return IndexCost(
        file=size(count),
        parts=size(saved),
        training=0 if index.is_trained else _training_rows(index, count) * dimension * 6,
        # keys in float32 and what FAISS makes of them; or the copy that is read back when saved
        building=max(grown + 5 * _BLOCK_BYTES // 2, grown + size(count) + _BLOCK_BYTES),
        loaded=grown,
    )


def refuse_unbuildable(factory: str, count: int, dimension: int, metric: str) -> None:
    """Refuse an index that cannot be built of *count* keys, before they are there.

    Raises:
        UserError: naming both numbers.
    """
    index = make_index(factory, dimension, metric)
    ivf = _ivf(index)
    kinds = [faiss.downcast_index(index)] + ([ivf] if ivf is not None else [])
    needed = max(
        [kind.pq.ksub for kind in kinds if hasattr(kind, "pq")]
        + [ivf.nlist if ivf is not None else 0]
    )
    if count > MAX_KEYS:
        raise UserError(
            f"fairseq_knnlm: a datastore holds {MAX_KEYS:,} keys at most, the split has {count:,}: "
            "build one of each part and name them all, separated by ':', in --knn-datastore"
        )
    if count < needed:
        raise UserError(
            f"fairseq_knnlm: --knn-index {factory} needs {needed:,} keys to be trained on, the "
            f"split has {count:,}: use fewer lists, or Flat"
        )


def _ivf(index):
    """The inverted file within *index*, or None; with its own type, unlike extract_index_ivf."""
    found = faiss.try_extract_index_ivf(index)
    return faiss.downcast_index(found) if found is not None else None


def describe(index, factory: str, metric: str) -> dict:
    """What the manifest says of an index."""
    ivf = _ivf(index)
    return {
        "factory": factory,
        "metric": metric,
        "nlist": ivf.nlist if ivf is not None else None,
        "faiss_version": faiss_version(),
    }


def _blocks(keys: np.ndarray, start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows of *keys* as float32, in blocks of bounded memory."""
    step = max(1, _BLOCK_BYTES // (4 * keys.shape[1]))
    for begin in range(start, stop, step):
        block = keys[begin : min(begin + step, stop)]
        if isinstance(keys, np.memmap):  # read: mapped pages would stay and look like a leak
            offset = keys.offset + begin * keys.strides[0]
            flat = np.fromfile(keys.filename, keys.dtype, block.size, offset=offset)
            block = flat.reshape(block.shape)
        yield np.asarray(block, dtype=np.float32)


def training_sample(keys: np.ndarray, size: int) -> np.ndarray:
    """*size* keys drawn without replacement, float32, read in the order of the file."""
    if size >= len(keys):
        return np.asarray(keys, dtype=np.float32)
    rows = np.random.default_rng(_SEED).choice(len(keys), size, replace=False)
    return read_rows(keys, np.sort(rows))


def read_rows(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some keys, shape (rows, D), float32."""
    if not isinstance(keys, np.memmap):
        return np.asarray(keys[rows], dtype=np.float32)
    # read, as in _blocks: mapped, a page and its neighbours would stay for every row
    sample = np.empty((len(rows), keys.shape[1]), dtype=keys.dtype)
    with open(keys.filename, "rb") as file:
        for target, row in zip(sample, rows.tolist()):
            os.preadv(file.fileno(), [target], keys.offset + row * keys.strides[0])
    return sample.astype(np.float32)


def _training_rows(index, count: int) -> int:
    """How many of *count* keys an index is trained on."""
    ivf = _ivf(index)
    return min(count, TRAINING_KEYS_PER_LIST * (ivf.nlist if ivf is not None else 1024))


def _train(index, keys: np.ndarray, report) -> None:
    if index.is_trained:
        return
    sample = training_sample(keys, _training_rows(index, len(keys)))
    report(f"training the index on {len(sample):,} keys")
    try:
        index.train(sample)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"fairseq_knnlm: FAISS cannot train this --knn-index on {len(sample)} keys ({reason}); "
            "use fewer lists, or Flat"
        ) from None


def build_index(
    keys: np.ndarray, factory: str, metric: str, path: str, work_path: str, report=print
) -> dict:
    """Train an index, add all keys in one sequential pass, and save it.

    What is done is kept in *work_path*, and a build that was interrupted goes on from there to the
    same bytes.

    Args:
        keys (ndarray): shape (N, D), float16; row i gets id i.
        factory (str): FAISS factory string.
        metric (str): ``l2`` or ``ip``.
        path (str): file to write, atomically.
        work_path (str): directory for intermediate files.
        report (callable): takes a line of progress.

    Returns:
        dict: description for the manifest.

    Raises:
        UserError: if FAISS refuses the factory string or the number of keys.
    """
    os.makedirs(work_path, exist_ok=True)
    begun_path = os.path.join(work_path, "begun.faiss")
    if os.path.exists(begun_path):
        index = load(begun_path)
    else:
        index = make_index(factory, keys.shape[1], metric)
        _train(index, keys, report)
        save(index, begun_path)
    # not in parts to be merged: FAISS merges not every kind, and of fast-scan codes leaves bytes
    # in the merged lists uninitialised
    while index.ntotal < len(keys):
        stop = _part_end(index.ntotal, len(keys))
        for block in _blocks(keys, index.ntotal, stop):
            _add(index, block)
            report(f"indexed {index.ntotal:,} of {len(keys):,} keys")
        save(index, begun_path if stop < len(keys) else path)
    return describe(index, factory, metric)


def _part_end(done: int, count: int) -> int:
    """How many of *count* keys are in the index when it is saved next."""
    return min(done + max(PART_ROWS, int(PART_SHARE * done)), count)


def _add(index, block: np.ndarray) -> None:
    try:
        index.add(block)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"fairseq_knnlm: FAISS cannot add {len(block)} keys to this --knn-index ({reason})"
        ) from None


def save(index, path: str) -> None:
    """Write an index to a temporary file, read its size back, and move it into place.

    Raises:
        UserError: if the disk is full or not writable.
    """
    temporary = f"{path}.tmp"
    try:
        faiss.write_index(index, temporary)
        # FAISS reports a failing close on stderr only
        if faiss.read_index(temporary, faiss.IO_FLAG_MMAP).ntotal != index.ntotal:
            raise RuntimeError("fewer entries on disk than in memory")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(
            f"fairseq_knnlm: cannot write {path}: {str(error).splitlines()[-1]}; what is done so "
            "far is kept, run the same command again to go on"
        ) from None


def load(path: str):
    """Read an index.

    Raises:
        UserError: if the file is no index.
    """
    try:
        return faiss.read_index(path)
    except RuntimeError as error:
        raise UserError(
            f"fairseq_knnlm: cannot read {path}: {str(error).splitlines()[-1]}"
        ) from None


def gpu_available() -> bool:
    """Whether this FAISS can search on a GPU of this machine."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def choose_device(device: str, factory: str, k: int) -> str:
    """Where an index is searched: *device*, or for ``auto`` a GPU if that is possible.

    Raises:
        UserError: if ``cuda`` is asked for and impossible, saying why.
    """
    if device == "cpu":
        return "cpu"
    obstacle = _gpu_obstacle(factory, k)
    if device == "cuda" and obstacle:
        raise UserError(f"fairseq_knnlm: --knn-device cuda: {obstacle}; use --knn-device cpu")
    return "cpu" if obstacle else "cuda"


def _gpu_obstacle(factory: str, k: int) -> Optional[str]:
    if not gpu_available():
        return "FAISS sees no GPU (is faiss-gpu installed?)"
    if re.search(r"fs|Refine|RaBitQ|HNSW", factory):
        return f"FAISS has no GPU version of the index {factory}; IVF4096,PQ64 has one"
    if k > GPU_MAX_K:
        return f"FAISS finds at most {GPU_MAX_K} neighbours on a GPU, --knn-k is {k}"
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
        self._ivf = _ivf(self._index)
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
                results += pool.map(use, slices(len(part)))
        return results

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
