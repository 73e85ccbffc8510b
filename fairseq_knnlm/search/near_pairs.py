"""Which keys lie within a limit of which queries: products of rounded vectors.

A query and a key are near if their distance is not above the query's limit. What is computed of a
pair is their distance less the limit, less all that rounding can have added: a pair of which this
is not negative is not near. With q' and k' for q and k rounded, squared L2 is at least
(Cauchy-Schwarz)

    |q|^2 - 2 q'k' + |k|^2  -  2 (|q - q'| |k| + |q'| |k - k'|)

and minus the inner product has the same form. ``float_products`` computes it as one product of two
matrices, ``integer_products`` from one of 8-bit integers.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .searcher import CheckRows, trust

# CPUs multiply matrices in tiles of this many columns.
COLUMNS_STEP = 32
# More than rounding can take of a number that stands for rounding.
UP = np.float32(1 + 2.0**-7)
# Stands for an infinite limit: infinity cannot be split into parts that add up to it.
_FAR = 1e30
# The center is the mean of about this many keys.
_OF_CENTER = 1 << 12


class Products(Protocol):
    """Compares queries with blocks of keys, all float32 and relative to the center."""

    def query_sides(self, queries: np.ndarray) -> Any:
        """Memory for what a search keeps of its queries, shape (N, D), float32."""

    def write_queries(self, sides, rows: slice, limits, rounding: bool = True) -> None:
        """Prepare some of the queries of a search.

        Args:
            sides: from ``query_sides``.
            rows (slice): which queries.
            limits (ndarray): shape (N,), float32, distances; +inf for none.
            rounding (bool): allow for rounding; without it, products are about the distances.
        """

    def scratch(self, count: int) -> Any:
        """Memory for a thread that compares *count* keys at a time, or fewer."""

    def write_keys(self, scratch, keys: np.ndarray) -> Any:
        """Prepare keys, shape (m, D), float32; gives what ``multiply`` takes, in *scratch*."""

    def multiply(self, scratch, sides, rows: np.ndarray, right) -> torch.Tensor:
        """Compare queries with keys.

        Args:
            scratch: of this thread.
            sides: from ``query_sides``, written.
            rows (ndarray): shape (n,), int64, which queries.
            right: from ``write_keys``.

        Returns:
            Tensor: shape (n, at least m), in *scratch*; negative where a pair can be near, 0 in
            columns beyond m.
        """


class QueryTerms(NamedTuple):
    """What of a query's side both kinds of products need, each of shape (n,).

    own (ndarray): |q|^2 for ``l2``, else 0, less the limit, less what sums can add.
    lengths (ndarray): |q|.
    """

    own: np.ndarray
    lengths: np.ndarray


def query_terms(queries, limits, metric: str, error: float) -> QueryTerms:
    """The terms of some queries.

    Args:
        queries (ndarray): shape (n, D), float32.
        limits (ndarray): shape (n,), float32.
        metric (str): ``l2`` or ``ip``.
        error (float): from ``sum_error``.
    """
    norms, limits = square_norms(queries), np.minimum(limits, _FAR)
    own = norms if metric == "l2" else np.zeros_like(norms)
    return QueryTerms(own - limits - error * (own + np.abs(limits)), np.sqrt(norms))


def factor_of(metric: str) -> int:
    """How often minus the inner product is in a distance."""
    return 2 if metric == "l2" else 1


def sum_error(count: int) -> float:
    """Relative error of a sum in float32 of *count* numbers, and of distances computed so."""
    return count * 2.0**-22


def padded_columns(count: int) -> int:
    """Columns of a matrix that has room for *count*."""
    return -(-count // COLUMNS_STEP) * COLUMNS_STEP


def center_of(keys: np.ndarray, metric: str, check_rows: CheckRows = trust) -> np.ndarray:
    """What keys and queries are taken relative to, shape (D,), float32.

    Squared L2 from norms and products is a small difference of large numbers, which has few digits,
    unless the numbers are relative to about the mean of the keys.

    Args:
        keys (ndarray): shape (N, D), float16.
        metric (str): ``l2``, or ``ip``, for which it is 0.
        check_rows (callable): see ``searcher.CheckRows``.
    """
    if metric != "l2":
        return np.zeros(keys.shape[1], dtype=np.float32)
    rows = range(0, len(keys), max(1, len(keys) // _OF_CENTER))
    check_rows(rows)
    sample = keys[:: rows.step]
    return np.asarray(sample.mean(axis=0, dtype=np.float32))


def square_norms(vectors: np.ndarray) -> np.ndarray:
    """Squared norm of each row."""
    return np.einsum("nd,nd->n", vectors, vectors)
