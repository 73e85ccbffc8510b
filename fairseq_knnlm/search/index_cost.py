"""What an index will cost of disk and memory, before there is a key."""

from typing import NamedTuple

from .index_build import BLOCK_BYTES, part_end
from .index_factory import inverted_file, make_index, training_rows


def estimate_bytes(index_factory: str, count: int, dimension: int, metric: str) -> int:
    """About how large the index will be on disk.

    Args:
        index_factory (str): FAISS factory string.
        count (int): keys that it will hold.
        dimension (int): D.
        metric (str): ``l2`` or ``ip``.

    Raises:
        UserError: if FAISS does not know the factory string, or there is no such metric.
    """
    index = make_index(index_factory, dimension, metric)
    ivf = inverted_file(index)
    if ivf is None:
        try:
            return count * index.sa_code_size()
        except RuntimeError:
            return count * 4 * dimension
    # The codes of a fast scan fill blocks. The last block of a list is half empty on average.
    empty = ivf.nlist * (getattr(ivf, "bbs", 0) // 2)
    centroids = ivf.nlist + (ivf.pq.ksub if hasattr(ivf, "pq") else 0)
    return (count + empty) * ivf.code_size + count * 8 + centroids * dimension * 4


class IndexCost(NamedTuple):
    """What an index costs, in bytes. Memory is what comes on top of that of the process.

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


def estimate_cost(index_factory: str, count: int, dimension: int, metric: str) -> IndexCost:
    """What it costs to build an index, and to search it.

    Args:
        index_factory (str): FAISS factory string.
        count (int): keys that it will hold.
        dimension (int): D.
        metric (str): ``l2`` or ``ip``.

    Raises:
        UserError: as ``estimate_bytes``.
    """

    def size(rows):
        return estimate_bytes(index_factory, rows, dimension, metric)

    saved = 0
    while part_end(saved, count) < count:
        saved = part_end(saved, count)
    index = make_index(index_factory, dimension, metric)
    # The memory of a list is a power of two: up to twice its codes.
    grown = size(count) * (2 if inverted_file(index) is not None else 1)
    return IndexCost(
        file=size(count),
        parts=size(saved),
        training=0 if index.is_trained else training_rows(index, count) * dimension * 6,
        # Either keys in float32 and what FAISS makes of them, or the copy that save() reads back.
        building=max(grown + 5 * BLOCK_BYTES // 2, grown + size(count) + BLOCK_BYTES),
        loaded=grown,
    )
