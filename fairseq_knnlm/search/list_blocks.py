"""The queries and keys of one inverted list, cut into matrices that stay in a core's cache."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

# Elements of a matrix of keys or of products, which then stays in a core's cache.
_BLOCK = 1 << 20
_MAX_KEYS_OF_BLOCK = 1 << 12
# The number of rows of a matrix is rounded up to a multiple of this. A kernel is compiled for every
# shape, and so shapes are few.
_ROWS_STEP = 64
# Between one power of two and the next there are this many numbers of rows, no more.
_SIZES_OF_OCTAVE = 4


def keys_of_block(columns: int) -> int:
    """Keys of a block, of rows of *columns* elements."""
    return _fitting(columns, _MAX_KEYS_OF_BLOCK)


def queries_of_block(width: int, count: int) -> int:
    """Queries of a block.

    Args:
        width (int): elements of a row, of a query or of a product.
        count (int): how many there are at most.
    """
    return _fitting(width, count)


def _fitting(width: int, limit: int) -> int:
    """Rows of *width* elements that fit in a block with their padding, at most *limit*."""
    most = max(_ROWS_STEP, _BLOCK // width)
    return min(most - most % _step(most), limit)


def padded(count: int) -> int:
    """Rows of a matrix that has room for *count*."""
    return -(-count // _step(count)) * _step(count)


def _step(count: int) -> int:
    return max(_ROWS_STEP, (1 << count.bit_length() - 1) // _SIZES_OF_OCTAVE)


def elements_of_products(columns: int) -> int:
    """The most elements of a matrix of queries of a block, of *columns*, or of its products."""
    return max(_BLOCK, _ROWS_STEP * max(columns, _MAX_KEYS_OF_BLOCK))


def first_elements(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of a flat buffer, as a matrix of that shape."""
    return buffer[: math.prod(shape)].view(shape)


class Workspace:
    """Memory for one array at a time, kept from search to search.

    Fresh memory costs more than what is done in it.
    """

    def __init__(self):
        self._memory = np.empty(0, dtype=np.uint64)

    def array(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array in this memory; its content is undefined, and so is that of the one before.

        Args:
            shape (tuple of int): of the array.
            dtype (numpy.dtype): of its elements.
        """
        count = math.prod(shape)
        needed = -(-count * np.dtype(dtype).itemsize // self._memory.itemsize)
        if self._memory.size < needed:
            self._memory = np.empty(needed, dtype=np.uint64)
        return self._memory.view(dtype)[:count].reshape(shape)


class Scratch(NamedTuple):
    """Memory that a thread uses again and again.

    stored (ndarray): keys as they are stored.
    keys (ndarray): the same, float32.
    of_products: see ``near_pairs.Products``.
    """

    stored: np.ndarray
    keys: np.ndarray
    of_products: Any


class Block(NamedTuple):
    """Some queries, some keys of a list that they probe, and which of them are near.

    number (int): of the list.
    rows, slots (ndarray): shape (n,), queries, and the place of the list among their probes.
    first (int): place of the first of the keys in their list.
    ids (ndarray): shape (m,), the keys.
    keys (ndarray): shape (m, D), float32.
    products (Tensor): shape (n, at least m), of ``near_pairs.Products``. Columns beyond m are 0.
    """

    number: int
    rows: np.ndarray
    slots: np.ndarray
    first: int
    ids: np.ndarray
    keys: np.ndarray
    products: torch.Tensor

    def near(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that are near: for each the number of its query in the block, and of its key."""
        near = are_near(self.products)
        # Eight pairs are looked at together, because in most eights no pair is near. It takes half
        # the time of np.flatnonzero(near).
        eights = near.reshape(-1).view(np.uint64)
        hits = np.flatnonzero(eights != 0)
        within = np.flatnonzero(eights[hits].view(bool))
        places = (hits << 3)[within >> 3] + (within & 7)
        rows = places // near.shape[1]
        return rows, places - rows * near.shape[1]


def are_near(products: torch.Tensor) -> np.ndarray:
    """Which products are negative, a bool array of their shape."""
    integers = torch.int16 if products.dtype == torch.bfloat16 else torch.int32
    return products.view(integers).numpy() < 0


class Groups:
    """The queries of each list.

    Args:
        probes (ndarray): shape (N, P), int64, the lists that each query probes; -1 for none.
        nlist (int): how many lists there are.

    Attributes:
        lists (list of int): those that any query probes.
    """

    def __init__(self, probes: np.ndarray, nlist: int):
        flat = probes.ravel()
        # numpy sorts 16-bit integers by their digits, which is faster.
        order = flat.astype(np.int16 if nlist < 1 << 15 else np.int64).argsort(kind="stable")
        counts = np.bincount(flat[flat >= 0], minlength=nlist)
        self._ends = (len(flat) - counts.sum()) + counts.cumsum()  # -1 sorts in front
        self._starts = self._ends - counts
        self._rows, self._slots = np.divmod(order, probes.shape[1])
        self.lists = np.flatnonzero(counts).tolist()

    def of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The queries that probe a list, and at which place of their probes."""
        part = slice(self._starts[number], self._ends[number])
        return self._rows[part], self._slots[part]
