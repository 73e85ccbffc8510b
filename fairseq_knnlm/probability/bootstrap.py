"""How sure a difference of perplexities is: the paired bootstrap over documents.

Efron and Tibshirani (1993), chapter 13: documents are drawn with replacement, the same ones for
both settings, and the difference is computed anew for every draw. Tokens of one document are not
independent, documents nearly are.
"""

from typing import NamedTuple, Optional

import numpy as np

from ..errors import UserError
from ..fields import is_whole

# Fewer documents than this do not show how much documents differ: blocks of tokens are drawn
# instead. Fewer blocks than this give no interval.
MIN_UNITS = 10
# Tokens of a block.
BLOCK_TOKENS = 1000
# How often documents or blocks are drawn.
RESAMPLES = 10_000
# Of more documents than these, neighbouring ones are drawn together: more units would cost time and
# change little.
_MAX_UNITS = 4096
_SEED = 1234
# Units that are drawn at a time, so that memory is bounded.
_DRAWS = 1 << 20


class Interval(NamedTuple):
    """A relative change of perplexity and what bounds it with a probability of 95%.

    value (float): second perplexity / first perplexity - 1; negative is better.
    low, high (float): the 2.5% and 97.5% quantiles of the resamples; None where there are fewer
        than ``MIN_UNITS`` units.
    units (int): how many documents or blocks there are to draw from.
    unit (str): ``documents`` or ``blocks``.
    """

    value: float
    low: Optional[float]
    high: Optional[float]
    units: int
    unit: str


def paired_interval(first, second, document_starts, resamples: int = RESAMPLES) -> Interval:
    """The relative change from one setting's perplexity to another's, with its 95% interval.

    Args:
        first, second (array): shape (N,), log probabilities of the same targets, natural log;
            -inf makes a perplexity infinite.
        document_starts (array): shape (M,), rows at which documents begin, ascending; with fewer
            than ``MIN_UNITS``, blocks of ``BLOCK_TOKENS`` tokens are drawn instead.
        resamples (int): how often is drawn.

    Returns:
        Interval: of the change; infinite where the second perplexity alone is.

    Raises:
        UserError: if shapes differ, there is no target, or a start or *resamples* cannot be.
        Interval: of the change; infinite where the second perplexity alone is. Without bounds
        where there are fewer than ``MIN_UNITS`` blocks as well.
    """
    document_starts = np.asarray(document_starts)
    shapes = tuple(np.shape(first)), tuple(np.shape(second))
    _refuse_impossible(*shapes, document_starts, resamples)
    starts, unit = _units(len(first), document_starts.astype(np.int64))
    sizes = np.diff(np.append(starts, len(first)))
    scores = np.stack([np.asarray(first), np.asarray(second)], axis=1).astype(np.float64)
    with np.errstate(over="ignore"):
        totals = np.add.reduceat(scores, starts, axis=0)
        (change,) = _changes(totals.sum(axis=0)[None], sizes.sum())
        if len(starts) < MIN_UNITS:
            return Interval(float(change), None, None, len(starts), unit)
        changes = np.sort(_resampled_changes(totals, sizes, resamples))
    tail = int(0.025 * resamples)
    low, high = changes[[tail, -1 - tail]]
    return Interval(float(change), float(low), float(high), len(starts), unit)


def _refuse_impossible(first, second, document_starts: np.ndarray, resamples: int) -> None:
    faults = []
    if first != second or len(first) != 1 or not first[0]:
        faults.append(f"first and second must be of one shape (N,), N >= 1, got {first}, {second}")
    # There may be no start at all: then the text is one document.
    whole = document_starts.dtype.kind in "iu" or document_starts.shape == (0,)
    if document_starts.ndim != 1 or not whole:
        faults.append(
            f"document_starts must be rows, whole numbers of shape (M,), got "
            f"{document_starts.dtype} of shape {document_starts.shape}"
        )
    elif len(first) == 1 and ((document_starts < 0) | (document_starts >= first[0])).any():
        faults.append(f"document_starts must be rows in [0, {first[0]})")
    if not is_whole(resamples, 1):
        faults.append(f"resamples must be a whole number >= 1, got {resamples!r}")
    if faults:
        raise UserError(f"paired_interval: {'; '.join(faults)}")


def in_words(change: Interval, decimals: int = 2, counted: str = "tokens") -> str:
    """The bounds of a change and what they are of, or why there are none.

    Args:
        change (Interval): from ``paired_interval``.
        decimals (int): of the percentages.
        counted (str): what perplexity is of, and so what blocks are cut of.

    Returns:
        str: ``95% interval [-9.20%, -5.21%] (13 documents)``.
    """
    of = f"{change.units:,} {change.unit}"
    if change.unit == "blocks":
        of += f" of {BLOCK_TOKENS:,} {counted}, for want of {MIN_UNITS} documents"
    if change.low is None:
        return f"no 95% interval (too few: {of})"
    bounds = ", ".join(f"{bound:+.{decimals}%}" for bound in (change.low, change.high))
    return f"95% interval [{bounds}] ({of})"


def _units(count: int, document_starts: np.ndarray):
    """First rows of the documents or blocks that are drawn, ascending from 0, and their name."""
    if len(document_starts) >= MIN_UNITS:
        starts, unit = document_starts, "documents"
    else:
        starts, unit = np.arange(0, count, BLOCK_TOKENS), "blocks"
    starts = np.unique(np.append(0, starts))
    return starts[:: -(-len(starts) // _MAX_UNITS)], unit


def _resampled_changes(totals: np.ndarray, sizes: np.ndarray, resamples: int) -> np.ndarray:
    rng = np.random.default_rng(_SEED)
    step = max(1, _DRAWS // len(sizes))
    parts = []
    for begin in range(0, resamples, step):
        drawn = rng.integers(len(sizes), size=(min(step, resamples - begin), len(sizes)))
        parts.append(_changes(totals[drawn].sum(axis=1), sizes[drawn].sum(axis=1)))
    return np.concatenate(parts)


def _changes(totals: np.ndarray, tokens) -> np.ndarray:
    """exp of the difference of the mean NLL, less 1; shape (n, 2) to (n,)."""
    return np.expm1((totals[:, 0] - totals[:, 1]) / tokens)
