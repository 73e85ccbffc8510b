"""The door to FAISS: choose, train, fill, save and load an index."""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .errors import UserError
from .list_search import MAX_KEYS

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
    ivf = inverted_file(index)
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
    grown = size(count) * (2 if inverted_file(index) is not None else 1)
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
    ivf = inverted_file(index)
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


def inverted_file(index):
    """The inverted file within *index*, or None; with its own type, unlike extract_index_ivf."""
    found = faiss.try_extract_index_ivf(index)
    return faiss.downcast_index(found) if found is not None else None


def describe(index, factory: str, metric: str) -> dict:
    """What the manifest says of an index."""
    ivf = inverted_file(index)
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
    ivf = inverted_file(index)
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
