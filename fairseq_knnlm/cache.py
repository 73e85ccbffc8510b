"""The continuous cache: a memory of the last tokens of the text that is being evaluated.

Grave, Joulin and Usunier (ICLR 2017), section 3. It is what the datastore is to the training
text: pairs of a hidden state and the token that followed, here of the n positions before.
"""

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch

from .errors import UserError

METRICS = ("ip", "l2")
# Positions that are compared with their past in one product: as many as leave it in the cache.
_MAX_ROWS, _MIN_ROWS = 256, 16
_MAX_PRODUCTS = 1 << 20
# Weights below exp of this count for nothing, and beyond -87 float32 has but slow denormal numbers.
_SMALLEST_LOG_WEIGHT = -80.0
# In place of 0, since 0 * -inf is nan.
_LEAST_THETA = 1e-30


class ContinuousCache:
    """The last hidden states of a text and the tokens that followed, read from front to back.

    p_cache(w|x_1..t) is proportional to the sum over i in t-n..t-1 with x_{i+1} = w of
    exp(theta h_t . h_i), or of exp(-theta ||h_t - h_i||^2).

    The text comes in pieces of any length, and gives the same whatever they are. Several sizes and
    thetas share one pass: windows are nested, and theta only scales the products.

    Args:
        sizes (sequence of int): n, positions looked back on, each >= 1.
        thetas (sequence of float): theta >= 0; 0 counts tokens. None: one, 1 / sqrt(D), as
            attention scales its products; half of it for l2, of whose kernel the product is twice.
        metric (str): ``ip``, the inner product of Grave et al., or ``l2``, squared as for kNN.

    Raises:
        UserError: if there is no size or no theta, or one cannot be.
    """

    def __init__(
        self, sizes: Sequence[int], thetas: Optional[Sequence[float]] = None, metric: str = "ip"
    ):
        if not sizes or not all(size >= 1 for size in sizes):
            raise UserError(f"ContinuousCache: sizes must be >= 1, got {list(sizes)}")
        possible = thetas is None or thetas and all(0 <= theta < math.inf for theta in thetas)
        if not possible:
            raise UserError(f"ContinuousCache: thetas must be finite and >= 0, got {list(thetas)}")
        if metric not in METRICS:
            raise UserError(f"ContinuousCache: metric must be in {METRICS}, got {metric!r}")
        self._thetas = None if thetas is None else [max(theta, _LEAST_THETA) for theta in thetas]
        self.metric = metric
        self._sizes = np.array(sizes, dtype=np.int64)
        self._states: Optional[torch.Tensor] = None
        self._values: Optional[torch.Tensor] = None
        # positions since the text or the document began
        self._age = 0

    def log_probs(self, states, targets, resets: Sequence[int] = ()) -> torch.Tensor:
        """Log-probabilities of the next piece of the text, which the cache then remembers.

        Args:
            states (Tensor): shape (N, D), any float dtype, h_t.
            targets (LongTensor): shape (N,), x_{t+1}, on the same device.
            resets (sequence of int): rows before which everything is forgotten, ascending.

        Returns:
            Tensor: shape (len(thetas), len(sizes), N), float32, natural log; -inf where the target
            is not in the cache, nan where the cache is empty and p_cache not defined.
        """
        past = 0 if self._states is None else len(self._states)
        # no further back than the text goes
        sizes = self._sizes.clip(max=max(1, past + len(targets)))
        bounds, order = np.unique(sizes, return_inverse=True)
        size = int(bounds[-1])
        ages = self._ages(len(targets), resets).clip(max=size)
        states, values = self._with_past(states.float(), targets, size - past)
        if self._thetas is None:
            self._thetas = [(0.5 if self.metric == "l2" else 1.0) / math.sqrt(states.size(1))]
        log_p = states.new_empty(len(self._thetas), len(bounds), len(targets))
        rows = min(_MAX_ROWS, max(_MIN_ROWS, _MAX_PRODUCTS // size))
        workspace = _Workspace(states, rows, size)
        for start in range(0, len(targets), rows):
            stop = min(start + rows, len(targets))
            seen = slice(start, stop + size)
            band = self._band(states[seen], ages[start:stop], workspace)
            log_p[:, :, start:stop] = self._log_probs(band, values[seen], bounds, workspace)
        return log_p[:, order]

    def _ages(self, count: int, resets) -> torch.Tensor:
        """Positions between each row and the beginning of its text."""
        starts = np.full(count + 1, -self._age, dtype=np.int64)
        resets = np.asarray(resets, dtype=np.int64)
        starts[resets] = resets
        ages = np.arange(count + 1) - np.maximum.accumulate(starts)
        self._age = int(ages[-1])
        return torch.from_numpy(ages[:-1])

    def _with_past(self, states, targets, missing: int):
        """The piece with the window before it, rows of zeros where the text had not begun."""
        if self._states is None:
            self._states, self._values = states[:0], targets[:0].int()
        zeros = states.new_zeros(missing, states.size(1))
        states = torch.cat([zeros, self._states, states])
        values = torch.cat([zeros[:, 0].int(), self._values, targets.int()])
        kept = slice(max(missing, len(states) - int(self._sizes.max())), None)
        self._states, self._values = states[kept].clone(), values[kept].clone()
        return states, values

    def _band(self, states, ages, workspace) -> torch.Tensor:
        """What each position has in common with its window, oldest first, shape (rows, n).

        Args:
            states (Tensor): shape (n + rows, D), the rows with the window of the first of them.
            ages (LongTensor): shape (rows,): what is older than these is forgotten, -inf.
        """
        n, rows = len(states) - len(ages), len(ages)
        out = workspace.products[: rows * (n + rows)].view(rows, n + rows)
        products = torch.mm(states[n:], states.t(), out=out)
        if self.metric == "l2":
            # ||h_t||^2 is the same for all that h_t is compared with
            products.mul_(2.0).sub_(states.square().sum(dim=1))
        # each window begins one position after the one before
        band = products.as_strided((rows, n), (n + rows + 1, 1))
        if int(ages.min()) < n:
            forgotten = torch.arange(n) < (n - ages).unsqueeze(1)
            band.masked_fill_(forgotten.to(band.device), -torch.inf)
        return band

    def _log_probs(self, band, values, bounds, workspace) -> torch.Tensor:
        """Shape (thetas, bounds, rows), see ``log_probs``; overwrites *band*."""
        rows, n = band.shape
        windows = values.unfold(0, n, 1)[:rows]
        matches = torch.eq(windows, values[n:].unsqueeze(1), out=workspace.matches[:rows])
        # windows are nested, the smallest holds the latest: between sizes lie segments
        totals, matched, last = [], [], n
        for first in (n - bounds).tolist():
            segment = slice(first, last)
            sums = self._log_sums(
                band[:, segment], matches[:, segment], workspace.weights[:rows, segment]
            )
            for sums_so_far, sum_ in zip((totals, matched), sums):
                before = sums_so_far[-1:]
                sums_so_far.append(torch.logaddexp(*before, sum_) if before else sum_)
            last = first
        return (torch.stack(matched, 1) - torch.stack(totals, 1)).clamp_(max=0.0)

    def _log_sums(self, products, matches, weights):
        """log of the sums of exp(theta * product), of all and of matches.

        Returns:
            tuple: two Tensors of shape (thetas, rows), float64.
        """
        rows, columns = matches.nonzero(as_tuple=True)
        matched = products[rows, columns].double()
        largest = products.amax(dim=1)
        empty = largest.isneginf()
        # nothing overflows, and each sum is at least 1, or 0 where there is nothing
        largest_matched = torch.full_like(largest, -torch.inf, dtype=torch.float64)
        largest_matched.scatter_reduce_(0, rows, matched, "amax")
        largest, largest_matched = (x.nan_to_num_(neginf=0.0) for x in (largest, largest_matched))
        products.sub_(largest.unsqueeze(1))
        matched.sub_(largest_matched[rows])
        log_sums = []
        for theta in self._thetas:
            torch.mul(products, theta, out=weights).clamp_(min=_SMALLEST_LOG_WEIGHT)
            total = weights.exp_().sum(dim=1).double().masked_fill_(empty, 0.0)
            found = torch.bincount(rows, (matched * theta).exp_(), len(products)).double()
            log_sums.append(
                torch.stack(
                    [total.log_() + largest * theta, found.log_() + largest_matched * theta]
                )
            )
        return torch.stack(log_sums, dim=1)


class _Workspace:
    """Memory that every piece uses again: fresh memory is slow."""

    def __init__(self, states: torch.Tensor, rows: int, size: int):
        self.products = states.new_empty(rows * (size + rows))
        self.weights = states.new_empty(rows, size)
        self.matches = states.new_empty(rows, size, dtype=torch.bool)
