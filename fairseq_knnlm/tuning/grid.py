"""Points of the grids that are tried, and the best of them."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from ..errors import UserError


class KNNGridPoint(NamedTuple):
    """Hyper-parameters of neighbours and the perplexity that they gave.

    k (int): neighbours per query.
    temperature (float): T > 0, divides the distances.
    knn_lambda (float): weight of p_knn, in [0, 1].
    perplexity (float): in [1, inf], lower is better.
    """

    k: int
    temperature: float
    knn_lambda: float
    perplexity: float


class CacheGridPoint(NamedTuple):
    """Hyper-parameters of a continuous cache and the perplexity that they gave.

    cache_size (int): positions that it looks back on.
    cache_theta (float): >= 0, multiplies what states have in common.
    cache_lambda (float): weight of p_cache, in [0, 1].
    knn_lambda (float): weight of p_knn, 0 without neighbours.
    perplexity (float): in [1, inf], lower is better.
    """

    cache_size: int
    cache_theta: float
    cache_lambda: float
    knn_lambda: float
    perplexity: float


Point = TypeVar("Point", KNNGridPoint, CacheGridPoint)


def best(points: Sequence[Point]) -> Point:
    """The point with the lowest perplexity; of equal ones that with the smallest k or cache.

    Raises:
        UserError: if there is none.
    """
    if not points:
        raise UserError("best: there is no point to choose from; run a sweep before")
    return min(points, key=lambda point: (point.perplexity, point[0]))
