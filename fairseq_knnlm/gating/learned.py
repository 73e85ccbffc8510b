"""The learned gate: small networks that look before a search and after it.

Before (He et al., 2021): whether a search is worth it. After (Zheng et al., 2021, and more): how
much of the mixture is p_knn's, at which temperature, and how much is the cache's. Several networks,
each trained without another part of the text, are averaged: one alone leans more on chance.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .features import after_search, before_search
from .gates import Weights
from .network import GateNetwork
from .ngram_counts import NgramCounts

# The model is left with at least the rest of it: weights near 1 become 1 as float32.
_MOST = 1.0 - 1e-6


class Learned:
    """Weights by networks; see ``Gate`` for what it is asked.

    Args:
        k (int): neighbours that it was fitted with.
        temperatures (sequence of float): J, of the p_knn that it weighs.
        unit (float): T > 0, the temperature that distances are measured in.
        counts (NgramCounts): of the datastore's text.
        before (sequence of GateNetwork): what is known before a search, to what it is worth.
        after (sequence of GateNetwork): what is known after it, to the weights of the model, of
            p_knn at each temperature and, with a cache, of p_cache.
        quantiles (Tensor): shape (Q,), float32, ascending from the lowest to the highest worth of a
            search on the text that it was fitted on.
        cache_share (float): weight of p_cache where no search is made, in [0, 1).
    """

    kind = "learned"
    looks_before = True

    def __init__(
        self,
        k: int,
        temperatures: Sequence[float],
        unit: float,
        counts: NgramCounts,
        before: Sequence[GateNetwork],
        after: Sequence[GateNetwork],
        quantiles: torch.Tensor,
        cache_share: float = 0.0,
    ):
        self.k, self.temperatures, self.unit = k, tuple(temperatures), unit
        self.counts, self.quantiles, self.cache_share = counts, quantiles, cache_share
        self.before, self.after = ([each.eval() for each in group] for group in (before, after))

    def look(self, keys, confidence, contexts) -> torch.Tensor:
        """See ``Gate.look``."""
        log_counts = self.counts.log_counts(contexts.cpu().numpy())
        return before_search(keys, confidence, torch.from_numpy(log_counts))

    def weigh(self, before, distances, values) -> Weights:
        """See ``Gate.weigh``."""
        features = torch.cat([after_search(distances, values, self.unit), before], dim=1)
        weights = mean_weights(self.after, features) * _MOST
        count = len(self.temperatures)
        of_cache = weights[:, count + 1] if weights.size(1) > count + 1 else weights[:, 0] * 0.0
        return Weights(weights[:, 1 : count + 1], of_cache)

    def worth(self, before: torch.Tensor) -> torch.Tensor:
        """How much a search is worth, shape (N,): what log p is expected to gain, in nats."""
        return mean_output(self.before, before)[:, 0]

    def threshold(self, skip: float) -> float:
        """What a search must be worth to be made.

        Args:
            skip (float): share that is not, in [0, 1], of the text that the gate was fitted on.
        """
        if skip in (0.0, 1.0):
            return math.inf if skip else -math.inf
        places = np.linspace(0.0, 1.0, len(self.quantiles))
        return float(np.interp(skip, places, self.quantiles.numpy()))

    def wants(self, before: torch.Tensor, skip: float) -> torch.Tensor:
        """See ``Gate.wants``."""
        return self.worth(before) > self.threshold(skip)


@torch.no_grad()
def mean_output(networks: Sequence[GateNetwork], features: torch.Tensor) -> torch.Tensor:
    """The mean of several networks' outputs, shape (N, outputs)."""
    return torch.stack([_outputs(network, features) for network in networks]).mean(dim=0)


@torch.no_grad()
def mean_weights(networks: Sequence[GateNetwork], features: torch.Tensor) -> torch.Tensor:
    """The mean of several networks' weights, shape (N, outputs), of which rows sum to 1."""
    outputs = [_outputs(network, features) for network in networks]
    return torch.stack([each.softmax(dim=1) for each in outputs]).mean(dim=0)


def _outputs(network: GateNetwork, features: torch.Tensor) -> torch.Tensor:
    return network.to(features.device)(features)
