"""Near pairs by one product of two matrices of a float type (``near_pairs.Products``).

The row of a query and the row of a key have D + 7 numbers: the vector, and terms whose products add
up to the rest of the distance less the limit, less what rounding can have added. In bfloat16 the
last of them is 2 (|q - q'| + |q'| / 2^8) |k|. As only the sign of a product is read, the product
may be rounded too: that keeps its sign.
"""

from typing import NamedTuple

import numpy as np
import torch

from .list_blocks import elements_of_products, first_elements, padded
from .near_pairs import UP, factor_of, padded_columns, query_terms, square_norms, sum_error

# Beside the D of a vector: 3 for a query's own term, 3 for a key's, 1 for rounding.
_TERMS = 7


def columns(dimension: int) -> int:
    """Columns of the rows for keys of *dimension*."""
    return padded_columns(dimension + _TERMS)


class FloatProducts:
    """Compares in a float type.

    Args:
        dtype (torch.dtype): float32 or bfloat16.
        metric (str): ``l2`` or ``ip``.
        dimension (int): D.
    """

    def __init__(self, dtype: torch.dtype, metric: str, dimension: int):
        self._dtype, self._metric = dtype, metric
        self._columns = columns(dimension)
        self._error = sum_error(self._columns)

    def query_sides(self, queries: np.ndarray) -> "_QuerySides":
        """See ``near_pairs.Products``."""
        rows = torch.zeros(len(queries), self._columns, dtype=self._dtype)
        return _QuerySides(rows, queries)

    def write_queries(self, sides: "_QuerySides", rows: slice, limits, rounding: bool = True):
        """See ``near_pairs.Products``."""
        queries, factor = sides.vectors[rows], factor_of(self._metric)
        own, lengths = query_terms(queries, limits[rows], self._metric, self._error)
        terms = np.zeros((len(queries), _TERMS), dtype=np.float32)
        terms[:, :3] = _parts(own)
        terms[:, 3:6] = 1
        rounded = torch.from_numpy(queries).to(self._dtype)
        if rounding:
            of_key = torch.finfo(self._dtype).eps / 2  # the largest relative error of rounding
            residuals = np.sqrt(square_norms(queries - rounded.float().numpy()))
            terms[:, 6] = -factor * UP * (residuals + (of_key + self._error) * lengths)
        _write(sides.rows[rows], rounded * -factor, terms)

    def scratch(self, count: int) -> "_Scratch":
        """See ``near_pairs.Products``."""
        right = torch.zeros(count, self._columns, dtype=self._dtype)
        elements = elements_of_products(self._columns)
        return _Scratch(right, *(torch.zeros(elements, dtype=self._dtype) for _ in range(2)))

    def write_keys(self, scratch: "_Scratch", keys: np.ndarray) -> torch.Tensor:
        """See ``near_pairs.Products``."""
        norms = square_norms(keys)
        terms = np.zeros((len(keys), _TERMS), dtype=np.float32)
        terms[:, :3] = 1
        if self._metric == "l2":
            terms[:, 3:6] = _parts(norms * np.float32(1 - self._error))
        terms[:, 6] = UP * np.sqrt(norms)
        right = scratch.right[: padded(len(keys))]
        _write(right[: len(keys)], torch.from_numpy(keys), terms)
        right[len(keys) :] = 0
        return right

    def multiply(self, scratch: "_Scratch", sides: "_QuerySides", rows: np.ndarray, right):
        """See ``near_pairs.Products``."""
        left = first_elements(scratch.left, padded(len(rows)), self._columns)
        torch.index_select(sides.rows, 0, torch.from_numpy(rows), out=left[: len(rows)])
        products = first_elements(scratch.products, len(left), len(right))
        torch.mm(left, right.t(), out=products)
        return products[: len(rows)]


class _QuerySides(NamedTuple):
    """Rows of queries, (N, columns), and the queries, (N, D)."""

    rows: torch.Tensor
    vectors: np.ndarray


class _Scratch(NamedTuple):
    """Rows of keys, (keys, columns); of queries, and products, (elements,)."""

    right: torch.Tensor
    left: torch.Tensor
    products: torch.Tensor


def _write(rows, vectors, terms: np.ndarray) -> None:
    dimension = vectors.size(1)
    rows[:, :dimension] = vectors
    rows[:, dimension : dimension + _TERMS] = torch.from_numpy(terms)


def _parts(numbers: np.ndarray) -> np.ndarray:
    """Three numbers for each, that bfloat16 holds and whose sum is exact."""
    parts = np.empty((len(numbers), 3), dtype=np.float32)
    for part in parts.T:
        part[:] = (numbers.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        numbers = numbers - part
    return parts
