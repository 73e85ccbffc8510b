"""From neighbours to probabilities: log p_knn and the mixtures, in log space and float32.

Khandelwal et al. (2020), Eqs. 2 and 3; with a continuous cache, Grave et al. (2017).
"""

import math
from typing import Optional

import torch

from .errors import UserError

# Beyond these float32 has no room for distances divided by the temperature: the limits are reached.
_TEMPERATURES = (1e-30, 1e30)
# A finite stand-in for the logarithm of 0.
_LEAST = torch.finfo(torch.float32).min
# What is exp(-80) of the largest adds nothing, and exp of less takes five times as long.
_LEAST_LOG_WEIGHT = -80.0
# Two weights such as 0.9 and 0.1 need not add up to 1 in binary.
ROUNDING = 1e-9


def knn_log_probs(distances, values, targets, temperature=1.0):
    """Log-probability that the neighbours give to each target.

    Khandelwal et al. (2020), Eq. 2, with temperature T:
    p_knn(y|x) is proportional to the sum over v_i = y of exp(-d_i / T).

    Args:
        distances (Tensor): shape (N, k), float32, squared L2 (or minus the inner product);
            +inf where there is no neighbour.
        values (LongTensor): shape (N, k), token ids.
        targets (LongTensor): shape (N,), token ids.
        temperature (float): T > 0, in the unit of *distances*.

    Returns:
        Tensor: shape (N,), float32, natural log; -inf where no neighbour has the target.

    Raises:
        UserError: if shapes differ or temperature <= 0.

    >>> distances = torch.tensor([[0.0, 0.0, 1.0]])
    >>> values, targets = torch.tensor([[5, 6, 5]]), torch.tensor([5])
    >>> p_knn = knn_log_probs(distances, values, targets).exp()  # (1 + 1/e) / (2 + 1/e)
    >>> round(p_knn.item(), 4)
    0.5777
    """
    if distances.shape != values.shape or targets.shape != distances.shape[:1]:
        raise UserError(
            "knn_log_probs: expected distances and values of one shape (N, k) and targets (N,), "
            f"got {tuple(distances.shape)}, {tuple(values.shape)}, {tuple(targets.shape)}"
        )
    log_weights = _log_weights(distances, temperature)
    matches = values == targets.unsqueeze(1)
    weights = log_weights.clamp(min=_LEAST_LOG_WEIGHT).exp_()
    total = weights.sum(dim=1)
    matched = weights.mul_(matches).sum(dim=1)
    log_p_knn = (matched / total).log_().clamp_(max=0.0)
    # where what was raised to the least weight counts
    raised = distances.size(1) * math.exp(_LEAST_LOG_WEIGHT) / torch.finfo(torch.float32).eps
    (far,) = ((matched > 0) & (matched < raised)).nonzero(as_tuple=True)
    log_p_knn[far] = _log_sum(log_weights[far], matches[far]) - total[far].log()
    return log_p_knn


def vocabulary_log_probs(distances, values, vocabulary_size, temperature=1.0):
    """log p_knn of every token of the vocabulary, Khandelwal et al. (2020), Eq. 2.

    Args:
        distances (Tensor): shape (N, k), as in ``knn_log_probs``.
        values (LongTensor): shape (N, k), token ids.
        vocabulary_size (int): V.
        temperature (float): T > 0, in the unit of *distances*.

    Returns:
        Tensor: shape (N, V), float32, natural log; -inf where no neighbour has the token. The
        probabilities of a row sum to 1, or to 0 without any neighbour.

    Raises:
        UserError: if shapes differ or temperature <= 0.
    """
    if distances.shape != values.shape:
        raise UserError(
            "vocabulary_log_probs: expected distances and values of one shape (N, k), got "
            f"{tuple(distances.shape)}, {tuple(values.shape)}"
        )
    log_weights = _log_weights(distances, temperature)
    nothing = log_weights.new_full((len(distances), vocabulary_size), -math.inf)
    # relative to the nearest neighbour of each token: exp(-d / T) of a far one would be 0
    nearest = nothing.scatter_reduce(1, values, log_weights, "amax")
    nearest.clamp_(min=torch.finfo(torch.float32).min)
    weights = (log_weights - nearest.gather(1, values)).exp_()
    log_sums = torch.zeros_like(nothing).scatter_add_(1, values, weights).log_().add_(nearest)
    # a query without any neighbour has a total of -inf, and -inf - -inf would be nan
    log_total = log_weights.logsumexp(dim=1, keepdim=True).nan_to_num_(neginf=0.0)
    return log_sums.sub_(log_total).clamp_(max=0.0)


def knn_weights(distances, temperature=1.0):
    """Share of each neighbour in p_knn: exp(-d_i / T) over the sum of all.

    Args:
        distances (Tensor): shape (N, k), as in ``knn_log_probs``.
        temperature (float): T > 0, in the unit of *distances*.

    Returns:
        Tensor: shape (N, k), float32, in [0, 1]; rows sum to 1, or to 0 without any neighbour.

    Raises:
        UserError: if temperature <= 0.
    """
    # a query without any neighbour has 0 / 0
    return _log_weights(distances, temperature).softmax(dim=1).nan_to_num_(nan=0.0)


def _log_sum(log_weights, matches):
    """Log of the summed weights of those that match, shape (N,); -inf where none does."""
    matched = log_weights.masked_fill(~matches, -math.inf)
    most = matched.amax(dim=1, keepdim=True)
    raised = matched.maximum(most.clamp(min=_LEAST) + _LEAST_LOG_WEIGHT)
    return raised.logsumexp(dim=1).masked_fill_(most.squeeze(1).isneginf(), -math.inf)


def _log_weights(distances, temperature):
    """-d / T up to a constant of each row."""
    if not temperature > 0:
        raise UserError(f"knn_log_probs: temperature must be > 0, got {temperature}")
    temperature = min(max(temperature, _TEMPERATURES[0]), _TEMPERATURES[1])
    # relative to the nearest: float32 has few digits left for differences of large distances
    nearest = distances.float().amin(dim=1, keepdim=True).nan_to_num_(posinf=0.0)
    return (nearest - distances).div_(temperature)


def interpolate(log_p_lm, log_p_knn, knn_lambda):
    """log((1 - lambda) p_lm + lambda p_knn), Khandelwal et al. (2020), Eq. 3.

    Args:
        log_p_lm (Tensor): any shape, natural log.
        log_p_knn (Tensor): the same shape, natural log, -inf allowed.
        knn_lambda (float): lambda in [0, 1], the weight of p_knn.

    Returns:
        Tensor: the same shape, float32, natural log. Exactly *log_p_lm* for lambda = 0 and
        exactly *log_p_knn* for lambda = 1.

    Raises:
        UserError: if lambda is outside [0, 1].
    """
    if not 0.0 <= knn_lambda <= 1.0:
        raise UserError(f"interpolate: lambda must be in [0, 1], got {knn_lambda}")
    if knn_lambda == 0.0:
        return log_p_lm.float()
    if knn_lambda == 1.0:
        return log_p_knn.float()
    return torch.logaddexp(
        log_p_lm.float() + math.log1p(-knn_lambda), log_p_knn.float() + math.log(knn_lambda)
    )


def mix(
    log_p_lm,
    log_p_knn: Optional[torch.Tensor] = None,
    log_p_cache: Optional[torch.Tensor] = None,
    knn_lambda: float = 0.0,
    cache_lambda: float = 0.0,
):
    """log((1 - lambda - mu) p_lm + lambda p_knn + mu p_cache): one convex combination.

    Khandelwal et al. (2020), Eq. 3, and Grave et al. (2017), section 3, joined. Where the cache is
    empty p_cache is not defined: there the other two keep their proportion and share its weight, so
    that the mixture remains a distribution.

    Args:
        log_p_lm (Tensor): any shape, natural log.
        log_p_knn (Tensor): the same shape, -inf allowed; None without a datastore: lambda is 0.
        log_p_cache (Tensor): the same shape, -inf allowed, nan where the cache is empty; None
            without a cache: mu is 0.
        knn_lambda, cache_lambda (float): lambda and mu, >= 0, together at most 1.

    Returns:
        Tensor: the same shape, float32, natural log.

    Raises:
        UserError: if lambda or mu cannot be.
    """
    if log_p_knn is None:
        knn_lambda = 0.0
    if log_p_cache is None:
        cache_lambda = 0.0
    rest = 1.0 - cache_lambda
    if not (0.0 <= cache_lambda <= 1.0 and 0.0 <= knn_lambda <= rest + ROUNDING):
        raise UserError(
            "mix: lambda and mu must be >= 0 and together at most 1, got "
            f"{knn_lambda} and {cache_lambda}"
        )
    others = log_p_lm.float()
    if knn_lambda > 0.0 and rest > 0.0:
        others = interpolate(log_p_lm, log_p_knn, min(1.0, knn_lambda / rest))
    if cache_lambda == 0.0:
        return others
    mixed = interpolate(others, log_p_cache, cache_lambda)
    return torch.where(log_p_cache.isnan(), others, mixed)
