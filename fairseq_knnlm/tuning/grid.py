"""Points of the grids that are tried, and the best of them."""

import math
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


# Points halfway around the best of all are tried last, at these factors from it.
REFINEMENTS = (2.0**0.5, 2.0**0.25)
# Beyond it a float has no room for the perplexity.
_MOST_NATS = 709.0

Point = TypeVar("Point", KNNGridPoint, CacheGridPoint)


def of_larger_units(point: Point, tokens_per_unit: float) -> Point:
    """The same point with the perplexity of larger units, words of several tokens say.

    Args:
        point (KNNGridPoint or CacheGridPoint): with the perplexity of tokens.
        tokens_per_unit (float): >= 1; the lower of two perplexities stays the lower.
    """
    if tokens_per_unit == 1.0:
        return point
    nll_nats = math.log(point.perplexity) * tokens_per_unit
    return point._replace(perplexity=math.inf if nll_nats > _MOST_NATS else math.exp(nll_nats))


def best(points: Sequence[Point]) -> Point:
    """The point with the lowest perplexity; of equal ones that with the smallest k or cache.

    Raises:
        UserError: if there is none.
    """
    if not points:
        raise UserError("best: there is no point to choose from; run a sweep before")
    return min(points, key=lambda point: (point.perplexity, point[0]))
