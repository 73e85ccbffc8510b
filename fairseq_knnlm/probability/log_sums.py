"""The share of a target among exponential weights, in log space: what both memories are made of.

The neighbours of a datastore (Khandelwal et al., 2020, Eq. 2) and the positions of a continuous
cache (Grave et al., 2017, Eq. 3) give a target the share

    sum of exp(scale * score) over those that have it / sum of exp(scale * score) over all

where a score is a distance and scale = -1 / T, or a score is a product and scale = theta.

Before weights are added up, the best score among them is subtracted from each. The largest weight
is then 1: nothing overflows, and no sum is 0. The entries that have the target are summed apart
from the others, relative to the best among themselves: so a target that only far entries have keeps
its probability.
"""

import math
from collections.abc import Sequence
from typing import Optional

import torch

# A weight of less than exp of this, relative to the best, is raised to it. It counts for nothing in
# float32, and exp of less than -87 gives denormal numbers, which take five times as long.
LEAST_LOG_WEIGHT = -80.0


class LogShares:
    """Shares of the targets of some rows, prepared for several scales.

    Args:
        scores (Tensor): shape (N, n), float32; infinite where there is nothing.
        matches (BoolTensor): shape (N, n), whether an entry has the target of its row.
        lowest (bool): whether the lowest score is the best (distances, scales < 0) or the highest
            (products, scales > 0).
        segments (sequence of slice): columns, each column in one of them; shares are of the first
            segment, of the first two together and so on. None: one of all columns.
        best_first (bool): whether the scores of each row are in order, the best in the first
            segment. All segments are then summed relative to it, which takes less time.
        overwrite (bool): whether *scores* may be overwritten, which saves time for several scales.
    """

    def __init__(
        self,
        scores: torch.Tensor,
        matches: torch.Tensor,
        lowest: bool,
        segments: Optional[Sequence[slice]] = None,
        best_first: bool = False,
        overwrite: bool = False,
    ):
        self._segments = [slice(0, scores.size(1))] if segments is None else list(segments)
        self._best_first = best_first or len(self._segments) == 1
        self._scores = scores
        self._reduce = "amin" if lowest else "amax"
        self._prepare_matches(matches)
        # With best_first one level a row, (N, 1), else one a segment, (N, segments).
        columns = self._segments[:1] if self._best_first else self._segments
        best = [getattr(scores[:, segment], self._reduce)(dim=1) for segment in columns]
        self._level = torch.stack(best, dim=1)
        # inf - inf would be nan
        self._reference = _finite(self._level)
        self._gaps = self._subtract(scores) if overwrite else None
        if self._best_first:
            # Where there is nothing the share is not defined; where nothing matches, any number
            # will do, for the sum of its weights is 0.
            offset = _finite(self._match_level).sub_(self._reference)
            self._offset = offset.masked_fill_(self._level.isinf(), math.nan)

    def __len__(self) -> int:
        return len(self._scores)

    def _prepare_matches(self, matches: torch.Tensor) -> None:
        """Of each match the number of its sum, and its score beyond the best in that sum."""
        rows, columns = matches.nonzero(as_tuple=True)
        scores = self._scores[rows, columns]
        there = scores.isfinite()
        if not there.all():
            rows, columns, scores = rows[there], columns[there], scores[there]
        self._shape = len(matches), len(self._segments)
        bins = rows
        if len(self._segments) > 1:
            number = torch.zeros(matches.size(1), dtype=torch.long)
            for segment_number, segment in enumerate(self._segments):
                number[segment] = segment_number
            bins = rows * len(self._segments) + number.to(rows.device)[columns]
        groups, shape = (rows, (len(matches), 1)) if self._best_first else (bins, self._shape)
        worst = math.inf if self._reduce == "amin" else -math.inf
        best = scores.new_full((shape[0] * shape[1],), worst)
        best.scatter_reduce_(0, groups, scores, self._reduce)
        self._match_gaps = scores.sub_(best[groups])
        self._bins = bins.int()
        self._match_level = best.view(shape)

    def _subtract(self, out: torch.Tensor) -> torch.Tensor:
        """Scores beyond the best they are summed with."""
        if self._best_first:
            return torch.sub(self._scores, self._reference, out=out)
        for number, segment in enumerate(self._segments):
            reference = self._reference[:, number : number + 1]
            torch.sub(self._scores[:, segment], reference, out=out[:, segment])
        return out

    def at(self, scale: float, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The shares for one scale.

        Args:
            scale (float): < 0 if the lowest score is the best, > 0 if the highest is.
            out (Tensor): shape (N, n), float32, what weights are written into; None: new memory.

        Returns:
            Tensor: shape (N, segments), float32, natural log; -inf where nothing has the target,
            nan where there is nothing at all.
        """
        out = torch.empty_like(self._scores) if out is None else out
        if self._gaps is None:
            weights = self._subtract(out).mul_(scale)
        else:
            weights = torch.mul(self._gaps, scale, out=out)
        weights.clamp_(min=LEAST_LOG_WEIGHT).exp_()
        total = torch.stack([weights[:, segment].sum(dim=1) for segment in self._segments], dim=1)
        matched = (self._match_gaps * scale).clamp_(min=LEAST_LOG_WEIGHT).exp_().double()
        # The sums are float64, but integers where there is no match at all.
        matched = torch.bincount(self._bins, matched, self._shape[0] * self._shape[1])
        matched = matched.double().view(self._shape)
        if self._best_first:
            log_total = total.cumsum(dim=1).log_()
            shares = matched.cumsum(dim=1).log_().float().sub_(log_total)
            return shares.add_(self._offset * scale).clamp_(max=0.0)
        log_matched = (matched.log_() + self._match_level.double() * scale).logcumsumexp(dim=1)
        log_total = (total.double().log_() + self._level.double() * scale).logcumsumexp(dim=1)
        return (log_matched - log_total).float().clamp_(max=0.0)


def log_shares(scores, matches, scale: float) -> torch.Tensor:
    """The share of the target in each row, see ``LogShares``, for a single scale.

    Weights that match are summed as they are summed with all others, relative to the best of the
    row. Pairs would take two to three times as long where many match (1024 x 1024 scores on one
    core: 2.7 ms against 9.3 ms with 30% matches, 3.0 ms against 3.4 ms with 2%), and on a GPU their
    sums would depend on the order of its threads. Only rows in which all matches are so far behind
    that raised weights count are done by pairs.

    Args:
        scores (Tensor): shape (N, n), float32, infinite where there is nothing.
        matches (BoolTensor): shape (N, n).
        scale (float): < 0 for distances, of which the lowest is the best; > 0 for products.

    Returns:
        Tensor: shape (N,), float32, natural log; -inf where nothing has the target, nan where there
        is nothing at all.
    """
    lowest = scale < 0
    best = scores.amin(dim=1, keepdim=True) if lowest else scores.amax(dim=1, keepdim=True)
    weights = (scores - _finite(best)).mul_(scale).clamp_(min=LEAST_LOG_WEIGHT).exp_()
    total = weights.sum(dim=1)
    matched = weights.mul_(matches).sum(dim=1)
    shares = (matched / total).log_()
    raised = scores.size(1) * math.exp(LEAST_LOG_WEIGHT) / torch.finfo(torch.float32).eps
    (far,) = ((matched > 0) & (matched < raised)).nonzero(as_tuple=True)
    if len(far):
        shares[far] = LogShares(scores[far], matches[far], lowest).at(scale).squeeze(1)
    return shares.masked_fill_(best.squeeze(1).isinf(), math.nan)


def _finite(best: torch.Tensor) -> torch.Tensor:
    """The same with the largest numbers that float32 has in place of infinities."""
    return best.nan_to_num()
