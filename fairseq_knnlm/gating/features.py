"""What a gate looks at: of a token before the search, and of its neighbours after it.

Nothing here depends on the target: a weight that did would not leave a distribution. Before the
search (He et al., 2021): the hidden state, how sure the model is, and what the datastore's text has
of the last tokens. After it (Zheng et al., 2021): distances, how many different values there are,
and how sure p_knn is.
"""

import torch

from .ngram_counts import ORDERS

# Of a token before a search besides its hidden state: maximum and entropy, counts and successors.
SCALARS_BEFORE = 2 + 2 * ORDERS
# Values are compared among so many of the nearest: to sort all of them costs as much as a search.
_COMPARED = 128
# Distances are in units of the temperature; beyond so many a neighbour weighs nothing.
_FARTHEST = 1e6


def before_search(
    keys: torch.Tensor, confidence: torch.Tensor, log_counts: torch.Tensor
) -> torch.Tensor:
    """What is known of tokens before a search.

    Args:
        keys (Tensor): shape (N, D), the hidden states.
        confidence (Tensor): shape (N, 2), see ``encoding.confidence.of_logits``.
        log_counts (Tensor): shape (N, 2 * ``ORDERS``), see ``NgramCounts.log_counts``.

    Returns:
        Tensor: shape (N, 2 + 2 * ``ORDERS`` + D), float32; the hidden state comes last.
    """
    return torch.cat([confidence, log_counts.to(confidence.device), keys.float()], dim=1)


def ranks(k: int) -> list[int]:
    """The ranks that features are of: 1, 2, 4, ... and k itself."""
    return [1 << exponent for exponent in range((k - 1).bit_length())] + [k]


def scalars_after(k: int) -> int:
    """How many features ``after_search`` gives of *k* neighbours."""
    return 3 * len(ranks(k)) + len(ranks(min(k, _COMPARED))) + 2


def after_search(distances, values, temperature: float) -> torch.Tensor:
    """What neighbours say of themselves.

    Args:
        distances (Tensor): shape (N, k), float32, nearest first; +inf where there is no neighbour.
        values (Tensor): shape (N, k), token ids.
        temperature (float): T > 0, the unit of distances.

    Returns:
        Tensor: shape (N, F), float32, F fixed by k: of each rank i = 1, 2, 4, ... its distance on a
        log scale, d_1 / d_i and how far it is beyond the nearest; of the 128 nearest the number of
        different values up to each rank, and entropy and maximum of p_knn.
    """
    k, device = distances.size(1), distances.device
    at, compared_at = (torch.tensor(ranks(n), device=device) - 1 for n in (k, min(k, _COMPARED)))
    at_ranks, compared = (
        (some / temperature).clamp_(max=_FARTHEST)
        for some in (distances[:, at], distances[:, :_COMPARED])
    )
    nearest = at_ranks[:, :1]
    columns = [
        _log_scale(at_ranks),
        _share(nearest, at_ranks),
        (at_ranks - nearest).log1p(),
        _values_and_spread(compared - nearest, values[:, :_COMPARED], compared_at),
    ]
    return torch.cat(columns, dim=1)


def _log_scale(numbers: torch.Tensor) -> torch.Tensor:
    """ln(1 + x), and for what is negative, as inner products can be, -ln(1 - x)."""
    return numbers.abs().log1p() * numbers.sign()


def _share(nearest: torch.Tensor, farther: torch.Tensor) -> torch.Tensor:
    """nearest / farther, in [0, 1]; 1 where that is not above 0, as for inner products."""
    return torch.where(farther > 0, nearest / farther, 1.0).clamp_(0.0, 1.0)


def _values_and_spread(beyond, values, at) -> torch.Tensor:
    """Logarithms of the numbers of different values, then entropy and log-maximum of p_knn.

    Args:
        beyond (Tensor): shape (N, k), distances beyond the nearest, in units of the temperature.
        values (Tensor): shape (N, k), token ids.
        at (LongTensor): shape (R,), columns.
    """
    k = values.size(1)
    packed = values.long() * k + torch.arange(k, device=values.device)
    if int(values.max()) * k + k < 2**31:
        packed = packed.int()  # sorted in half the time
    packed = packed.sort(dim=1).values
    # Equal values now stand together, each group begins with its nearest.
    columns = (packed % k).long()
    packed //= k
    begins = torch.ones_like(packed, dtype=torch.bool)
    begins[:, 1:] = packed[:, 1:] != packed[:, :-1]
    firsts = torch.zeros_like(begins).scatter_(1, columns, begins)
    different = firsts.cumsum(dim=1, dtype=torch.int32)[:, at].float().log()
    weights = beyond.neg().softmax(dim=1).gather(1, columns)
    shares = torch.zeros_like(weights).scatter_add_(1, begins.cumsum(dim=1) - 1, weights)
    entropy = -torch.xlogy(shares, shares).sum(dim=1)
    spread = torch.stack([entropy, shares.amax(dim=1).log()], dim=1)
    return torch.cat([different, spread], dim=1)
