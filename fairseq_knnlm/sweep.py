"""The whole grid of k, temperature and lambda over one saved retrieval.

Neighbours come nearest first, so the k nearest of any smaller k are a prefix: one cumulative sum
serves every k. For given k and T the log-likelihood is concave in lambda, so the best lambda is
solved for, not searched on a grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .errors import UserError
from .interpolation import interpolate
from .metrics import perplexity

_ROWS = 1024
_BISECTIONS = 40
# Temperatures tried first, then halfway points around the best of them, twice.
TEMPERATURES = tuple(2.0**exponent for exponent in range(-4, 13))
_REFINEMENTS = (2.0**0.5, 2.0**0.25)


class Retrieved(NamedTuple):
    """What one pass of model and search leaves to tune with.

    log_p_lm (Tensor): shape (N,), float32, log p_lm of the targets.
    distances (Tensor): shape (N, k), float32, nearest first; +inf where there is no neighbour.
    matches (BoolTensor): shape (N, k), whether the neighbour's value is the target.
    """

    log_p_lm: torch.Tensor
    distances: torch.Tensor
    matches: torch.Tensor


class Setting(NamedTuple):
    """Hyper-parameters and the perplexity that they gave."""

    k: int
    temperature: float
    knn_lambda: float
    perplexity: float


def log_p_knn(retrieved: Retrieved, ks: Sequence[int], temperature: float) -> torch.Tensor:
    """log p_knn of the targets (Khandelwal et al. 2020, Eq. 2) for several k at once.

    Returns:
        Tensor: shape (len(ks), N), float32; -inf where none of the k has the target.
    """
    columns = torch.tensor(ks) - 1
    pieces = []
    for distances, matches in zip(retrieved.distances.split(_ROWS), retrieved.matches.split(_ROWS)):
        # relative to the nearest, so that nothing overflows and the total is at least 1, or 0
        # without any neighbour
        weights = ((distances[:, :1] - distances) / temperature).exp_().nan_to_num_(0.0)
        total = weights.cumsum(dim=1)[:, columns]
        matched = weights.mul_(matches).cumsum(dim=1)[:, columns]
        pieces.append((matched.log() - total.clamp_(min=1.0).log()).t())
    return torch.cat(pieces, dim=1)


def best_lambda(log_p_lm: torch.Tensor, log_p_knn: torch.Tensor) -> float:
    """The lambda in [0, 1] with the highest likelihood.

    The mean of log((1 - lambda) p_lm + lambda p_knn) is concave in lambda; the root of its
    derivative is found by bisection.
    """
    gain = torch.expm1((log_p_knn.double() - log_p_lm.double()).clamp_(max=300.0))
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (gain / (1.0 + middle * gain)).mean() > 0:
            low = middle
        else:
            high = middle
    return low


def mixture_perplexity(log_p_lm: torch.Tensor, log_p_knn: torch.Tensor, knn_lambda: float) -> float:
    """Perplexity of the mixture (Khandelwal et al. 2020, Eq. 3)."""
    return perplexity(interpolate(log_p_lm, log_p_knn, knn_lambda))


def sweep(retrieved: Retrieved, ks: Sequence[int], temperatures: Sequence[float]) -> list[Setting]:
    """The best lambda and its perplexity for every k and temperature.

    Raises:
        UserError: if the grid is empty or a k is more than was retrieved.
    """
    limit = retrieved.distances.size(1)
    if not ks or not temperatures or not all(1 <= k <= limit for k in ks):
        raise UserError(
            f"fairseq_knnlm: the grid needs temperatures and k in [1, {limit}], got k in "
            f"{list(ks)} and {len(temperatures)} temperatures"
        )
    settings = []
    for temperature in temperatures:
        for k, scores in zip(ks, log_p_knn(retrieved, ks, temperature)):
            found = best_lambda(retrieved.log_p_lm, scores)
            result = mixture_perplexity(retrieved.log_p_lm, scores, found)
            settings.append(Setting(k, temperature, found, result))
    return settings


def tune(retrieved: Retrieved, ks: Sequence[int]) -> list[Setting]:
    """Sweep over powers of two of the temperature, then closer around the best one."""
    settings = sweep(retrieved, ks, TEMPERATURES)
    for factor in _REFINEMENTS:
        temperature = best(settings).temperature
        settings += sweep(retrieved, ks, [temperature / factor, temperature * factor])
    return settings


def best(settings: Sequence[Setting]) -> Setting:
    """The setting with the lowest perplexity."""
    return min(settings, key=lambda setting: setting.perplexity)


def evaluate(retrieved: Retrieved, setting: Setting) -> dict[str, float]:
    """Perplexity without and with neighbours at one setting, on another split say."""
    (scores,) = log_p_knn(retrieved, [setting.k], setting.temperature)
    return {
        "tokens": len(retrieved.log_p_lm),
        "base_perplexity": perplexity(retrieved.log_p_lm),
        "knn_perplexity": mixture_perplexity(retrieved.log_p_lm, scores, setting.knn_lambda),
    }
