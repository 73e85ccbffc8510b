"""Fitting the gates of a few numbers, ``Buckets`` and ``Nest``, to a text that is tuned on."""

import math
from typing import Callable

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from ..gating.gates import (
    MEASURES,
    Buckets,
    Gate,
    Nest,
    bucket_of,
    quality,
)
from ..probability.weights import best_weights
from .gate_data import LEAST_LOG_P, GateData, mixture, weigh

# Buckets, of which each has at least so many tokens (Drozdov et al., 2022, have 32 and more).
_BUCKETS, _LEAST_TOKENS = 32, 50
_NEST_STEPS = 100


def held_out(data: GateData, fit: Callable[[GateData], Gate]) -> torch.Tensor:
    """log p of every token by a gate that was fitted without its fold.

    Args:
        data (GateData): of the whole text.
        fit (callable): takes the rest of it, gives a gate.

    Returns:
        Tensor: shape (N,), float32, natural log.
    """
    log_p = torch.empty(len(data.folds))
    for fold in np.unique(data.folds):
        out = data.folds == fold
        gate, some = fit(data.rows(~out)), data.rows(out)
        log_p[out] = mixture(weigh(gate, some), some.log_probs)
    return log_p


# -- buckets ---------------------------------------------------------------------------------------


def fit_buckets(data: GateData, k: int, temperature: float) -> Buckets:
    """The best weights for each range of the quality of a retrieval.

    Drozdov et al. (2022) take the distance of the nearest for the quality. Here the measure is the
    one of ``MEASURES`` with which tokens of each fold are likelier by the buckets of the others.

    Args:
        data (GateData): of the text that is tuned on.
        k (int): neighbours.
        temperature (float): T > 0, of p_knn.
    """

    def fit(some, measure):
        return _buckets(some, k, temperature, measure)

    measure = max(MEASURES, key=lambda each: held_out(data, lambda some: fit(some, each)).mean())
    return fit(data, measure)


def _buckets(data: GateData, k: int, temperature: float, measure: str) -> Buckets:
    qualities = quality(data.distances, measure)
    count = max(1, min(_BUCKETS, len(qualities) // _LEAST_TOKENS))
    ordered = qualities.sort().values
    # An edge is the first of the bucket above it. Equal qualities stand on one side of it.
    places = torch.arange(1, count) * len(ordered) // count
    edges = ordered[places].unique()
    edges = edges[edges > ordered[0]]
    buckets = bucket_of(qualities, edges)
    weights = [_best(data.log_probs[buckets == b]) for b in range(len(edges) + 1)]
    weights = torch.tensor(np.stack(weights), dtype=torch.float32)
    of_cache = weights[:, 2] if weights.size(1) > 2 else torch.zeros(len(weights))
    return Buckets(k, temperature, measure, edges, weights[:, 1], of_cache)


def _best(log_probs: torch.Tensor) -> np.ndarray:
    """The best weights of a bucket, which leave the model something.

    The likelihood of a few tokens can be highest without the model. A token that neither memory has
    would then be impossible, so the model keeps what one such token more would have given it.
    """
    if log_probs.isnan().any(dim=1).all():  # no token of the bucket has a neighbour
        return np.eye(1, log_probs.size(1))[0]
    weights = best_weights(log_probs.unbind(dim=1))
    least = 1.0 / (len(log_probs) + 1)
    if weights[0] < least:
        weights[1:] *= (1.0 - least) / weights[1:].sum()
        weights[0] = least
    return weights


# -- the rule of two numbers -----------------------------------------------------------------------


def fit_nest(data: GateData, k: int, temperature: float) -> Nest:
    """The numbers of the rule of Li et al. (2024) with the highest likelihood.

    They give alpha = .3 and tau = .1 for their distances, which is where the climb begins. With a
    cache, its share of what the rule leaves to the model is a third number.

    Args:
        data (GateData): of the text that is tuned on.
        k (int): neighbours.
        temperature (float): T > 0, of p_knn.
    """
    defined = ~data.log_probs.isnan().any(dim=1)
    log_probs = data.log_probs[defined].double().clamp(min=LEAST_LOG_P)
    ratio = quality(data.distances, "ratio")[defined].double()
    with_cache = log_probs.size(1) > 2
    # alpha, ln tau and the log-odds of the cache's share
    numbers = torch.tensor([0.3, math.log(0.1), -2.0], dtype=torch.float64, requires_grad=True)
    climb = torch.optim.LBFGS([numbers], max_iter=_NEST_STEPS, line_search_fn="strong_wolfe")

    def cost():
        climb.zero_grad()
        alpha, log_tau, odds = numbers
        gap = (ratio - alpha) / log_tau.exp()
        rest = log_probs[:, 0]
        if with_cache:
            in_cache = log_probs[:, 2] + logsigmoid(odds)
            rest = torch.logaddexp(rest + logsigmoid(-odds), in_cache)
        mixed = torch.logaddexp(rest + logsigmoid(gap), log_probs[:, 1] + logsigmoid(-gap))
        loss = -mixed.mean()
        loss.backward()
        return loss

    climb.step(cost)
    alpha, log_tau, odds = numbers.detach()
    share = odds.sigmoid().item() if with_cache else 0.0
    return Nest(k, temperature, alpha.item(), log_tau.exp().item(), share)
