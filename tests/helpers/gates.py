"""A gate of each kind, with weights of no text in particular."""

import torch

from fairseq_knnlm.gating import Buckets, Learned, Nest, NgramCounts
from fairseq_knnlm.gating.features import SCALARS_BEFORE, scalars_after
from fairseq_knnlm.gating.network import GateNetwork

from .small import random_values

K, DIMENSION, TYPES = 8, 6, 20


def make_learned(with_cache=False, temperatures=(1.0, 3.0)):
    """Networks as they are before any training."""
    torch.manual_seed(3)
    after, parts = scalars_after(K) + SCALARS_BEFORE, 1 + with_cache
    return Learned(
        K,
        temperatures,
        1.0,
        NgramCounts.of([random_values(5, 500, TYPES)], TYPES, eos=2),
        [GateNetwork(SCALARS_BEFORE, DIMENSION, 1) for _ in range(2)],
        [GateNetwork(after, DIMENSION, len(temperatures) + parts) for _ in range(3)],
        torch.linspace(-0.5, 0.5, 11),
        0.2 if with_cache else 0.0,
    )


def make_gates():
    """By kind."""
    weights = torch.tensor([0.9, 0.5, 0.0])
    return {
        "buckets": Buckets(K, 2.0, "ratio", torch.tensor([0.3, 0.6]), weights, torch.zeros(3)),
        "nest": Nest(K, 2.0, alpha=0.5, tau=0.1, cache_share=0.0),
        "learned": make_learned(),
    }
