"""What a gate is fitted to, and what it makes of a text: all of one saved retrieval."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..errors import UserError
from ..gating.gates import Gate, Weights, joined
from ..probability.metrics import perplexity
from ..probability.mixture import mix
from ..scoring.words import log_probs_of_words
from .knn_sweep import log_p_knn
from .tuning_data import TuningData

FOLDS = 5
# Where there are fewer documents than folds, blocks of so many tokens are held out in their place.
_BLOCK_TOKENS = 1000
# Shares of the searches in the curve over what skipping them costs.
_SKIPS = tuple(step / 20 for step in range(21))
# Rows that are looked at or weighed at a time.
_ROWS = 4096
# In place of -inf and nan, whose derivatives are not defined.
LEAST_LOG_P = -1e4


class GateData(NamedTuple):
    """What a gate is fitted to, each of N tokens.

    log_probs (Tensor): shape (N, 1 + J) or, with a cache, (N, 2 + J): natural log of p_lm, of
        p_knn at J temperatures, and of p_cache of the targets; nan where one is not defined.
    distances (Tensor): shape (N, k), float32, nearest first.
    values (Tensor): shape (N, k), token ids; None where no gate looks at them.
    before (Tensor): shape (N, F), see ``gating.features``; None where no gate looks at it.
    folds (ndarray): shape (N,), which fold each token is held out in, see ``folds_of``.
    """

    log_probs: torch.Tensor
    distances: torch.Tensor
    values: torch.Tensor
    before: Optional[torch.Tensor]
    folds: np.ndarray

    @classmethod
    def of(
        cls,
        data: TuningData,
        k: int,
        temperatures: Sequence[float],
        log_p_cache: Optional[torch.Tensor] = None,
        before: Optional[torch.Tensor] = None,
    ) -> "GateData":
        """What a gate is fitted to.

        Args:
            data (TuningData): of a text; for a gate that looks at values, with those.
            k (int): neighbours that the gate is to weigh, at most those of *data*.
            temperatures (sequence of float): J, of the p_knn that it is to weigh.
            log_p_cache (Tensor): shape (N,), natural log; None without a cache.
            before (Tensor): shape (N, F); None where no gate looks at it.
        """
        parts = [data.log_p_lm, *(log_p_knn(data, [k], each)[0] for each in temperatures)]
        parts += [] if log_p_cache is None else [log_p_cache]
        return cls(
            torch.stack(parts, dim=1),
            data.distances[:, :k],
            None if data.values is None else data.values[:, :k],
            before,
            folds_of(len(data.log_p_lm), data.document_starts),
        )

    def rows(self, wanted) -> "GateData":
        """Some of the tokens.

        Args:
            wanted: a slice, or an array or tensor of row numbers or of N truth values.
        """
        return GateData(*(None if part is None else part[wanted] for part in self))

    def pieces(self) -> Iterator["GateData"]:
        """All tokens in their order, as many at a time as are looked at or weighed together."""
        for start in range(0, len(self.folds), _ROWS):
            yield self.rows(slice(start, start + _ROWS))


def folds_of(count: int, document_starts: Sequence[int]) -> np.ndarray:
    """Which fold each token of a text is held out in: whole documents, of about as many tokens.

    Args:
        count (int): N, tokens of the text.
        document_starts (sequence of int): rows at which documents begin, ascending. With fewer
            than ``FOLDS``, blocks of tokens are taken for documents.

    Returns:
        ndarray: shape (N,), int64, in [0, ``FOLDS``).
    """
    starts = np.unique(np.append(0, np.asarray(document_starts, dtype=np.int64)))
    if len(starts) < FOLDS:
        starts = np.arange(0, count, max(1, min(_BLOCK_TOKENS, count // FOLDS)))
    sizes = np.diff(np.append(starts, count))
    totals, fold = np.zeros(FOLDS, dtype=np.int64), np.zeros(len(starts), dtype=np.int64)
    for document in np.argsort(-sizes, kind="stable"):  # the largest first, to the smallest fold
        fold[document] = totals.argmin()
        totals[fold[document]] += sizes[document]
    return np.repeat(fold, sizes)


def look(gate: Gate, data: TuningData) -> Optional[torch.Tensor]:
    """What a gate knows of a text before the search, see ``Gate.look``.

    Raises:
        UserError: if *data* was not collected for a gate.
    """
    if gate.looks_before and data.contexts is None:
        raise UserError(f"a gate of the kind {gate.kind!r} needs data collected for it")
    return gate.look(data.queries, data.confidence, data.contexts)


def weigh(gate: Gate, data: GateData) -> Weights:
    """The weights that a gate gives to all tokens of a text."""
    weights = [gate.weigh(each.before, each.distances, each.values) for each in data.pieces()]
    return Weights(*(torch.cat(parts) for parts in zip(*weights)))


def mixture(weights: Weights, log_probs: torch.Tensor) -> torch.Tensor:
    """log p of the targets by a gate's weights.

    Args:
        weights (Weights): of N rows.
        log_probs (Tensor): shape (N, 1 + J) or, with a cache, (N, 2 + J), as in ``GateData``.

    Returns:
        Tensor: shape (N,), float32, natural log.
    """
    log_p_lm, *others = log_probs.unbind(dim=1)
    count = weights.knn.size(1)
    log_p_cache = others[count] if len(others) > count else None
    log_p_knn = joined(weights, others[:count])
    return mix(log_p_lm, log_p_knn, log_p_cache, weights.knn_lambda, weights.cache)


def skip_curve(gate: Gate, data: GateData, starts: Optional[np.ndarray] = None) -> list[dict]:
    """What it costs not to make some of the searches.

    Args:
        gate (Gate): that looks before the search.
        data (GateData): of a text.
        starts (ndarray): shape (W,), rows at which words begin, of which perplexity is to be;
            None: it is of tokens.

    Returns:
        list of dict: of each share ``skip``, as ``--knn-skip`` takes it, the share ``skipped`` of
        this text and its ``perplexity``.
    """
    weights = weigh(gate, data)
    with_cache = data.log_probs.size(1) > 1 + len(gate.temperatures)
    alone = Weights(
        torch.zeros_like(weights.knn),
        torch.full_like(weights.cache, gate.cache_share if with_cache else 0.0),
    )
    scores = [mixture(each, data.log_probs) for each in (weights, alone)]
    worth, points = gate.worth(data.before), []
    for skip in _SKIPS:
        wanted = worth > gate.threshold(skip)
        log_p = torch.where(wanted, *scores)
        points.append(
            {
                "skip": skip,
                "skipped": 1.0 - wanted.double().mean().item(),
                "perplexity": perplexity(
                    log_p if starts is None else log_probs_of_words(log_p, starts)
                ),
            }
        )
    return points
