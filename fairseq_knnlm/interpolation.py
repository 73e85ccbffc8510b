"""From neighbours to probabilities: log p_knn and the mixture, in log space and float32.

Khandelwal et al. (2020), Eqs. 2 and 3.
"""

import math

import torch

from .errors import UserError

# Beyond these float32 has no room for distances divided by the temperature: the limits are reached.
_TEMPERATURES = (1e-30, 1e30)


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
    """
    if distances.shape != values.shape or targets.shape != distances.shape[:1]:
        raise UserError(
            "knn_log_probs: expected distances and values of one shape (N, k) and targets (N,), "
            f"got {tuple(distances.shape)}, {tuple(values.shape)}, {tuple(targets.shape)}"
        )
    log_weights = _log_weights(distances, temperature)
    log_total = log_weights.logsumexp(dim=1)
    matches = values == targets.unsqueeze(1)
    log_matched = log_weights.masked_fill(~matches, -math.inf).logsumexp(dim=1)
    # a query without any neighbour has log_total = -inf, and -inf - -inf would be nan
    log_p_knn = (log_matched - log_total).clamp_(max=0.0)
    return log_p_knn.masked_fill_(log_matched.isneginf(), -math.inf)


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


def _log_weights(distances, temperature):
    """-d / T up to a constant of each row."""
    if not temperature > 0:
        raise UserError(f"knn_log_probs: temperature must be > 0, got {temperature}")
    temperature = min(max(temperature, _TEMPERATURES[0]), _TEMPERATURES[1])
    # relative to the nearest: float32 has few digits left for differences of large distances
    nearest = distances.float().amin(dim=1, keepdim=True).nan_to_num_(posinf=0.0)
    return (nearest - distances) / temperature


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
