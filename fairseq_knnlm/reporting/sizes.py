"""The curve over datastore sizes: what a random part of a datastore would have given.

Khandelwal et al. (2020), Figure 2. The nearest neighbours of a part are those of the whole that are
in it, as long as there are any among those that were retrieved; so nothing is searched again.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..probability.knn import knn_log_probs
from ..probability.mixture import mix
from ..progress import track
from ..tuning.knn_sweep import best_lambda
from ..tuning.tuning_data import PARTS, TuningData
from .intervals import perplexity_with_bounds

# Sizes of the curve, in parts of which the datastore has ``PARTS``.
_SIZES = (1, 2, 4, 8, 16)
# k over this is how many neighbours are taken of every part. Of the k nearest of the whole, k / 16
# are in the smallest part on average, and k / 32 or more for nearly every query.
_COMMON_SHARE = 2 * PARTS
# Queries whose neighbours are looked at together.
_BATCH_ROWS = 2048


class SizePoint(NamedTuple):
    """A lambda for a part of the datastore.

    parts (int): how many of ``PARTS`` parts of the datastore.
    k (int): neighbours per query; None: all that are known of this part.
    knn_lambda (float): the best one on the split that is tuned on.
    """

    parts: int
    k: Optional[int]
    knn_lambda: float


def tune_sizes(data: TuningData, temperature: float) -> list[SizePoint]:
    """The best lambda for every size of the datastore.

    Args:
        data (TuningData): of the split that is tuned on, with ``parts``.
        temperature (float): T > 0.

    Returns:
        list of SizePoint: first those of one k for every size, then those of all known neighbours,
        the smallest size first.
    """
    same_k = max(1, data.distances.size(1) // _COMMON_SHARE)
    wanted = [(parts, k) for k in (same_k, None) for parts in _SIZES]
    return [
        SizePoint(parts, k, best_lambda(data.log_p_lm, log_p_knn))
        for parts, k in track("sizes of the datastore", wanted, len(wanted))
        for log_p_knn in [log_p_knn_of_part(data, parts, k, temperature)]
    ]


def log_p_knn_of_part(
    data: TuningData, parts: int, k: Optional[int], temperature: float
) -> torch.Tensor:
    """log p_knn of the targets with a random part of the datastore.

    A query of which no known neighbour is in the part would find others there, further away. They
    count as if none of them had the target.

    Args:
        data (TuningData): with ``parts``.
        parts (int): how many of ``PARTS`` parts.
        k (int): neighbours per query; None: all that are known.
        temperature (float): T > 0.

    Returns:
        Tensor: shape (N,), float32, natural log; -inf where no known neighbour has the target.
    """
    pieces = []
    columns = (data.distances, data.matches, data.parts)
    for distances, matches, part in zip(*(column.split(_BATCH_ROWS) for column in columns)):
        kept = part < parts
        if k is not None:
            kept &= kept.cumsum(dim=1, dtype=torch.int32) <= k
        # Only whether a value is the target is known: True takes the place of the target's id.
        targets = torch.ones(len(part), dtype=torch.bool)
        distances = distances.masked_fill(~kept, math.inf)
        log_p_knn = knn_log_probs(distances, matches & kept, targets, temperature)
        pieces.append(log_p_knn.masked_fill_(log_p_knn.isnan(), -math.inf))
    return torch.cat(pieces)


def size_curve(
    data: TuningData,
    sizes: Sequence[SizePoint],
    temperature: float,
    entries: int,
    word_starts: Optional[np.ndarray] = None,
) -> Iterator[dict]:
    """The rows of the table of sizes.

    Args:
        data (TuningData): of the split that is reported on, with ``parts``.
        sizes (sequence of SizePoint): from ``tune_sizes``, of the split that is tuned on.
        temperature (float): T > 0.
        entries (int): of the whole datastore.
        word_starts (ndarray): see ``perplexity_with_bounds``.

    Yields:
        dict: ``share`` and ``entries`` of the datastore; ``k``, None for all known neighbours;
        ``mean_neighbors`` of a query; ``queries_with_fewer``, the share of those with fewer than
        k, None without k; ``knn_lambda``; and the perplexity, see ``perplexity_with_bounds``.
    """
    for size in track("sizes of the datastore", sizes, len(sizes)):
        known = _known_neighbors(data, size.parts)
        limit = size.k or data.distances.size(1)
        log_p_knn = log_p_knn_of_part(data, size.parts, size.k, temperature)
        mixed = mix(data.log_p_lm, log_p_knn, knn_lambda=size.knn_lambda)
        yield {
            "share": size.parts / PARTS,
            "entries": round(int(entries) * size.parts / PARTS),
            "k": size.k,
            "mean_neighbors": known.clamp(max=limit).double().mean().item(),
            "queries_with_fewer": (
                None if size.k is None else (known < size.k).double().mean().item()
            ),
            "knn_lambda": size.knn_lambda,
            **perplexity_with_bounds(data, mixed, word_starts),
        }


def _known_neighbors(data: TuningData, parts: int) -> torch.Tensor:
    """How many of the retrieved neighbours are in a part, shape (N,)."""
    pieces = zip(data.distances.split(_BATCH_ROWS), data.parts.split(_BATCH_ROWS))
    return torch.cat(
        [((part < parts) & (distances < math.inf)).sum(dim=1) for distances, part in pieces]
    )
