"""Which keys lie within a limit of which queries: one product of two rounded matrices.

A query and a key are near if their distance is not above the query's limit. Each gets a row of a
matrix such that the product of the two rows is their distance less the limit, less all that
rounding can have added: a product that is not negative belongs to a pair that is not near. With q'
and k' for q and k rounded to bfloat16, squared L2 is at least (Cauchy-Schwarz)

    |q|^2 - 2 q'k' + |k|^2  -  2 (|q - q'| + |q'| / 2^8) |k|

and the terms of this are those of a product of rows of D + 7 numbers. Minus the inner product has
the same form. Where only the sign is read, the product may be rounded too: that keeps its sign.
"""

import numpy as np
import torch

from .searcher import CheckRows, trust

# Beside the D of a key: 3 for a query's own term, 3 for a key's, 1 for rounding.
_TERMS = 7
# CPUs multiply matrices in tiles of so many columns.
_COLUMNS_STEP = 32
# More than rounding to bfloat16 can take of a number.
_UP = np.float32(1 + 2.0**-7)
# Stands for an infinite limit: infinity cannot be split into parts that add up to it.
_FAR = 1e30
# The center is the mean of about so many keys.
_OF_CENTER = 1 << 12


def rounded_type() -> torch.dtype:
    """The type whose products cost least: bfloat16, but where torch has no fast kernels for it."""
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if fast else torch.float32


def columns(dimension: int) -> int:
    """Columns of the rows for keys of *dimension*."""
    return -(-(dimension + _TERMS) // _COLUMNS_STEP) * _COLUMNS_STEP


def write_queries(rows, queries, limits, metric: str, rounding: bool = True) -> None:
    """Write the row of each query.

    Args:
        rows (Tensor): shape (n, ``columns(D)``), to be written to.
        queries (ndarray): shape (n, D), float32.
        limits (ndarray): shape (n,), float32, distances; +inf for none.
        metric (str): ``l2`` or ``ip``.
        rounding (bool): allow for rounding; without it, products are about the distances.
    """
    factor = 2 if metric == "l2" else 1
    error = _sum_error(rows)
    norms = square_norms(queries)
    own, limits = norms if metric == "l2" else 0, np.minimum(limits, _FAR)
    terms = np.zeros((len(queries), _TERMS), dtype=np.float32)
    terms[:, :3] = _parts(own - limits - error * (own + np.abs(limits)))
    terms[:, 3:6] = 1
    rounded = torch.from_numpy(queries).to(rows.dtype)
    if rounding:
        of_key = torch.finfo(rows.dtype).eps / 2  # the largest relative error of rounding
        residuals = np.sqrt(square_norms(queries - rounded.float().numpy()))
        terms[:, 6] = -factor * _UP * (residuals + (of_key + error) * np.sqrt(norms))
    _write(rows, rounded * -factor, terms)


def write_keys(rows, keys, metric: str) -> None:
    """Write the row of each key.

    Args:
        rows (Tensor): shape (n, ``columns(D)``), to be written to.
        keys (ndarray): shape (n, D), float32.
        metric (str): ``l2`` or ``ip``.
    """
    norms = square_norms(keys)
    terms = np.zeros((len(keys), _TERMS), dtype=np.float32)
    terms[:, :3] = 1
    if metric == "l2":
        terms[:, 3:6] = _parts(norms * np.float32(1 - _sum_error(rows)))
    terms[:, 6] = _UP * np.sqrt(norms)
    _write(rows, torch.from_numpy(keys), terms)


def are_near(products: torch.Tensor) -> np.ndarray:
    """Which products are negative, a bool array of their shape."""
    integers = torch.int16 if products.dtype == torch.bfloat16 else torch.int32
    return products.view(integers).numpy() < 0


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


def _sum_error(rows) -> float:
    """Relative error of a sum in float32 of so many numbers, and of distances computed so."""
    return rows.size(1) * 2.0**-22
