"""From neighbours to log p_knn, in log space and float32: Khandelwal et al. (2020), Eq. 2."""

import math

import torch

from ..errors import UserError
from .log_sums import log_shares

# Beyond these float32 has no room for distances divided by the temperature. p_knn is then what it
# tends to: the nearest neighbour's alone, or equal shares for all.
_TEMPERATURES = (1e-30, 1e30)


def knn_log_probs(distances, values, targets, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability that the neighbours give to each target.

    Khandelwal et al. (2020), Eq. 2, with temperature T:
    p_knn(y|x) is proportional to the sum over v_i = y of exp(-d_i / T).

    Args:
        distances (Tensor): shape (N, k), float, squared L2 (or minus the inner product); +inf where
            there is no neighbour.
        values (LongTensor): shape (N, k), token ids.
        targets (LongTensor): shape (N,), token ids.
        temperature (float): T > 0, in the unit of *distances*.

    Returns:
        Tensor: shape (N,), float32, natural log; -inf where no neighbour has the target, nan where
        there is no neighbour at all: p_knn is not defined there, and ``mix`` leaves it out.

    Raises:
        UserError: if shapes differ or temperature <= 0.

    >>> distances = torch.tensor([[0.0, 0.0, 1.0]])
    >>> values, targets = torch.tensor([[5, 6, 5]]), torch.tensor([5])
    >>> p_knn = knn_log_probs(distances, values, targets).exp()  # (1 + 1/e) / (2 + 1/e)
    >>> round(p_knn.item(), 4)
    0.5777
    """
    one_shape = distances.shape == values.shape and targets.shape == distances.shape[:1]
    if not one_shape or distances.dim() != 2:
        raise UserError(
            "knn_log_probs: expected distances and values of one shape (N, k) and targets (N,), "
            f"got {tuple(distances.shape)}, {tuple(values.shape)}, {tuple(targets.shape)}"
        )
    scale = -1.0 / _bounded(temperature)
    return log_shares(distances.float(), values == targets.unsqueeze(1), scale)


def vocabulary_log_probs(
    distances, values, vocabulary_size: int, temperature: float = 1.0
) -> torch.Tensor:
    """log p_knn of every token of the vocabulary, Khandelwal et al. (2020), Eq. 2.

    Args:
        distances (Tensor): shape (N, k), as in ``knn_log_probs``.
        values (LongTensor): shape (N, k), token ids below V.
        vocabulary_size (int): V.
        temperature (float): T > 0, in the unit of *distances*.

    Returns:
        Tensor: shape (N, V), float32, natural log; -inf where no neighbour has the token. The
        probabilities of a row sum to 1. A row without any neighbour is nan.

    Raises:
        UserError: if shapes differ or temperature <= 0.
    """
    if distances.shape != values.shape or distances.dim() != 2:
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
    return log_sums.sub_(log_weights.logsumexp(dim=1, keepdim=True)).clamp_(max=0.0)


def knn_weights(distances, temperature: float = 1.0) -> torch.Tensor:
    """Share of each neighbour in p_knn: exp(-d_i / T) over the sum of all.

    Args:
        distances (Tensor): shape (N, k), as in ``knn_log_probs``.
        temperature (float): T > 0, in the unit of *distances*.

    Returns:
        Tensor: shape (N, k), float32, in [0, 1]; rows sum to 1, or to 0 without any neighbour.

    Raises:
        UserError: if distances have another shape or temperature <= 0.
    """
    if distances.dim() != 2:
        raise UserError(
            f"knn_weights: expected distances of shape (N, k), got {tuple(distances.shape)}"
        )
    # a query without any neighbour has nan
    return _log_weights(distances, temperature).softmax(dim=1).nan_to_num_(nan=0.0)


def _log_weights(distances, temperature: float):
    """-d / T up to a constant of each row; nan in a row without any neighbour."""
    temperature = _bounded(temperature)
    # relative to the nearest: float32 has few digits left for differences of large distances
    nearest = distances.float().amin(dim=1, keepdim=True)
    return (nearest - distances).div_(temperature)


def _bounded(temperature: float) -> float:
    if not temperature > 0:
        raise UserError(f"temperature must be > 0, got {temperature}")
    return min(max(temperature, _TEMPERATURES[0]), _TEMPERATURES[1])
