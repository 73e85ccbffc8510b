"""Weights of neighbours and cache that depend on the token, and the two gates of a few numbers.

A gate looks at a token and its neighbours, never at the target, and weighs p_knn and p_cache; the
language model has the rest. ``Buckets`` follows Drozdov et al. (2022), ``Nest`` Li et al. (2024);
``learned`` has the third.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional, Protocol

import torch

from ..errors import UserError

# What the quality of a retrieval is judged by: the distance of the nearest, or as a share of that
# of the farthest.
MEASURES = ("nearest", "ratio")
# The model is never left with less: a token that no neighbour has would be impossible.
_LEAST_REST = 1e-4


class Weights(NamedTuple):
    """What a mixture gives to its parts in each row; the rest is the language model's.

    knn (Tensor): shape (N, J), float32, >= 0, of p_knn at each of the gate's J temperatures.
    cache (Tensor): shape (N,), float32, >= 0, of p_cache; 0 of a gate that knows no cache.
    """

    knn: torch.Tensor
    cache: torch.Tensor

    @property
    def knn_lambda(self) -> torch.Tensor:
        """Weight of p_knn, at all temperatures together, shape (N,)."""
        return self.knn.sum(dim=1)

    def without_cache(self) -> "Weights":
        """The same where there is no cache: model and neighbours keep their proportion."""
        return Weights(self.knn / (1.0 - self.cache).unsqueeze(1), torch.zeros_like(self.cache))


class Gate(Protocol):
    """What weighs neighbours and cache.

    kind (str): its name in ``--knn-gate``.
    k (int): neighbours that it was fitted with.
    temperatures (tuple of float): J, of the p_knn that it weighs.
    looks_before (bool): whether it looks at what is known before a search, and so can skip some.
        It then has ``worth`` and ``threshold`` (see ``Learned``), and a ``cache_share``, the weight
        of p_cache where no search is made.
    """

    kind: str
    k: int
    temperatures: tuple[float, ...]
    looks_before: bool

    def look(self, keys, confidence, contexts) -> Optional[torch.Tensor]:
        """What the gate knows of some tokens before a search, for the other methods.

        Args:
            keys (Tensor): shape (N, D), the hidden states.
            confidence (Tensor): shape (N, 2), see ``encoding.confidence.of_logits``.
            contexts (LongTensor): shape (N, ``ORDERS``), see ``encoding.contexts``.

        Returns:
            Tensor: shape (N, F), float32; None of a gate that does not look before.
        """

    def weigh(self, before, distances, values) -> Weights:
        """The weights of some rows.

        Args:
            before (Tensor): shape (N, F), from ``look``, or None.
            distances (Tensor): shape (N, k), float32, nearest first.
            values (LongTensor): shape (N, k), token ids.
        """

    def wants(self, before, skip: float) -> torch.Tensor:
        """Which rows are to be searched, BoolTensor of shape (N,); of a gate that looks before.

        Args:
            before (Tensor): shape (N, F), from ``look``.
            skip (float): share that is not, in (0, 1], of the text that the gate was fitted on.
        """


class _LooksAfter:
    """A gate that looks at neighbours only."""

    looks_before = False

    def look(self, keys, confidence, contexts) -> None:
        """See ``Gate.look``."""


class Buckets(_LooksAfter):
    """Weights by the quality of the retrieval, one for each of some equally likely ranges of it.

    Args:
        k (int): neighbours that it was fitted with.
        temperature (float): T > 0.
        measure (str): one of ``MEASURES``.
        edges (Tensor): shape (B - 1,), float32, ascending, between the buckets.
        knn_lambdas, cache_lambdas (Tensor): shape (B,), float32, weights of each bucket.
    """

    kind = "buckets"

    def __init__(self, k: int, temperature: float, measure: str, edges, knn_lambdas, cache_lambdas):
        self.k, self.temperatures, self.measure = k, (temperature,), measure
        self.edges, self.knn_lambdas, self.cache_lambdas = edges, knn_lambdas, cache_lambdas

    def weigh(self, before, distances, values) -> Weights:
        """See ``Gate.weigh``."""
        buckets = bucket_of(quality(distances, self.measure), self.edges)
        of_knn, of_cache = (
            each.to(buckets.device)[buckets] for each in (self.knn_lambdas, self.cache_lambdas)
        )
        return Weights(of_knn.unsqueeze(1), of_cache)


class Nest(_LooksAfter):
    """The rule of Li et al. (2024): the model's weight is sigmoid((d_1 / d_k - alpha) / tau).

    Args:
        k (int): neighbours that it was fitted with.
        temperature (float): T > 0.
        alpha (float): where model and neighbours weigh the same.
        tau (float): > 0, how far around it both count.
        cache_share (float): of what is left to the model, in [0, 1).
    """

    kind = "nest"

    def __init__(self, k: int, temperature: float, alpha: float, tau: float, cache_share: float):
        self.k, self.temperatures = k, (temperature,)
        self.alpha, self.tau, self.cache_share = alpha, tau, cache_share

    def weigh(self, before, distances, values) -> Weights:
        """See ``Gate.weigh``."""
        of_rest = nest_rest(quality(distances, "ratio"), self.alpha, self.tau)
        return Weights((1.0 - of_rest).unsqueeze(1), of_rest * self.cache_share)


def quality(distances: torch.Tensor, measure: str) -> torch.Tensor:
    """How good a retrieval is: lower is better.

    Args:
        distances (Tensor): shape (N, k), float32, nearest first.
        measure (str): one of ``MEASURES``.

    Returns:
        Tensor: shape (N,), float32. A ratio is in [0, 1], and 1 where it is not defined: no
        distance is above 0, or there is no neighbour.
    """
    nearest = distances[:, 0]
    if measure == "nearest":
        return nearest
    farthest = distances[:, -1]
    ratio = nearest / farthest
    return torch.where((farthest > 0) & ratio.isfinite(), ratio.clamp(0.0, 1.0), 1.0)


def bucket_of(quality_of_rows: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """The bucket of each row, LongTensor of shape (N,): the number of edges at or below it."""
    return torch.bucketize(
        quality_of_rows.contiguous(), edges.to(quality_of_rows.device), right=True
    )


def nest_rest(ratio: torch.Tensor, alpha: float, tau: float) -> torch.Tensor:
    """What is left of 1 beside p_knn by the rule of ``Nest``, shape (N,)."""
    return ((ratio - alpha) / tau).sigmoid().clamp(min=_LEAST_REST)


def joined(weights: Weights, log_p_knn: Sequence[torch.Tensor]) -> torch.Tensor:
    """p_knn at several temperatures as one distribution, in the proportion of their weights.

    Args:
        weights (Weights): of N rows.
        log_p_knn (sequence of Tensor): J of shape (N,) or (N, V), natural log.

    Returns:
        Tensor: of that shape; nan in rows in which p_knn is not defined.
    """
    if len(log_p_knn) == 1:
        return log_p_knn[0]
    shares = weights.knn.log() - weights.knn_lambda.log().unsqueeze(1)
    # Where p_knn has no weight it matters little which one that is.
    shares = torch.where(weights.knn_lambda.unsqueeze(1) > 0, shares, -math.log(len(log_p_knn)))
    shares = shares.view(*shares.shape, *[1] * (log_p_knn[0].dim() - 1))
    parts = [log_p + shares[:, j] for j, log_p in enumerate(log_p_knn)]
    return torch.stack(parts).logsumexp(dim=0).clamp_(max=0.0)


def refuse_other_k(gate: Gate, k: int) -> None:
    """Refuse a gate for another number of neighbours than it was fitted with.

    Raises:
        UserError: naming both.
    """
    if gate.k != k:
        raise UserError(
            f"the gate was fitted with k = {gate.k} neighbours, {k} are searched: use its k, or "
            "run fairseq-knnlm-tune again"
        )
