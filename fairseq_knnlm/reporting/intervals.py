"""How sure the figures of a report are: changes and perplexities with their intervals."""

from typing import Optional

import numpy as np

from ..probability.bootstrap import RESAMPLES, paired_interval
from ..probability.metrics import perplexity
from ..scoring.words import log_probs_of_words
from ..tuning.tuning_data import TuningData

# A curve has fifty intervals: as a band, a tenth of the resamples will do.
_BAND_RESAMPLES = RESAMPLES // 10


def change_between(first, second, document_starts) -> dict:
    """The relative change from one setting's perplexity to another's.

    Args:
        first, second (array): shape (N,), see ``paired_interval``.
        document_starts (array): shape (M,), see ``paired_interval``.

    Returns:
        dict: ``relative_change``; ``low`` and ``high``, ``units`` and ``unit`` as in ``Interval``.
    """
    change = paired_interval(first, second, document_starts)._asdict()
    return {"relative_change": change.pop("value"), **change}


def perplexity_with_bounds(
    data: TuningData, log_probs, word_starts: Optional[np.ndarray] = None
) -> dict:
    """A perplexity, and between which others it is.

    The bounds are those of the paired change from the model alone, whose perplexity is taken as it
    is: how much one text is harder than another does not show in them.

    Args:
        data (TuningData): with log p_lm and where documents begin.
        log_probs (Tensor): shape (N,), of the same targets, natural log.
        word_starts (ndarray): shape (W,), rows at which words begin: perplexity is of these; None:
            of the targets.

    Returns:
        dict: ``perplexity``; ``perplexity_low`` and ``perplexity_high``, None where the change has
        no interval.
    """
    base_log_probs, document_starts = data.log_p_lm, data.document_starts
    if word_starts is not None:
        base_log_probs = log_probs_of_words(base_log_probs, word_starts)
        log_probs = log_probs_of_words(log_probs, word_starts)
        document_starts = np.searchsorted(word_starts, document_starts)
    change = paired_interval(base_log_probs, log_probs, document_starts, _BAND_RESAMPLES)
    base = perplexity(base_log_probs)
    low, high = (
        None if bound is None else base * (1.0 + bound) for bound in (change.low, change.high)
    )
    return {
        "perplexity": perplexity(log_probs),
        "perplexity_low": low,
        "perplexity_high": high,
    }


def starts_within(rows: np.ndarray, document_starts: np.ndarray) -> np.ndarray:
    """Where documents begin among some of the rows of a text.

    Args:
        rows (ndarray): shape (n,), rows of the text, ascending.
        document_starts (ndarray): shape (M,), rows at which documents begin.

    Returns:
        ndarray: shape (m,), places in *rows*, ascending; a document without any of them has that of
        the next.
    """
    starts = np.searchsorted(rows, document_starts)
    return starts[starts < len(rows)]
