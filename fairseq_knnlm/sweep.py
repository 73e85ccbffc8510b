"""The whole grid of k, temperature and lambda over one saved retrieval.

Neighbours come nearest first, so the k nearest of any smaller k are a prefix: one pass over them
gives every k at once. For given k and T the log-likelihood is concave in lambda, so the best
lambda is solved for, not searched on a grid.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from .errors import UserError
from .metrics import perplexity
from .neighbors_file import Retrieved

# Rows whose weights are computed at a time: what stays in the cache.
_ROWS = 256
# Tokens whose mixtures are computed at a time, for all lambdas.
_TOKENS = 1 << 16
_SPREAD_ROWS = 4096
# Temperatures tried first: powers of two, from this one to that, relative to the spread of the
# distances; then halfway points around the best of them, twice.
_LOWEST, _HIGHEST = -10, 6
_REFINEMENTS = (2.0**0.5, 2.0**0.25)
# So many more are tried, one after another, while the best is at an end of the range, ...
_MORE = 16
# ... unless perplexity falls by no more than this share of it.
_FLAT = 1e-6
# Beyond these float32 has no room for distances divided by the temperature.
_POSSIBLE_TEMPERATURES = (1e-30, 1e30)
# Weights below exp of this count for nothing, and beyond -87 float32 has but slow denormal numbers.
_SMALLEST_LOG_WEIGHT = -80.0
_NEWTON_STEPS = 60
_LAMBDA_TOLERANCE = 1e-10
# Decimals of a lambda and digits of a temperature: settings are what can be typed as flags.
_LAMBDA_DECIMALS = 4
_TEMPERATURE_DIGITS = 6


class Setting(NamedTuple):
    """Hyper-parameters and the perplexity that they gave."""

    k: int
    temperature: float
    knn_lambda: float
    perplexity: float


class _Block(NamedTuple):
    """Some rows, prepared for every temperature.

    distances (Tensor): shape (n, max k), float32.
    gaps (ndarray): shape (matches,), float32, distance of each match beyond the row's nearest one.
    bins (ndarray): shape (matches,), int32, row * number of segments + segment of each match.
    offsets (Tensor): shape (n,), float32, distance of the nearest match beyond the nearest of all.
    """

    distances: torch.Tensor
    gaps: np.ndarray
    bins: np.ndarray
    offsets: torch.Tensor


class Prefixes:
    """The k nearest neighbours for several k, prepared once for all temperatures.

    Between one k and the next lies a segment of neighbours; sums over segments, summed up, are the
    sums over the k nearest.

    Args:
        retrieved (Retrieved): log p_lm and neighbours.
        ks (sequence of int): numbers of neighbours.

    Raises:
        UserError: if a k is more than was retrieved, or there is none.
    """

    def __init__(self, retrieved: Retrieved, ks: Sequence[int]):
        limit = retrieved.distances.size(1)
        if not ks or not all(1 <= k <= limit for k in ks):
            raise UserError(
                f"fairseq_knnlm: the grid needs k in [1, {limit}], the neighbours that were "
                f"retrieved, got {', '.join(map(str, ks)) or 'none'}"
            )
        self.ks = list(ks)
        self.log_p_lm = retrieved.log_p_lm
        self._bounds, self._order = np.unique(self.ks, return_inverse=True)
        distances, matches = (part[:, : max(ks)] for part in retrieved[1:3])
        self._blocks = [
            self._prepare(*piece) for piece in zip(distances.split(_ROWS), matches.split(_ROWS))
        ]

    def _prepare(self, distances: torch.Tensor, matches: torch.Tensor) -> _Block:
        rows, columns = np.nonzero(matches.numpy())
        segments = self._bounds.searchsorted(columns, side="right")
        nearest = torch.full((len(distances),), math.inf)
        first = np.unique(rows, return_index=True)[1]
        nearest[rows[first]] = distances[rows[first], columns[first]]
        gaps = distances[rows, columns] - nearest[rows]
        bins = (rows * len(self._bounds) + segments).astype(np.int32)
        offsets = nearest - _finite(distances[:, 0])
        return _Block(distances, gaps.numpy(), bins, offsets)

    def log_p_knn(self, temperature: float) -> torch.Tensor:
        """log p_knn of the targets (Khandelwal et al. 2020, Eq. 2) for every k.

        Returns:
            Tensor: shape (len(ks), N), float32; -inf where none of the k has the target.

        Raises:
            UserError: for a temperature that float32 has no room for.
        """
        low, high = _POSSIBLE_TEMPERATURES
        if not low <= temperature <= high:
            raise UserError(
                f"fairseq_knnlm: the grid needs temperatures in [{low:g}, {high:g}], got "
                f"{temperature}"
            )
        pieces = [self._log_p_knn(block, temperature) for block in self._blocks]
        return torch.cat(pieces).t()[self._order].contiguous()

    def _log_p_knn(self, block: _Block, temperature: float) -> torch.Tensor:
        rows, segments = len(block.distances), len(self._bounds)
        # weights are relative to the nearest neighbour, those of matches to the nearest match: so
        # nothing overflows, and each sum is at least 1, or 0 where there is none
        weights = _finite(block.distances[:, :1]) - block.distances
        weights.div_(temperature).clamp_(min=_SMALLEST_LOG_WEIGHT).exp_()
        starts = [0, *self._bounds[:-1]]
        total = torch.stack(
            [weights[:, start:stop].sum(dim=1) for start, stop in zip(starts, self._bounds)], dim=1
        )
        log_weights = np.maximum(block.gaps / np.float32(-temperature), _SMALLEST_LOG_WEIGHT)
        matched = np.bincount(block.bins, np.exp(log_weights), rows * segments)
        # float64, but integers where there is no match at all
        matched = torch.from_numpy(matched).double().view(rows, segments)
        matched = matched.cumsum(dim=1).log_().float()
        # -inf alone where the k nearest have no match, whatever the offset
        matched -= (block.offsets / temperature).unsqueeze(1).nan_to_num_(posinf=0.0)
        return (matched - total.cumsum(dim=1).clamp_(min=1.0).log_()).clamp_(max=0.0)


def _finite(distances: torch.Tensor) -> torch.Tensor:
    """0 in place of the distance of a neighbour that is not there: inf - inf would be nan."""
    return distances.nan_to_num(posinf=0.0)


def log_p_knn(retrieved: Retrieved, ks: Sequence[int], temperature: float) -> torch.Tensor:
    """log p_knn of the targets for several k at once, see ``Prefixes``."""
    return Prefixes(retrieved, ks).log_p_knn(temperature)


def best_lambda(log_p_lm: torch.Tensor, log_p_knn: torch.Tensor) -> float:
    """The lambda in [0, 1) with the highest likelihood.

    The mean of log((1 - lambda) p_lm + lambda p_knn) is concave in lambda; the root of its
    derivative is found by Newton's method, kept between the bounds that are known so far.
    """
    gain = torch.expm1((log_p_knn.double() - log_p_lm.double()).clamp_(max=300.0))
    low, high = 0.0, 1.0
    if gain.mean() <= 0:
        return 0.0
    found = 0.25
    for _ in range(_NEWTON_STEPS):
        slopes = gain / (1.0 + found * gain)
        slope = slopes.mean().item()
        if slope > 0:
            low = found
        else:
            high = found
        proposed = found + slope / slopes.square_().mean().item()
        if not low < proposed < high:
            proposed = (low + high) / 2
        if abs(proposed - found) < _LAMBDA_TOLERANCE:
            break
        found = proposed
    return found


def mixture_perplexities(
    log_p_lm: torch.Tensor, log_p_knn: torch.Tensor, lambdas: Sequence[float]
) -> list[float]:
    """Perplexity of the mixture (Khandelwal et al. 2020, Eq. 3) for several lambdas.

    Args:
        log_p_lm, log_p_knn (Tensor): shape (N,), natural log.
        lambdas (sequence of float): in [0, 1].
    """
    weights = torch.tensor(lambdas, dtype=torch.float64).unsqueeze(1)
    log_weight_lm, log_weight_knn = (part.float() for part in ((-weights).log1p(), weights.log()))
    total = torch.zeros(len(lambdas), dtype=torch.float64)
    for lm, knn in zip(log_p_lm.split(_TOKENS), log_p_knn.split(_TOKENS)):
        mixed = torch.logaddexp(lm + log_weight_lm, knn + log_weight_knn)
        total += mixed.sum(dim=1, dtype=torch.float64)
    return [perplexity([mean]) for mean in (total / len(log_p_lm)).tolist()]


def _settings_at(
    prefixes: Prefixes, temperature: float, lambdas: Optional[Sequence[float]]
) -> Iterator[Setting]:
    """Every setting of one temperature: each k with its best lambda, or with all *lambdas*."""
    temperature = float(f"{temperature:.{_TEMPERATURE_DIGITS}g}")
    for k, scores in zip(prefixes.ks, prefixes.log_p_knn(temperature)):
        tried = lambdas or [_typeable(best_lambda(prefixes.log_p_lm, scores))]
        for knn_lambda, result in zip(
            tried, mixture_perplexities(prefixes.log_p_lm, scores, tried)
        ):
            yield Setting(k, temperature, knn_lambda, result)


def _typeable(knn_lambda: float) -> float:
    # never rounded up to 1, where one target without a match makes perplexity infinite
    return min(round(knn_lambda, _LAMBDA_DECIMALS), 1.0 - 10.0**-_LAMBDA_DECIMALS)


def sweep(
    retrieved: Retrieved,
    ks: Sequence[int],
    temperatures: Optional[Sequence[float]] = None,
    lambdas: Optional[Sequence[float]] = None,
) -> list[Setting]:
    """Perplexity of every setting of a grid.

    Args:
        retrieved (Retrieved): log p_lm and neighbours.
        ks (sequence of int): numbers of neighbours.
        temperatures (sequence of float): None: powers of two, about the spread of the distances;
            more of them while the best is at an end, then closer around the best one.
        lambdas (sequence of float): None: the best one for each k and temperature.

    Raises:
        UserError: if the grid is empty, or has a k or a temperature that cannot be.
    """
    if temperatures is not None and not temperatures or lambdas is not None and not lambdas:
        raise UserError("fairseq_knnlm: the grid is empty: it has no temperature or no lambda")
    prefixes = Prefixes(retrieved, ks)
    settings: list[Setting] = []

    def add(*more):
        for temperature in more:
            settings.extend(_settings_at(prefixes, temperature, lambdas))

    if temperatures is not None:
        add(*temperatures)
        return settings
    middle = _spread(retrieved.distances)
    add(*(middle * 2.0**exponent for exponent in range(_LOWEST, _HIGHEST + 1)))
    further = [2.0**exponent for exponent in range(1, _MORE + 1)]
    _extend(settings, add, [middle * 2.0**_LOWEST / factor for factor in further], end=min)
    _extend(settings, add, [middle * 2.0**_HIGHEST * factor for factor in further], end=max)
    for factor in _REFINEMENTS:
        temperature = best(settings).temperature
        add(temperature / factor, temperature * factor)
    return settings


def _spread(distances: torch.Tensor) -> float:
    """A power of two near the median distance of the farthest beyond the nearest neighbour."""
    some = distances[:: max(1, len(distances) // _SPREAD_ROWS)]
    farthest = some.masked_fill(some.isinf(), -math.inf).amax(dim=1)
    spreads = farthest - some[:, 0]
    spreads = spreads[spreads > 0]  # -inf where there is no neighbour
    return 2.0 ** round(math.log2(spreads.median().item())) if len(spreads) else 1.0


def _extend(settings: list[Setting], add, temperatures: Sequence[float], end) -> None:
    """Try one temperature after another while the best one is at that *end* of all, min or max."""
    for temperature in temperatures:
        lowest = best(settings)
        if lowest.temperature != end(setting.temperature for setting in settings):
            return
        add(temperature)
        if best(settings).perplexity >= lowest.perplexity * (1 - _FLAT):
            return


def best(settings: Sequence[Setting]) -> Setting:
    """The setting with the lowest perplexity."""
    return min(settings, key=lambda setting: setting.perplexity)


def best_of_each_k(settings: Sequence[Setting]) -> list[Setting]:
    """The best setting of every k, the smallest k first."""
    ks = sorted({setting.k for setting in settings})
    return [best([setting for setting in settings if setting.k == k]) for k in ks]


def temperature_at_an_end(settings: Sequence[Setting]) -> bool:
    """Whether the best temperature is the lowest or the highest of several."""
    temperatures = {setting.temperature for setting in settings}
    ends = min(temperatures), max(temperatures)
    return len(temperatures) > 1 and best(settings).temperature in ends
