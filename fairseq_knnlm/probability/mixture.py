"""Mixtures of language model, neighbours and cache, in log space and float32.

Khandelwal et al. (2020), Eq. 3; with a continuous cache, Grave et al. (2017), section 3.
"""

import math
from typing import Optional, Union

import torch

from ..errors import UserError

Weight = Union[float, torch.Tensor]

# Two weights such as 0.9 and 0.1 need not add up to 1 in binary, still less in float32.
ROUNDING = 1e-9
_TENSOR_ROUNDING = 1e-6
# What 1 - 0.99 - 0.01 leaves of 1: no weight for what has none.
_NOTHING = 2.0**-50


def mix(
    log_p_lm,
    log_p_knn: Optional[torch.Tensor] = None,
    log_p_cache: Optional[torch.Tensor] = None,
    knn_lambda: Weight = 0.0,
    cache_lambda: Weight = 0.0,
) -> torch.Tensor:
    """log((1 - lambda - mu) p_lm + lambda p_knn + mu p_cache): one convex combination.

    Khandelwal et al. (2020), Eq. 3, and Grave et al. (2017), section 3, joined. Where there is no
    neighbour p_knn is not defined, and where the cache is empty p_cache is not: there the others
    keep their proportion and share its weight, so that the mixture remains a distribution.

    Args:
        log_p_lm (Tensor): shape (N,) or (N, V), natural log.
        log_p_knn (Tensor): the same shape, -inf allowed; a row without any neighbour is nan. None
            without a datastore: lambda is 0.
        log_p_cache (Tensor): the same shape, -inf allowed; a row with an empty cache is nan. None
            without a cache: mu is 0.
        knn_lambda, cache_lambda (float or Tensor): lambda and mu, >= 0, together at most 1. A
            Tensor has shape (N,): a weight for each row.

    Returns:
        Tensor: the same shape, float32, natural log. Exactly *log_p_lm* where both weights are 0,
        and exactly the other one where a weight is 1.

    Raises:
        UserError: if shapes differ, or lambda or mu cannot be or has another shape.

    >>> p_lm, p_knn = torch.tensor([0.5, 0.1]), torch.tensor([0.2, 0.9])
    >>> p = mix(p_lm.log(), p_knn.log(), knn_lambda=torch.tensor([0.0, 0.25])).exp()
    >>> [round(each, 4) for each in p.tolist()]
    [0.5, 0.3]
    """
    _refuse_other_shapes(log_p_lm, log_p_knn=log_p_knn, log_p_cache=log_p_cache)
    knn_lambda = 0.0 if log_p_knn is None else knn_lambda
    cache_lambda = 0.0 if log_p_cache is None else cache_lambda
    if isinstance(knn_lambda, torch.Tensor) or isinstance(cache_lambda, torch.Tensor):
        knn_lambda, cache_lambda = (
            _of_rows(weight, log_p_lm) for weight in (knn_lambda, cache_lambda)
        )
    _refuse_impossible(knn_lambda, cache_lambda, log_p_cache is not None)
    return _mix(log_p_lm.float(), log_p_knn, log_p_cache, knn_lambda, cache_lambda)


def _mix(
    log_p_lm,
    log_p_knn: Optional[torch.Tensor],
    log_p_cache: Optional[torch.Tensor],
    knn_lambda: Weight,
    cache_lambda: Weight,
) -> torch.Tensor:
    """As ``mix``, of what fits: neighbours join the model first, the cache both of them."""
    mixed = log_p_lm
    if log_p_knn is not None and _may_be_positive(knn_lambda):
        lm_and_knn = _interpolate(mixed, log_p_knn, _share(knn_lambda, 1.0 - cache_lambda))
        undefined = _undefined(log_p_knn)
        if undefined is None:
            mixed = lm_and_knn
        else:
            mixed = torch.where(undefined, mixed, lm_and_knn)
            without_knn = _share(cache_lambda, 1.0 - knn_lambda)
            cache_lambda = _choose(undefined, without_knn, cache_lambda)
    if log_p_cache is not None and _may_be_positive(cache_lambda):
        all_three = _interpolate(mixed, log_p_cache, cache_lambda)
        undefined = _undefined(log_p_cache)
        mixed = all_three if undefined is None else torch.where(undefined, mixed, all_three)
    return mixed


def weights_of_rows(
    log_p_lm: torch.Tensor,
    log_p_knn: Optional[torch.Tensor] = None,
    log_p_cache: Optional[torch.Tensor] = None,
    knn_lambda: Weight = 0.0,
    cache_lambda: Weight = 0.0,
) -> torch.Tensor:
    """The weights that ``mix`` gives each row, where a memory is not defined as well.

    Args:
        log_p_lm, log_p_knn, log_p_cache, knn_lambda, cache_lambda: those of ``mix``; the
            distributions of shape (N,).

    Returns:
        Tensor: shape (N, 3), float64, of model, neighbours and cache; each row adds up to 1.
    """
    _refuse_other_shapes(log_p_lm, log_p_knn=log_p_knn, log_p_cache=log_p_cache)
    columns = []
    for log_p, weight in ((log_p_knn, knn_lambda), (log_p_cache, cache_lambda)):
        of_rows = torch.zeros(len(log_p_lm), dtype=torch.float64)
        columns.append(of_rows if log_p is None else of_rows + torch.as_tensor(weight))
    weights = torch.stack([1.0 - columns[0] - columns[1], *columns], dim=1).clamp_(min=0.0)
    for place, log_p in ((1, log_p_knn), (2, log_p_cache)):
        if log_p is not None:
            weights[log_p.isnan(), place] = 0.0
    totals = weights.sum(dim=1, keepdim=True)
    weights /= totals
    weights[totals.squeeze(1) == 0.0] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return weights


def _refuse_other_shapes(log_p_lm: torch.Tensor, **others: Optional[torch.Tensor]) -> None:
    # (N,) and (N, 1) would become (N, N) without a word.
    shape = log_p_lm.shape
    faults = [
        f"{name} must have the shape of log_p_lm {tuple(shape)}, got {tuple(log_p.shape)}"
        for name, log_p in others.items()
        if log_p is not None and log_p.shape != shape
    ]
    if log_p_lm.dim() not in (1, 2):
        faults.insert(0, f"log_p_lm must have shape (N,) or (N, V), got {tuple(shape)}")
    if faults:
        raise UserError(f"mix: {'; '.join(faults)}")


def _of_rows(weight: Weight, log_p: torch.Tensor) -> torch.Tensor:
    """A weight as float64, in a shape that can be multiplied with *log_p*."""
    if not isinstance(weight, torch.Tensor):
        return torch.tensor(weight, dtype=torch.float64, device=log_p.device)
    if weight.shape != log_p.shape[:1]:
        raise UserError(
            f"mix: a weight must be a number or of shape {tuple(log_p.shape[:1])}, one for each "
            f"row, got shape {tuple(weight.shape)}"
        )
    return weight.to(log_p.device, torch.float64).view(-1, *[1] * (log_p.dim() - 1))


def _refuse_impossible(knn: Weight, cache: Weight, with_cache: bool) -> None:
    if isinstance(knn, torch.Tensor):
        possible = (cache >= 0) & (cache <= 1) & (knn >= 0) & (knn <= 1 - cache + _TENSOR_ROUNDING)
        if possible.all():
            return
        row = int(possible.flatten().logical_not().nonzero()[0])
        knn, cache = (weight.expand_as(possible).flatten()[row].item() for weight in (knn, cache))
        where = f" in row {row}"
    else:
        if 0.0 <= cache <= 1.0 and 0.0 <= knn <= 1.0 - cache + ROUNDING:
            return
        where = ""
    expected = "lambda and mu must be >= 0 and together at most 1" if with_cache else None
    got = f"{knn} and {cache}" if with_cache else knn
    raise UserError(f"mix: {expected or 'lambda must be in [0, 1]'}, got {got}{where}")


def _may_be_positive(weight: Weight) -> bool:
    """Whether a weight is above 0; of a Tensor that is not looked at."""
    return isinstance(weight, torch.Tensor) or weight > 0.0


def _undefined(log_p: torch.Tensor) -> Optional[torch.Tensor]:
    """Rows that are nan, shape (N,) or (N, 1); None where none is.

    Of (N, V) the first column is looked at. Of many rows a maximum says it ten times as fast.
    """
    rows = log_p if log_p.dim() == 1 else log_p[:, :1]
    nowhere = rows.numel() == 0 or not math.isnan(rows.amax().item())
    return None if nowhere else rows.isnan()


def _share(weight: Weight, total: Weight) -> Weight:
    """*weight* as a share of *total*, at most 1; 0 of nothing."""
    if isinstance(weight, torch.Tensor):
        return (weight / total).clamp(max=1.0).masked_fill(total <= 0.0, 0.0)
    if weight > 0.0 and total - weight < _NOTHING:
        return 1.0
    return weight / total if total > 0.0 else 0.0


def _choose(condition: torch.Tensor, first: Weight, second: Weight) -> torch.Tensor:
    """*first* where *condition* holds, else *second*, float64."""
    chosen = condition.double()
    return chosen * first + (1.0 - chosen) * second


def _interpolate(log_p, log_q, weight: Weight):
    """log((1 - weight) p + weight q), float32; exactly one of them for weights 0 and 1."""
    log_q = log_q.float()
    if isinstance(weight, torch.Tensor):
        log_rest, log_weight = weight.neg().log1p().float(), weight.log().float()
        return torch.logaddexp(log_p + log_rest, log_q + log_weight)
    if weight > 0.5:
        log_p, log_q, weight = log_q, log_p, 1.0 - weight
    if weight == 0.0:
        return log_p
    # The smaller weight is added as a share of the larger: less memory is touched than above.
    log_rest = math.log1p(-weight)
    return torch.logaddexp(log_p, log_q + (math.log(weight) - log_rest)).add_(log_rest)
