"""Train, fill, save and load a FAISS index: one sequential pass over the keys, resumable."""

import contextlib
import os
import time
from collections.abc import Iterator

import numpy as np

from ..arguments import check_arguments
from ..errors import UserError
from ..fields import one_of
from ..options import METRICS
from ..progress import track
from ..units import in_time
from .faiss_import import faiss
from .index_factory import describe, inverted_file, make_index, training_rows
from .searcher import CheckRows, trust

# The index is saved each time that this many rows have been added: an interrupted build loses no
# more.
PART_ROWS = 1 << 23
# A larger index is saved each time that it has grown by this share. With a half, all bytes that are
# ever written are three times the index.
PART_SHARE = 0.5
# Keys in float32 that are in memory at a time.
BLOCK_BYTES = 1 << 26
_SEED = 1234
# Keys that a duration is extrapolated from, and the shortest one that is worth a word.
_TRIED_ROWS = 4096
_WORTH_SAYING_S = 5.0


def _blocks(keys: np.ndarray, start: int, stop: int, check_rows: CheckRows) -> Iterator[np.ndarray]:
    """Rows of *keys* as float32, in blocks of bounded memory."""
    step = _block_rows(keys)
    for begin in range(start, stop, step):
        block = keys[begin : min(begin + step, stop)]
        check_rows(range(begin, begin + len(block)))
        if isinstance(keys, np.memmap):  # mapped pages would stay in memory
            offset = keys.offset + begin * keys.strides[0]
            flat = np.fromfile(keys.filename, keys.dtype, block.size, offset=offset)
            block = flat.reshape(block.shape)
        yield np.asarray(block, dtype=np.float32)


def _block_rows(keys: np.ndarray) -> int:
    return max(1, BLOCK_BYTES // (4 * keys.shape[1]))


def training_sample(keys: np.ndarray, size: int) -> np.ndarray:
    """Keys drawn without replacement, read in the order of the file.

    Args:
        keys (ndarray): shape (N, D), float16.
        size (int): how many; all of them if there are fewer.

    Returns:
        ndarray: shape (size, D), float32.
    """
    if size >= len(keys):
        return np.asarray(keys, dtype=np.float32)
    rows = np.random.default_rng(_SEED).choice(len(keys), size, replace=False)
    return read_rows(keys, np.sort(rows))


def read_rows(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Given keys.

    Args:
        keys (ndarray): shape (N, D), float16.
        rows (ndarray): shape (n,), int64.

    Returns:
        ndarray: shape (n, D), float32.
    """
    if not isinstance(keys, np.memmap):
        return np.asarray(keys[rows], dtype=np.float32)
    # Mapped, a page and its neighbours would stay in memory for every row.
    sample = np.empty((len(rows), keys.shape[1]), dtype=keys.dtype)
    with open(keys.filename, "rb") as file:
        for target, row in zip(sample, rows.tolist()):
            os.preadv(file.fileno(), [target], keys.offset + row * keys.strides[0])
    return sample.astype(np.float32)


def _train(index, keys: np.ndarray, report) -> None:
    if index.is_trained:
        return
    sample = training_sample(keys, training_rows(index, len(keys)))
    report(f"training the index on {len(sample):,} keys{_expected(index, sample)}")
    try:
        index.train(sample)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"FAISS cannot train this --knn-index on {len(sample)} keys ({reason}); "
            "use fewer lists, or Flat"
        ) from None


def _expected(index, sample: np.ndarray) -> str:
    """How long the training of an inverted file will take, in words; FAISS does not say how far.

    Nearly all of it is k-means: the distances of every key to all centroids, again and again.
    """
    ivf = inverted_file(index)
    if ivf is None:
        return ""
    rows, centroids = sample[:_TRIED_ROWS], sample[: ivf.nlist].T
    rows @ centroids  # the first product starts threads
    started = time.monotonic()
    rows @ centroids
    seconds = (time.monotonic() - started) * len(sample) / len(rows) * (ivf.cp.niter + 1)
    return "" if seconds < _WORTH_SAYING_S else f", about {in_time(seconds)}"


def build_index(
    keys: np.ndarray,
    index_factory: str,
    metric: str,
    path: str,
    work_path: str,
    report=print,
    check_rows: CheckRows = trust,
) -> dict:
    """Train an index, add all keys in one sequential pass, and save it.

    What is done is kept in *work_path*, and a build that was interrupted goes on from there to the
    same bytes.

    Args:
        keys (ndarray): shape (N, D), float16; row i gets id i.
        index_factory (str): FAISS factory string.
        metric (str): ``l2`` or ``ip``.
        path (str): file to write, atomically.
        work_path (str): directory for intermediate files.
        report (callable): takes a line of progress.
        check_rows (callable): see ``searcher.CheckRows``.

    Returns:
        dict: description for the manifest.

    Raises:
        UserError: if FAISS refuses the factory string or the number of keys, there is no such
            metric, or the disk is full.
    """
    check_arguments("build_index", metric=(metric, one_of(METRICS)))
    os.makedirs(work_path, exist_ok=True)
    begun_path = os.path.join(work_path, "begun.faiss")
    if os.path.exists(begun_path):
        index = load(begun_path)
    else:
        index = make_index(index_factory, keys.shape[1], metric)
        _train(index, keys, report)
        save(index, begun_path)
    report(f"adding {len(keys) - index.ntotal:,} keys to the index")
    count = -(-(len(keys) - index.ntotal) // _block_rows(keys))
    for block in track("index", _saved_blocks(index, keys, path, begun_path, check_rows), count):
        _add(index, block)
    return describe(index, index_factory, metric)


def _saved_blocks(
    index, keys: np.ndarray, path: str, begun_path: str, check_rows: CheckRows
) -> Iterator[np.ndarray]:
    """The keys that are not in the index yet; it is saved whenever a part of them has been added.

    One index is filled, and no parts are merged: FAISS cannot merge every kind of index, and leaves
    bytes of merged fast-scan codes uninitialised.
    """
    while index.ntotal < len(keys):
        stop = part_end(index.ntotal, len(keys))
        yield from _blocks(keys, index.ntotal, stop, check_rows)
        save(index, begun_path if stop < len(keys) else path)


def part_end(done: int, count: int) -> int:
    """How many keys are in the index when it is saved next.

    Args:
        done (int): keys in it now.
        count (int): keys that it will hold.
    """
    return min(done + max(PART_ROWS, int(PART_SHARE * done)), count)


def _add(index, block: np.ndarray) -> None:
    try:
        index.add(block)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"FAISS cannot add {len(block)} keys to this --knn-index ({reason})"
        ) from None


def save(index, path: str) -> None:
    """Write an index to a temporary file, read its size back, and move it into place.

    Args:
        index: a FAISS index.
        path (str): the file.

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
            f"cannot write {path}: {str(error).splitlines()[-1]}; what is done so "
            "far is kept, run the same command again to go on"
        ) from None


def load(path: str):
    """Read an index.

    Raises:
        UserError: if the file is no index.
    """
    try:
        return faiss.read_index(path)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[-1]}") from None
