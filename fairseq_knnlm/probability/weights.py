"""The weights of a mixture with the highest likelihood: the one solver for all that is tuned."""

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch

from ..errors import UserError

_NEWTON_STEPS = 100
# Weights are found as exactly as this, and smaller ones are 0.
_WEIGHT_TOLERANCE = 1e-9
# After a step of this share of every weight Newton's error is the square of it: it is the last.
_LAST_STEP = 1e-5
# Steps shorter than this share of Newton's are not taken.
_SHORTEST = 1e-12
# A step beyond the maximum is taken if likelihood there falls by at most this share of how steeply
# it rose before.
_LESS_STEEP = 0.9
# Ratios that are multiplied at a time. Their product fits in float64: a step makes none of them
# larger than 1e9.
_FACTORS = 16
# The square of exp of this fits in float64.
_LARGEST_LOG_RATIO = 300.0


def best_weights(log_probs: Sequence[torch.Tensor]) -> np.ndarray:
    """The weights of a mixture with the highest likelihood.

    The mean of log(sum of w_j p_j) is concave in w: Newton's method, kept inside the simplex, finds
    its maximum. Probabilities are taken relative to those of the first distribution, so that

        mixture / p_0 = 1 + sum over j > 0 of w_j g_j,  with the gains g_j = p_j / p_0 - 1

    Args:
        log_probs (sequence of Tensor): J >= 2 of shape (N,), natural log; the first is finite, -inf
            is allowed in the others, and rows in which one is nan are left out.

    Returns:
        ndarray: shape (J,), float64, >= 0, of sum 1. Exactly 1 for the first where no other raises
        the likelihood.

    Raises:
        UserError: if there are fewer than two, shapes differ, or no row is left.
    """
    shapes = [tuple(each.shape) for each in log_probs]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise UserError(f"best_weights: expected two or more of one shape (N,), got {shapes}")
    gains = _gains(log_probs)
    means = [gain.mean().item() for gain in gains]
    if any(map(math.isnan, means)):
        gains = _without_nan(gains)
        means = [gain.mean().item() for gain in gains]
    weights = np.eye(1, len(shapes))[0]
    # As the likelihood is concave, a point from which no direction leads upwards is the maximum.
    if max(means) > 0:
        others = 1.0 / (len(shapes) + 2)
        weights = _climb(gains, np.array([1.0 - others * len(gains)] + [others] * len(gains)))
    weights[weights <= _WEIGHT_TOLERANCE] = 0.0
    return weights / weights.sum()


def _gains(log_probs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """p_j / p_0 - 1 of all but the first: J - 1 of shape (N,), float64."""
    first, *others = log_probs
    gains = first.new_empty(len(others), len(first), dtype=torch.float64)
    for gain, log_p in zip(gains, others):
        gain.copy_(log_p).sub_(first)
    return list(gains.clamp_(max=_LARGEST_LOG_RATIO).expm1_())


def _without_nan(gains: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same without the rows in which one is nan."""
    kept = ~torch.stack(gains).isnan().any(dim=0)
    if not kept.any():
        raise UserError("best_weights: there is no token that all have a probability for")
    return [gain[kept] for gain in gains]


class _Point:
    """A mixture on the way to the best.

    weights (ndarray): shape (J,).
    gradient (ndarray): shape (J - 1,), means of the derivatives of log(mixture / p_0) by all
        weights but the first, which gives what they take.
    curvature (ndarray): shape (J - 1, J - 1), means of the products of these derivatives.
    """

    def __init__(self, gains: list[torch.Tensor], weights: np.ndarray):
        self.weights = weights
        ratios = self.ratios(gains)
        slopes = [gain / ratios for gain in gains]
        self.gradient = np.array([each.mean().item() for each in slopes])
        # not a product of matrices, for which BLAS wakes threads of its own
        products = [[torch.dot(one, other).item() for other in slopes] for one in slopes]
        self.curvature = np.array(products) / len(ratios)

    def ratios(self, gains: list[torch.Tensor]) -> torch.Tensor:
        """mixture / p_0, shape (N,)."""
        weights = self.weights.tolist()
        ratios = (gains[0] * weights[1]).add_(1.0)
        for gain, weight in zip(gains[1:], weights[2:]):
            ratios.add_(gain, alpha=weight)
        return ratios

    def newton_step(self) -> np.ndarray:
        """The step that keeps the sum of all weights, and at 0 what is best so, shape (J,)."""
        if len(self.weights) == 2 and self.weights.min() > _WEIGHT_TOLERANCE:
            # as below, in a tenth of the time
            slope, steepening = self.gradient.item(), self.curvature.item()
            step = slope / steepening if steepening > 0 else 0.0
            return np.array([-step, step])
        # At the maximum the mean of p_j / mixture is 1 where a weight is positive, and at most 1
        # where it is 0.
        of_first = 1.0 - self.weights[1:] @ self.gradient
        means = np.append(of_first, of_first + self.gradient)
        positive = self.weights > _WEIGHT_TOLERANCE
        step = self._step_of(positive | (means > 1.0))
        # What is worth more alone may be worth less as the others change: then it stays at 0.
        while (step[~positive] < 0).any():
            step = self._step_of(positive | (step > 0))
        return step

    def _step_of(self, free: np.ndarray) -> np.ndarray:
        """Newton's step of the weights that are free, shape (J,), bool; the others stay."""
        rest = np.flatnonzero(free[1:])
        # The last row and column keep the sum of the rest, for a first that may not give.
        size = len(rest)
        system, right_side = np.ones((size + 1, size + 1)), np.append(self.gradient[rest], 0.0)
        system[:size, :size], system[size, size] = self.curvature[rest][:, rest], 0.0
        if free[0]:
            system, right_side = system[:size, :size], right_side[:size]
        step = np.zeros(len(free))
        # Of distributions that are the same any share will do, hence least squares.
        step[rest + 1] = np.linalg.lstsq(system, right_side, rcond=None)[0][:size]
        step[0] = -step.sum() if free[0] else 0.0
        return step


def _climb(gains: list[torch.Tensor], weights: np.ndarray) -> np.ndarray:
    """The best weights, shape (J,), from some that are positive."""
    point = _Point(gains, weights)
    for _ in range(_NEWTON_STEPS):
        step = point.newton_step()
        if (np.abs(step) <= np.maximum(_LAST_STEP * point.weights, _WEIGHT_TOLERANCE)).all():
            return point.weights + step
        further = _advance(gains, point, step)
        if further is None:
            break
        point = further
    return point.weights.copy()


def _advance(gains: list[torch.Tensor], point: _Point, step: np.ndarray) -> Optional[_Point]:
    """As far along *step* as likelihood grows and every weight stays positive."""
    pairs = zip(point.weights.tolist(), step.tolist())
    length = min([1.0] + [-0.99 * weight / change for weight, change in pairs if change < 0])
    upwards = point.gradient @ step[1:]
    while length > _SHORTEST:
        further = _Point(gains, point.weights + length * step)
        still_upwards = further.gradient @ step[1:]
        # Likelihood, being concave, grew all the way where it still grows. Of two distributions it
        # has but one slope, and is nearer to its maximum where that is less steep.
        if still_upwards >= 0 or len(gains) == 1 and -still_upwards <= _LESS_STEEP * upwards:
            return further
        if _log_growth(gains, point, further) >= 0:
            return further
        length /= 2
    return None


def _log_growth(gains: list[torch.Tensor], point: _Point, further: _Point) -> float:
    """By how much the mean of log(mixture) is higher *further*.

    The logarithm is taken of products of several: one costs as much as ten multiplications.
    """
    ratios = further.ratios(gains).div_(point.ratios(gains))
    count = len(ratios) // _FACTORS
    products = ratios[: count * _FACTORS].view(_FACTORS, count).prod(dim=0)
    rest = ratios[count * _FACTORS :]
    return (products.log_().sum() + rest.log().sum()).item() / len(ratios)
