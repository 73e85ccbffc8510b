"""The whole grid of theta and size of the continuous cache over one saved pass.

Sizes are nested windows and theta only scales what hidden states have in common, so a grid costs
little more than its largest size. For given size and theta the log-likelihood is concave in the
weights of the mixture, which are solved for.
"""

from collections.abc import Sequence
from typing import Optional

import torch

from ..arguments import TRUE_OR_FALSE, refuse
from ..fields import faults, one_of
from ..probability.continuous_cache import CACHE_METRICS, ContinuousCache
from ..probability.metrics import perplexity
from ..probability.mixture import mix
from ..probability.weights import best_weights
from .grid import REFINEMENTS, CacheGridPoint, best
from .tuning_data import TuningData

# Thetas that are tried first are powers of two over the variance of the states, with these lowest
# and highest exponents.
_LOWEST, _HIGHEST = -1, 6
# While the best theta is at an end of the range, this many more are tried there at most.
_MORE = 12
# Digits of a theta: grid points are what can be typed as flags.
_THETA_DIGITS = 4
# Decimals of a weight, for the same reason.
_WEIGHT_DECIMALS = 4


class CacheSweep:
    """The best weights for every size and theta, with and without neighbours.

    Args:
        data (TuningData): log p_lm, targets and hidden states of a text.
        metric (str): of the cache, ``ip`` or ``l2``.
        keep_apart (bool): whether the cache is emptied where a document begins.
        log_p_knn (Tensor): shape (N,), natural log; None without neighbours.

    Attributes:
        alone (list of CacheGridPoint): p_lm and p_cache mixed.
        with_knn (list of CacheGridPoint): all three; empty without neighbours.

    Raises:
        UserError: if an argument cannot be, or *data* lacks something.
    """

    def __init__(
        self,
        data: TuningData,
        metric: str,
        keep_apart: bool,
        log_p_knn: Optional[torch.Tensor] = None,
    ):
        found = _faults(data, metric, keep_apart)
        if log_p_knn is not None and log_p_knn.shape != data.log_p_lm.shape:
            shapes = tuple(data.log_p_lm.shape), tuple(log_p_knn.shape)
            found.append(f"log_p_knn must have the shape of log_p_lm {shapes[0]}, got {shapes[1]}")
        refuse("CacheSweep", found)
        self._data, self._metric, self._keep_apart = data, metric, keep_apart
        self._log_p_knn = log_p_knn
        self.alone: list[CacheGridPoint] = []
        self.with_knn: list[CacheGridPoint] = []

    def run(self, sizes: Sequence[int], thetas: Optional[Sequence[float]] = None) -> None:
        """Try a grid.

        Args:
            sizes (sequence of int): how many positions the cache looks back on, each >= 1.
            thetas (sequence of float): None: powers of two, about the variance of the states; more
                of them while the best is at an end, then closer around the best one.

        Raises:
            UserError: if a size or a theta cannot be.
        """
        if thetas is not None:
            self._add(sizes, thetas)
            return
        middle = self._middle()
        tried = [middle * 2.0**exponent for exponent in range(_LOWEST, _HIGHEST + 1)]
        self._add(sizes, tried)
        for end, factor in ((min, 0.5), (max, 2.0)):
            for _ in range(_MORE):
                if self._best_theta() != _typeable_theta(end(tried)):
                    break
                tried.append(end(tried) * factor)
                self._add(sizes, tried[-1:])
        for factor in REFINEMENTS:
            theta = self._best_theta()
            self._add(sizes, [theta / factor, theta * factor])

    def _middle(self) -> float:
        states = self._data.queries
        variance = float((states - states.mean(dim=0)).square().sum(dim=1).mean())
        scale = 0.5 if self._metric == "l2" else 1.0
        return scale / variance if variance > 0 else 1.0

    def _best_theta(self) -> float:
        return best(self.with_knn or self.alone).cache_theta

    def _add(self, sizes, thetas) -> None:
        thetas = [_typeable_theta(theta) for theta in thetas]
        grid = log_p_cache(self._data, sizes, thetas, self._metric, self._keep_apart)
        for theta, of_sizes in zip(thetas, grid):
            for size, scores in zip(sizes, of_sizes):
                self.alone.append(self._solved(size, theta, scores, None))
                if self._log_p_knn is not None:
                    self.with_knn.append(self._solved(size, theta, scores, self._log_p_knn))

    def _solved(self, size: int, theta: float, scores, log_p_knn) -> CacheGridPoint:
        log_p_lm = self._data.log_p_lm
        if log_p_knn is None:
            weights = 0.0, *best_weights([log_p_lm, scores])[1:]
        else:
            weights = best_weights([log_p_lm, log_p_knn, scores])[1:]
        knn_lambda, cache_lambda = _typeable_weights(*weights)
        mixed = mix(log_p_lm, log_p_knn, scores, knn_lambda, cache_lambda)
        return CacheGridPoint(size, theta, cache_lambda, knn_lambda, perplexity(mixed))


def log_p_cache(
    data: TuningData,
    sizes: Sequence[int],
    thetas: Sequence[float],
    metric: str,
    keep_apart: bool,
) -> torch.Tensor:
    """log p_cache of a whole text.

    Args:
        data (TuningData): targets and hidden states.
        sizes (sequence of int): n, positions looked back on, each >= 1.
        thetas (sequence of float): theta >= 0.
        metric (str): ``ip`` or ``l2``.
        keep_apart (bool): whether the cache is emptied where a document begins.

    Returns:
        Tensor: shape (len(thetas), len(sizes), N), see ``ContinuousCache.log_probs``.

    Raises:
        UserError: if an argument cannot be, or *data* lacks something.
    """
    refuse("log_p_cache", _faults(data, metric, keep_apart))
    resets = data.document_starts if keep_apart else ()
    cache = ContinuousCache(sizes, thetas, metric)
    return cache.log_probs(data.queries, data.targets, resets)


def _faults(data: TuningData, metric: str, keep_apart: bool) -> list:
    """What is wrong with the arguments of a cache over a whole text."""
    kinds = ("metric", metric, one_of(CACHE_METRICS)), ("keep_apart", keep_apart, TRUE_OR_FALSE)
    found = [fault for name, value, kind in kinds for fault in faults(value, kind, name)]
    needed = ["targets", "queries", *(["document_starts"] if keep_apart is True else [])]
    missing = [name for name in needed if getattr(data, name) is None]
    if missing:
        found.append(f"data must have {', '.join(needed)}, but lacks {', '.join(missing)}")
    return found


def _typeable_theta(theta: float) -> float:
    return float(f"{theta:.{_THETA_DIGITS}g}")


def _typeable_weights(knn_lambda: float, cache_lambda: float):
    # never up to 1 together, where one target that neither has makes perplexity infinite
    unit = 10.0**-_WEIGHT_DECIMALS
    knn_lambda = min(round(knn_lambda, _WEIGHT_DECIMALS), 1.0 - unit)
    cache_lambda = min(round(cache_lambda, _WEIGHT_DECIMALS), 1.0 - unit - knn_lambda)
    return knn_lambda, max(0.0, round(cache_lambda, _WEIGHT_DECIMALS))
