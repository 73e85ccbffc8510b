"""The whole grid of theta and size of the continuous cache over one saved pass.

Sizes are nested windows and theta only scales what hidden states have in common, so a grid costs
little more than its largest size. For given size and theta the log-likelihood is concave in the
weights of the mixture, which are solved for.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from .cache import ContinuousCache
from .errors import UserError
from .interpolation import mix
from .metrics import perplexity
from .neighbors_file import Retrieved

# Thetas tried first: powers of two, from this one to that, over the variance of the states; then
# halfway points around the best of them, twice.
_LOWEST, _HIGHEST = -1, 6
_REFINEMENTS = (2.0**0.5, 2.0**0.25)
# So many more are tried, one after another, while the best is at an end of the range.
_MORE = 12
_THETA_DIGITS = 4
_NEWTON_STEPS = 100
_WEIGHT_TOLERANCE = 1e-9
# Weights are what can be typed as flags.
_WEIGHT_DECIMALS = 4


class CacheSetting(NamedTuple):
    """Hyper-parameters of a continuous cache and the perplexity that they gave.

    knn_lambda (float): weight of p_knn, 0 without neighbours.
    """

    cache_size: int
    cache_theta: float
    cache_lambda: float
    knn_lambda: float
    perplexity: float


class CacheSweep:
    """The best weights for every size and theta, with and without neighbours.

    Args:
        retrieved (Retrieved): log p_lm and hidden states of a text.
        metric (str): of the cache, ``ip`` or ``l2``.
        keep_apart (bool): whether the cache is emptied where a document begins.
        log_p_knn (Tensor): shape (N,), natural log; None without neighbours.

    Attributes:
        alone (list of CacheSetting): p_lm and p_cache mixed.
        with_knn (list of CacheSetting): all three; empty without neighbours.
    """

    def __init__(
        self,
        retrieved: Retrieved,
        metric: str,
        keep_apart: bool,
        log_p_knn: Optional[torch.Tensor] = None,
    ):
        self._retrieved, self._metric, self._keep_apart = retrieved, metric, keep_apart
        self._log_p_knn = log_p_knn
        self.alone: list[CacheSetting] = []
        self.with_knn: list[CacheSetting] = []

    def run(self, sizes: Sequence[int], thetas: Optional[Sequence[float]] = None) -> None:
        """Try a grid.

        Args:
            sizes: how many positions the cache looks back on, each >= 1.
            thetas: None: powers of two, about the variance of the states; more of them while the
                best is at an end, then closer around the best one.
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
        for factor in _REFINEMENTS:
            theta = self._best_theta()
            self._add(sizes, [theta / factor, theta * factor])

    def _middle(self) -> float:
        states = self._retrieved.queries
        variance = float((states - states.mean(dim=0)).square().sum(dim=1).mean())
        scale = 0.5 if self._metric == "l2" else 1.0
        return scale / variance if variance > 0 else 1.0

    def _best_theta(self) -> float:
        return best(self.with_knn or self.alone).cache_theta

    def _add(self, sizes, thetas) -> None:
        thetas = [_typeable_theta(theta) for theta in thetas]
        found = log_p_cache(self._retrieved, sizes, thetas, self._metric, self._keep_apart)
        for theta, of_sizes in zip(thetas, found):
            for size, scores in zip(sizes, of_sizes):
                self.alone.append(self._solved(size, theta, scores, None))
                if self._log_p_knn is not None:
                    self.with_knn.append(self._solved(size, theta, scores, self._log_p_knn))

    def _solved(self, size: int, theta: float, scores, log_p_knn) -> CacheSetting:
        log_p_lm = self._retrieved.log_p_lm
        if log_p_knn is None:
            weights = 0.0, *best_weights([log_p_lm, scores])[1:]
        else:
            weights = best_weights([log_p_lm, log_p_knn, scores])[1:]
        knn_lambda, cache_lambda = _typeable_weights(*weights)
        mixed = mix(log_p_lm, log_p_knn, scores, knn_lambda, cache_lambda)
        return CacheSetting(size, theta, cache_lambda, knn_lambda, perplexity(mixed))


def log_p_cache(
    retrieved: Retrieved,
    sizes: Sequence[int],
    thetas: Sequence[float],
    metric: str,
    keep_apart: bool,
) -> torch.Tensor:
    """log p_cache of a whole text, shape (len(thetas), len(sizes), N), see ``ContinuousCache``."""
    resets = retrieved.document_starts if keep_apart else ()
    cache = ContinuousCache(sizes, thetas, metric)
    return cache.log_probs(retrieved.queries, retrieved.targets, resets)


def _typeable_theta(theta: float) -> float:
    return float(f"{theta:.{_THETA_DIGITS}g}")


def _typeable_weights(knn_lambda: float, cache_lambda: float):
    # never up to 1 together, where one target that neither has makes perplexity infinite
    unit = 10.0**-_WEIGHT_DECIMALS
    knn_lambda = round(knn_lambda, _WEIGHT_DECIMALS)
    cache_lambda = min(round(cache_lambda, _WEIGHT_DECIMALS), 1.0 - unit - knn_lambda)
    return knn_lambda, max(0.0, round(cache_lambda, _WEIGHT_DECIMALS))


def best(settings: Sequence[CacheSetting]) -> CacheSetting:
    """The setting with the lowest perplexity, the smallest cache among equals."""
    return min(settings, key=lambda setting: (setting.perplexity, setting.cache_size))


def best_weights(log_probs: Sequence[torch.Tensor]) -> np.ndarray:
    """The weights of a mixture with the highest likelihood.

    The mean of log(sum of w_j p_j) is concave in w, and self-concordant: Newton's method, kept
    inside the simplex, finds its maximum.

    Args:
        log_probs: J Tensors of shape (N,), natural log; the first is finite, -inf is allowed in
            the others, and rows in which one is nan are left out.

    Returns:
        ndarray: shape (J,), float64, >= 0, of sum 1.

    Raises:
        UserError: if no row is left.
    """
    log_probs = torch.stack([each.double() for each in log_probs])
    log_probs = log_probs[:, ~log_probs.isnan().any(dim=0)]
    if log_probs.size(1) == 0:
        raise UserError("best_weights: there is no token that all have a probability for")
    ratios = (log_probs - log_probs.amax(dim=0)).exp().numpy()
    count = len(ratios)
    weights = np.full(count, 1.0 / count)
    free = np.ones(count, dtype=bool)
    for _ in range(_NEWTON_STEPS):
        shares = ratios / (weights @ ratios)
        gradient = shares.mean(axis=1)
        # at the maximum the gradient is 1 where a weight is positive, at most 1 where it is 0
        free = (weights > _WEIGHT_TOLERANCE) | (gradient > 1.0)
        step = _newton_step(shares, gradient, free)
        if np.abs(step).max() < _WEIGHT_TOLERANCE:
            break
        weights = _advance(ratios, weights, step)
    weights[weights <= _WEIGHT_TOLERANCE] = 0.0
    return weights / weights.sum()


def _newton_step(shares, gradient, free) -> np.ndarray:
    """The step of the free weights that keeps their sum; the others stay."""
    chosen = np.flatnonzero(free)
    size = len(chosen)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = shares[chosen] @ shares[chosen].T / shares.shape[1]
    system[size, :size] = system[:size, size] = 1.0
    # of distributions that are the same any share will do
    found = np.linalg.lstsq(system, np.append(gradient[chosen], 0.0), rcond=None)[0]
    step = np.zeros(len(gradient))
    step[chosen] = found[:size]
    return step


def _advance(ratios, weights, step) -> np.ndarray:
    """As far along *step* as likelihood grows and every weight stays positive."""
    falling = step < 0
    length = min(1.0, 0.99 * float(np.min(-weights[falling] / step[falling], initial=np.inf)))
    reached = np.log(weights @ ratios).mean()
    while length > _WEIGHT_TOLERANCE:
        proposed = weights + length * step
        if np.log(proposed @ ratios).mean() >= reached:
            return proposed
        length /= 2
    return weights
