"""The continuous cache: a memory of the last tokens of the text that is being evaluated.

Grave, Joulin and Usunier (ICLR 2017), section 3. It is what the datastore is to the training
text: pairs of a hidden state and the token that followed, here of the n positions before.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Optional

import numpy as np
import torch

from ..errors import UserError
from ..fields import is_whole
from ..progress import track
from .log_sums import LogShares

CACHE_METRICS = ("ip", "l2")
# Positions that one product of matrices compares with their past, at most and at least.
_MAX_ROWS, _MIN_ROWS = 256, 16
# Elements of such a product: they stay in the processor's cache.
_MAX_PRODUCTS = 1 << 20
# In place of lower and higher ones: in float32 0 * -inf is nan, and so is inf * 0.
_THETAS = 1e-30, 1e30


class ContinuousCache:
    """The last hidden states of a text and the tokens that followed, read from front to back.

    p_cache(w|x_1..t) is proportional to the sum over i in t-n..t-1 with x_{i+1} = w of
    exp(theta h_t . h_i), or of exp(-theta ||h_t - h_i||^2).

    The text comes in pieces of any length, and gives the same whatever they are. Several sizes and
    thetas share one pass: windows are nested, and theta only scales the products.

    Args:
        sizes (sequence of int): n, positions looked back on, each >= 1.
        thetas (sequence of float): theta >= 0; 0 counts tokens. None: one, 1 / sqrt(D), as
            attention scales its products; half of it for l2, since ||h - h'||^2 has the product
            twice.
        metric (str): ``ip``, the inner product of Grave et al., or ``l2``, squared as for kNN.

    Raises:
        UserError: if there is no size or no theta, or one of them or the metric cannot be.
    """

    def __init__(
        self, sizes: Sequence[int], thetas: Optional[Sequence[float]] = None, metric: str = "ip"
    ):
        faults = []
        if not sizes or not all(is_whole(size, 1) for size in sizes):
            faults.append(f"sizes must be whole numbers >= 1, got {list(sizes)}")
        if thetas is not None and not (thetas and all(0 <= theta < math.inf for theta in thetas)):
            faults.append(f"thetas must be finite and >= 0, got {list(thetas)}")
        if metric not in CACHE_METRICS:
            faults.append(f"metric must be one of {', '.join(CACHE_METRICS)}, got {metric!r}")
        if faults:
            raise UserError(f"ContinuousCache: {'; '.join(faults)}")
        low, high = _THETAS
        self._thetas = thetas and [min(max(theta, low), high) for theta in thetas]
        self.metric = metric
        self._sizes = np.array(sizes, dtype=np.int64)
        self._states: Optional[torch.Tensor] = None
        self._values: Optional[torch.Tensor] = None
        # Positions since the text, or the document in it, began.
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

        Raises:
            UserError: if the shapes do not fit.
        """
        window, order = self._read(states, targets, resets)
        log_p = states.new_empty(
            len(self._thetas), len(window.bounds), len(targets), dtype=torch.float32
        )
        for rows, band, values in window.pieces:
            log_p[:, :, rows] = self._log_probs(band, values, window)
        return log_p[:, order]

    def log_probs_and_top(
        self, states, targets, count: int, resets: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ``log_probs`` of one size and one theta, with what the cache finds most probable.

        Args:
            states, targets, resets: see ``log_probs``.
            count (int): how many tokens, >= 1.

        Returns:
            tuple of Tensor: log p_cache of the targets, shape (N,); log p_cache of the most
            probable tokens, the most probable first, -inf where there are fewer, shape (N, count);
            and their ids, int64, of the same shape.

        Raises:
            UserError: if there are several sizes or thetas, or the shapes do not fit.
        """
        if len(self._sizes) > 1 or (self._thetas is not None and len(self._thetas) > 1):
            raise UserError("ContinuousCache.log_probs_and_top: expected one size and one theta")
        window, _ = self._read(states, targets, resets)
        log_p = states.new_empty(len(targets), dtype=torch.float32)
        top = states.new_full((len(targets), count), -math.inf, dtype=torch.float32)
        ids = targets.new_zeros(len(targets), count)
        for rows, band, values in window.pieces:
            shares = (self._thetas[0] * band).softmax(dim=1).nan_to_num_()  # nan: an empty cache
            followed = values.unfold(0, band.size(1), 1)[: len(band)]
            types, places = followed.unique(return_inverse=True)
            sums = shares.new_zeros(len(band), len(types)).scatter_add_(1, places, shares)
            largest = sums.topk(min(count, len(types)))
            shown = slice(0, largest.values.size(1))
            top[rows, shown], ids[rows, shown] = largest.values.log(), types[largest.indices].long()
            log_p[rows] = self._log_probs(band, values, window)[0, 0]
        return log_p, top, ids

    def _read(self, states, targets, resets) -> tuple["_Window", np.ndarray]:
        """Remember the next piece of the text; what is computed of it, and the order of the sizes.

        Args:
            states, targets, resets: see ``log_probs``.
        """
        if states.dim() != 2 or targets.shape != states.shape[:1]:
            raise UserError(
                "ContinuousCache.log_probs: expected states (N, D) and targets (N,), got "
                f"{tuple(states.shape)}, {tuple(targets.shape)}"
            )
        past = 0 if self._states is None else len(self._states)
        # A window reaches no further back than the text goes.
        sizes = self._sizes.clip(max=max(1, past + len(targets)))
        bounds, order = np.unique(sizes, return_inverse=True)
        size = int(bounds[-1])
        ages = self._ages(len(targets), resets)
        states, values = self._with_past(states.float(), targets, size - past)
        if self._thetas is None:
            self._thetas = [(0.5 if self.metric == "l2" else 1.0) / math.sqrt(states.size(1))]
        window = _Window(states, min(_MAX_ROWS, max(_MIN_ROWS, _MAX_PRODUCTS // size)), bounds)
        window.pieces = self._pieces(states, values, ages, window)
        return window, order

    def _pieces(self, states, values, ages, window):
        """Rows, their band (see ``_band``) and what followed each state of it, some at a time."""
        size = int(window.bounds[-1])
        starts = range(0, len(ages), window.rows)
        for start in track("cache", starts, len(starts)):
            rows = slice(start, min(start + window.rows, len(ages)))
            seen = slice(start, rows.stop + size)
            yield rows, self._band(states[seen], ages[rows], window), values[seen]

    def _ages(self, count: int, resets) -> torch.Tensor:
        """Positions between each row and the beginning of its text."""
        starts = np.full(count + 1, -self._age, dtype=np.int64)
        resets = np.asarray(resets, dtype=np.int64)
        starts[resets] = resets
        ages = np.arange(count + 1) - np.maximum.accumulate(starts)
        self._age = int(ages[-1])
        return torch.from_numpy(ages[:-1])

    def _with_past(self, states, targets, missing: int):
        """The piece with the window before it, rows of zeros where the text had not begun.

        Args:
            states (Tensor): shape (N, D), of the piece.
            targets (LongTensor): shape (N,).
            missing (int): how many positions the window lacks.

        Returns:
            tuple of Tensor: states, shape (n + N, D), and values, shape (n + N,), int32.
        """
        if self._states is None:
            self._states, self._values = states[:0], targets[:0].int()
        zeros = states.new_zeros(missing, states.size(1))
        states = torch.cat([zeros, self._states, states])
        values = torch.cat([zeros[:, 0].int(), self._values, targets.int()])
        kept = slice(max(missing, len(states) - int(self._sizes.max())), None)
        self._states, self._values = states[kept].clone(), values[kept].clone()
        return states, values

    def _band(self, states, ages, window) -> torch.Tensor:
        """What each position has in common with its window, oldest first, shape (rows, n).

        Args:
            states (Tensor): shape (n + rows, D), the rows with the window of the first of them.
            ages (LongTensor): shape (rows,): what is older than these is forgotten, -inf.
        """
        n, rows = len(states) - len(ages), len(ages)
        out = window.products[: rows * (n + rows)].view(rows, n + rows)
        products = torch.mm(states[n:], states.t(), out=out)
        if self.metric == "l2":
            # ||h_t||^2 is left out: it is the same for all that h_t is compared with.
            products.mul_(2.0).sub_(states.square().sum(dim=1))
        # Each window begins one position after that of the row before.
        band = products.as_strided((rows, n), (n + rows + 1, 1))
        if int(ages.min()) < n:
            forgotten = torch.arange(n) < (n - ages).unsqueeze(1)
            band.masked_fill_(forgotten.to(band.device), -torch.inf)
        return band

    def _log_probs(self, band, values, window) -> torch.Tensor:
        """Shape (thetas, bounds, rows), see ``log_probs``; overwrites *band*.

        Args:
            band (Tensor): shape (rows, n), from ``_band``.
            values (Tensor): shape (n + rows,), what followed each state.
            window (_Window): sizes, the largest of them n, and memory.
        """
        rows, n = band.shape
        windows = values.unfold(0, n, 1)[:rows]
        matches = torch.eq(windows, values[n:].unsqueeze(1), out=window.matches[:rows])
        # Windows are nested, and the smallest holds the latest: between two sizes lies a segment.
        ends = [n, *(n - window.bounds).tolist()]
        segments = [slice(first, last) for last, first in zip(ends, ends[1:])]
        shares = LogShares(band, matches, lowest=False, segments=segments, overwrite=True)
        weights = window.weights[:rows]
        return torch.stack([shares.at(theta, weights).t() for theta in self._thetas])


class _Window:
    """The sizes of the windows of one piece, and memory that each part of it uses again.

    Args:
        states (Tensor): of the piece, on whose device the memory is: fresh memory is slow.
        rows (int): positions that are compared with their past at a time.
        bounds (ndarray): sizes, ascending.
    """

    def __init__(self, states: torch.Tensor, rows: int, bounds: np.ndarray):
        size = int(bounds[-1])
        self.rows, self.bounds = rows, bounds
        self.products = states.new_empty(rows * (size + rows))
        self.weights = states.new_empty(rows, size)
        self.matches = states.new_empty(rows, size, dtype=torch.bool)
        self.pieces: Iterator = iter(())
