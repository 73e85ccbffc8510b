"""Near pairs by products of 8-bit integers (``near_pairs.Products``).

Each vector is rounded to a factor of its own times integers: q' = s i and k' = t j. The distance
less the limit, less what rounding can have added, is then, for squared L2,

    -2 s t ij  +  (|q|^2 - limit)  +  |k|^2  -  2 |q - q'| |k|  -  2 |q'| |k - k'|

ij is exact, in 32 bits. All else is a product of rows of a few floats. Keys are taken relative to
their mean c in the block, since they are shorter so and rounded less: qk is q(k - c) + qc.
"""

from typing import NamedTuple

import numpy as np
import torch

from .list_blocks import elements_of_products, first_elements, padded
from .near_pairs import UP, factor_of, padded_columns, query_terms, square_norms, sum_error

# The largest of the integers.
_LARGEST = 127
# The smallest factor: that of zeros must not be 0.
_SMALLEST = np.finfo(np.float32).tiny
# Queries at a time: what is multiplied is still in a core's cache when the rest is added.
_ROWS = 128
# Floats of a row: one for a query's own term, one for a key's, two for rounding to integers, one
# for that of floats.
_TERMS = 5


def multiplies_integers() -> bool:
    """Whether torch multiplies 8-bit integers here without an error.

    Kernels for CPUs without VNNI or AMX add pairs of products in 16 bits, which are too few.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    largest = torch.full((64, 64), _LARGEST, dtype=torch.int8)
    try:
        return all(
            bool((torch._int_mm(sign * largest, largest.t()) == sign * 64 * _LARGEST**2).all())
            for sign in (1, -1)
        )
    except RuntimeError:  # torch has it for GPUs alone
        return False


class IntegerProducts:
    """Compares in 8-bit integers.

    Args:
        metric (str): ``l2`` or ``ip``.
        dimension (int): D.
    """

    def __init__(self, metric: str, dimension: int):
        self._metric, self._dimension = metric, dimension
        self._columns = padded_columns(dimension)
        self._error = sum_error(self._columns)

    def query_sides(self, queries: np.ndarray) -> "_QuerySides":
        """See ``near_pairs.Products``."""
        return _QuerySides(_Rounded.empty(len(queries), self._columns), torch.from_numpy(queries))

    def write_queries(self, sides: "_QuerySides", rows: slice, limits, rounding: bool = True):
        """See ``near_pairs.Products``."""
        queries, factor = sides.vectors[rows], -factor_of(self._metric)
        rounded = sides.rounded.part(rows)
        residuals = rounded.write(queries, torch.empty_like(queries))
        own, lengths = query_terms(queries.numpy(), limits[rows], self._metric, self._error)
        rounded.factors.mul_(factor)
        rounded.terms[:, 0] = torch.from_numpy(own)
        rounded.terms[:, 1] = 1
        if rounding:
            lengths = torch.from_numpy(lengths)
            rounded.terms[:, 2] = residuals * (factor * UP)
            rounded.terms[:, 3] = (lengths + residuals) * (factor * UP)  # |q'| is not longer
            rounded.terms[:, 4] = lengths * (factor * self._error)

    def scratch(self, count: int) -> "_Scratch":
        """See ``near_pairs.Products``."""
        elements = elements_of_products(self._columns)
        return _Scratch(
            _Rounded.empty(count, self._columns),
            torch.zeros(elements, dtype=torch.int8),
            torch.zeros(elements),
            torch.zeros(_ROWS * padded(count), dtype=torch.int32),
            torch.zeros(elements),
            torch.zeros(2, count, self._dimension),
        )

    def write_keys(self, scratch: "_Scratch", keys: np.ndarray) -> "_KeySides":
        """See ``near_pairs.Products``."""
        rounded, norms = scratch.right.part(slice(padded(len(keys)))), square_norms(keys)
        mean, (centered, room) = keys.mean(axis=0), scratch.centered[:, : len(keys)]
        torch.sub(torch.from_numpy(keys), torch.from_numpy(mean), out=centered)
        written = rounded.part(slice(len(keys)))
        residuals = written.write(centered, room)
        written.terms[:, 0] = 1
        written.terms[:, 1] = (
            torch.from_numpy(norms * np.float32(1 - self._error)) if self._metric == "l2" else 0
        )
        written.terms[:, 2] = torch.linalg.vector_norm(centered, dim=1).mul_(UP)
        written.terms[:, 3] = residuals.mul_(UP)
        written.terms[:, 4] = torch.from_numpy(np.sqrt(norms) + np.sqrt(square_norms(mean[None])))
        rounded.factors[len(keys) :] = 0
        rounded.terms[len(keys) :] = 0
        return _KeySides(rounded, torch.from_numpy(mean * -factor_of(self._metric)))

    def multiply(
        self, scratch: "_Scratch", sides: "_QuerySides", rows: np.ndarray, right: "_KeySides"
    ) -> torch.Tensor:
        """See ``near_pairs.Products``."""
        count, numbers = len(rows), torch.from_numpy(rows)
        left = first_elements(scratch.left, padded(count), self._columns)
        torch.index_select(sides.rounded.integers, 0, numbers, out=left[:count])
        vectors = first_elements(scratch.vectors, count, self._dimension)
        torch.index_select(sides.vectors, 0, numbers, out=vectors)
        terms, factors = sides.rounded.terms[numbers], sides.rounded.factors[numbers, None]
        terms[:, 0] += vectors @ right.mean
        width = len(right.rounded.integers)
        products = first_elements(scratch.products, count, width)
        for start in range(0, count, _ROWS):
            some = slice(start, start + _ROWS)
            integers = first_elements(scratch.integers, len(left[some]), width)
            torch._int_mm(left[some], right.rounded.integers.t(), out=integers)
            part = products[some]
            torch.mul(integers[: len(part)], right.rounded.factors, out=part)
            part.mul_(factors[some]).addmm_(terms[some], right.rounded.terms.t())
        return products


class _Rounded(NamedTuple):
    """Vectors as factors times integers, and the terms of each.

    integers (Tensor): shape (n, columns), int8.
    factors (Tensor): shape (n,), float32.
    terms (Tensor): shape (n, _TERMS), float32.
    """

    integers: torch.Tensor
    factors: torch.Tensor
    terms: torch.Tensor

    @classmethod
    def empty(cls, count: int, columns: int) -> "_Rounded":
        integers = torch.zeros(count, columns, dtype=torch.int8)
        return cls(integers, torch.zeros(count), torch.zeros(count, _TERMS))

    def part(self, rows: slice) -> "_Rounded":
        return _Rounded(*(tensor[rows] for tensor in self))

    def write(self, vectors: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Round vectors, (n, D), in a room of that shape; gives the lengths of what is lost."""
        factors = torch.abs(vectors, out=room).amax(1).div_(_LARGEST).clamp_(min=_SMALLEST)
        self.factors[:] = factors
        torch.div(vectors, factors[:, None], out=room).round_()
        self.integers[:, : vectors.size(1)] = room
        return torch.linalg.vector_norm(room.mul_(factors[:, None]).sub_(vectors), dim=1)


class _QuerySides(NamedTuple):
    """Queries, rounded and (N, D) as they are."""

    rounded: _Rounded
    vectors: torch.Tensor


class _KeySides(NamedTuple):
    """Keys of a block, rounded relative to their mean; and -2 or -1 times that mean, (D,)."""

    rounded: _Rounded
    mean: torch.Tensor


class _Scratch(NamedTuple):
    """Memory of a thread.

    right (_Rounded): of keys.
    left, vectors (Tensor): integers and vectors of queries.
    integers, products (Tensor): before and after all else is added.
    centered (Tensor): shape (2, keys, D), keys relative to their mean, and room to round them in.
    """

    right: _Rounded
    left: torch.Tensor
    vectors: torch.Tensor
    integers: torch.Tensor
    products: torch.Tensor
    centered: torch.Tensor
