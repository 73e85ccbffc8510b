"""The whole grid of k, temperature and lambda over one saved retrieval.

Neighbours come nearest first, so the k nearest of any smaller k are a prefix: one pass over them
gives every k at once. For given k and T the log-likelihood is concave in lambda, so the best
lambda is solved for, not searched on a grid.
"""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Optional

import torch

from ..errors import UserError
from ..probability.log_sums import LogShares
from ..probability.metrics import perplexity
from ..probability.mixture import mix
from ..probability.weights import best_weights
from ..progress import track
from .grid import REFINEMENTS, KNNGridPoint, best
from .tuning_data import TuningData

# Rows whose weights are computed at a time: as many as stay in the processor's cache.
_ROWS = 256
# About how many rows the spread of the distances is measured on.
_SPREAD_ROWS = 4096
# Temperatures that are tried first are powers of two times the spread of the distances, with these
# lowest and highest exponents.
_LOWEST, _HIGHEST = -10, 6
# While the best temperature is at an end of the range, this many more are tried there at most.
_MORE = 16
# They end earlier where perplexity falls by no more than this share of it.
_FLAT = 1e-6
# Beyond these float32 has no room for distances divided by the temperature.
_POSSIBLE_TEMPERATURES = (1e-30, 1e30)
# Decimals of a lambda: grid points are what can be typed as flags.
_LAMBDA_DECIMALS = 4
# Digits of a temperature, for the same reason.
_TEMPERATURE_DIGITS = 6
# With a lambda of 1 one target without a match would make perplexity infinite.
_HIGHEST_LAMBDA = 1.0 - 1e-10


class Prefixes:
    """log p_knn of the targets for several k, prepared once for all temperatures.

    Between one k and the next lies a segment of neighbours; sums over segments, summed up, are the
    sums over the k nearest.

    Args:
        data (TuningData): log p_lm and neighbours, nearest first.
        ks (sequence of int): numbers of neighbours, each in [1, neighbours of *data*].

    Attributes:
        ks (list of int): as given.
        log_p_lm (Tensor): shape (N,), that of *data*.

    Raises:
        UserError: if a k cannot be, or there is none, or the shapes of *data* do not fit.
    """

    def __init__(self, data: TuningData, ks: Sequence[int]):
        distances, matches = data.distances, data.matches
        if matches.shape != distances.shape or data.log_p_lm.shape != distances.shape[:1]:
            raise UserError(
                "Prefixes: expected distances and matches of one shape (N, k) and log_p_lm (N,), "
                f"got {tuple(distances.shape)}, {tuple(matches.shape)}, "
                f"{tuple(data.log_p_lm.shape)}"
            )
        limit = distances.size(1)
        if not ks or not all(isinstance(k, Integral) and 1 <= k <= limit for k in ks):
            raise UserError(
                f"the grid needs k in [1, {limit}], the neighbours that were retrieved, got "
                f"{', '.join(map(str, ks)) or 'none'}"
            )
        self.ks = list(ks)
        self.log_p_lm = data.log_p_lm
        bounds = sorted(set(ks))
        self._columns = [bounds.index(k) for k in ks]
        segments = [slice(start, stop) for start, stop in zip([0, *bounds], bounds)]
        self._blocks = [
            LogShares(*block, lowest=True, segments=segments, best_first=True)
            for block in zip(
                distances[:, : bounds[-1]].split(_ROWS), matches[:, : bounds[-1]].split(_ROWS)
            )
        ]
        self._weights = distances.new_empty(min(_ROWS, len(distances)), bounds[-1])

    def log_p_knn(self, temperature: float) -> torch.Tensor:
        """log p_knn of the targets (Khandelwal et al. 2020, Eq. 2) for every k.

        Args:
            temperature (float): T, in [1e-30, 1e30].

        Returns:
            Tensor: shape (len(ks), N), float32, natural log; -inf where none of the k has the
            target, nan where there is no neighbour.

        Raises:
            UserError: for a temperature that float32 has no room for.
        """
        low, high = _POSSIBLE_TEMPERATURES
        if not low <= temperature <= high:
            raise UserError(
                f"the grid needs temperatures in [{low:g}, {high:g}], got {temperature}"
            )
        pieces = [
            block.at(-1.0 / temperature, self._weights[: len(block)]) for block in self._blocks
        ]
        return torch.cat(pieces).t()[self._columns].contiguous()


def log_p_knn(data: TuningData, ks: Sequence[int], temperature: float) -> torch.Tensor:
    """log p_knn of the targets for several k at once.

    Args:
        data (TuningData): neighbours, nearest first.
        ks (sequence of int): numbers of neighbours.
        temperature (float): T > 0.

    Returns:
        Tensor: shape (len(ks), N), see ``Prefixes.log_p_knn``.

    Raises:
        UserError: if a k or the temperature cannot be.
    """
    return Prefixes(data, ks).log_p_knn(temperature)


def best_lambda(log_p_lm: torch.Tensor, log_p_knn: torch.Tensor) -> float:
    """The lambda in [0, 1) with the highest likelihood, see ``best_weights``.

    Args:
        log_p_lm (Tensor): shape (N,), natural log.
        log_p_knn (Tensor): shape (N,), natural log; rows of nan, without neighbours, do not count.

    Returns:
        float: exactly 0 where neighbours do not help, or no query has any.
    """
    if log_p_knn[:1].isnan().all() and log_p_knn.isnan().all():
        return 0.0
    return min(best_weights([log_p_lm, log_p_knn])[1].item(), _HIGHEST_LAMBDA)


def mixture_perplexities(
    log_p_lm: torch.Tensor, log_p_knn: torch.Tensor, lambdas: Sequence[float]
) -> list[float]:
    """Perplexity of the mixture (Khandelwal et al. 2020, Eq. 3) for several lambdas.

    Args:
        log_p_lm, log_p_knn (Tensor): shape (N,), natural log.
        lambdas (sequence of float): in [0, 1].

    Returns:
        list of float: one for each lambda.

    Raises:
        UserError: if a lambda cannot be.
    """
    mixtures = (mix(log_p_lm, log_p_knn, knn_lambda=knn_lambda) for knn_lambda in lambdas)
    return [perplexity([mixed.mean(dtype=torch.float64).item()]) for mixed in mixtures]


def _points_at(
    prefixes: Prefixes, temperature: float, lambdas: Optional[Sequence[float]]
) -> Iterator[KNNGridPoint]:
    """Every point of one temperature: each k with its best lambda, or with all *lambdas*."""
    temperature = float(f"{temperature:.{_TEMPERATURE_DIGITS}g}")
    for k, scores in zip(prefixes.ks, prefixes.log_p_knn(temperature)):
        tried = lambdas or [_typeable(best_lambda(prefixes.log_p_lm, scores))]
        perplexities = mixture_perplexities(prefixes.log_p_lm, scores, tried)
        for knn_lambda, value in zip(tried, perplexities):
            yield KNNGridPoint(k, temperature, knn_lambda, value)


def _typeable(knn_lambda: float) -> float:
    # never rounded up to 1, where one target without a match makes perplexity infinite
    return min(round(knn_lambda, _LAMBDA_DECIMALS), 1.0 - 10.0**-_LAMBDA_DECIMALS)


def sweep(
    data: TuningData,
    ks: Sequence[int],
    temperatures: Optional[Sequence[float]] = None,
    lambdas: Optional[Sequence[float]] = None,
) -> list[KNNGridPoint]:
    """Perplexity of every point of a grid.

    Args:
        data (TuningData): log p_lm and neighbours, nearest first.
        ks (sequence of int): numbers of neighbours.
        temperatures (sequence of float): None: powers of two, about the spread of the distances;
            more of them while the best is at an end, then closer around the best one.
        lambdas (sequence of float): None: the best one for each k and temperature.

    Returns:
        list of KNNGridPoint: in the order in which they were tried.

    Raises:
        UserError: if the grid is empty, or has a k, a temperature or a lambda that cannot be.
    """
    if temperatures is not None and not temperatures or lambdas is not None and not lambdas:
        raise UserError("the grid is empty: it has no temperature or no lambda")
    prefixes = Prefixes(data, ks)
    points: list[KNNGridPoint] = []

    def add(*more):
        for temperature in track("temperatures", more, len(more)):
            points.extend(_points_at(prefixes, temperature, lambdas))

    if temperatures is not None:
        add(*temperatures)
        return points
    middle = _spread(data.distances)
    add(*(middle * 2.0**exponent for exponent in range(_LOWEST, _HIGHEST + 1)))
    further = [2.0**exponent for exponent in range(1, _MORE + 1)]
    _extend(points, add, [middle * 2.0**_LOWEST / factor for factor in further], end=min)
    _extend(points, add, [middle * 2.0**_HIGHEST * factor for factor in further], end=max)
    for factor in REFINEMENTS:
        temperature = best(points).temperature
        add(temperature / factor, temperature * factor)
    return points


def _spread(distances: torch.Tensor) -> float:
    """A power of two near the median distance of the farthest beyond the nearest neighbour."""
    rows = distances[:: max(1, len(distances) // _SPREAD_ROWS)]
    farthest = rows.masked_fill(rows.isinf(), -math.inf).amax(dim=1)
    spreads = farthest - rows[:, 0]
    spreads = spreads[spreads > 0]  # -inf where there is no neighbour
    return 2.0 ** round(math.log2(spreads.median().item())) if len(spreads) else 1.0


def _extend(points: list[KNNGridPoint], add, temperatures: Sequence[float], end) -> None:
    """Try one temperature after another while the best one is at that *end* of all, min or max."""
    for temperature in temperatures:
        lowest = best(points)
        if lowest.temperature != end(point.temperature for point in points):
            return
        add(temperature)
        if best(points).perplexity >= lowest.perplexity * (1 - _FLAT):
            return


def best_of_each_k(points: Sequence[KNNGridPoint]) -> list[KNNGridPoint]:
    """The best point of every k, the smallest k first.

    Raises:
        UserError: if there is no point.
    """
    if not points:
        raise UserError("best_of_each_k: there is no point to choose from; run a sweep before")
    ks = sorted({point.k for point in points})
    return [best([point for point in points if point.k == k]) for k in ks]


def k_at_an_end(points: Sequence[KNNGridPoint]) -> Optional[str]:
    """Whether the best k is the ``largest`` of several, or the ``smallest`` and above 1."""
    ks, chosen = sorted({point.k for point in points}), best(points).k
    if len(ks) > 1 and chosen == ks[-1]:
        return "largest"
    return "smallest" if len(ks) > 1 and chosen == ks[0] > 1 else None


def temperature_at_an_end(points: Sequence[KNNGridPoint]) -> bool:
    """Whether the best temperature is the lowest or the highest of several."""
    temperatures = {point.temperature for point in points}
    ends = min(temperatures), max(temperatures)
    return len(temperatures) > 1 and best(points).temperature in ends
