"""A FAISS index over the stored keys themselves, without a copy of them."""

import struct

import numpy as np

from ..errors import UserError
from .faiss_import import FAISS_METRICS, faiss


class KeysIndex:
    """FAISS's view of the keys of a datastore: exact distances of given entries.

    FAISS reads an index from memory and can leave the vectors where they are. Its header for a
    float16 index is shorter than that of a ``.npy`` file, so it is written over the end of the
    latter in a private mapping of the file: in memory only, on one page.

    Args:
        keys (ndarray): shape (N, D), float16, a memory-mapped ``.npy`` file.
        metric (str): ``l2`` or ``ip``.

    Attributes:
        index: a ``faiss.IndexScalarQuantizer``.

    Raises:
        UserError: if the header of the file is too short to be written over.
    """

    def __init__(self, keys: np.ndarray, metric: str):
        header = _header(*keys.shape, metric, keys.nbytes)
        start = keys.offset - len(header)
        if start < 0:
            raise UserError(
                f"{keys.filename} has its keys at byte {keys.offset}, FAISS needs {len(header)} "
                "bytes in front of them: was it written by fairseq-knnlm-build? Build it again"
            )
        self._mapping = np.memmap(keys.filename, dtype=np.uint8, mode="c")
        self._mapping[start : keys.offset] = np.frombuffer(header, dtype=np.uint8)
        view = self._mapping[start:]
        self._reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(view), view.nbytes)
        self.index = faiss.read_index(self._reader, faiss.IO_FLAG_MMAP_IFC)


def _header(count: int, dimension: int, metric: str, size_bytes: int) -> bytes:
    """What stands in front of the vectors of a serialised float16 index."""
    empty = faiss.IndexScalarQuantizer(
        dimension, faiss.ScalarQuantizer.QT_fp16, FAISS_METRICS[metric]
    )
    empty.is_trained = True
    empty.ntotal = count
    # It ends with the number of bytes that follow, which is 0 for the empty index.
    return faiss.serialize_index(empty)[:-8].tobytes() + struct.pack("<Q", size_bytes)
