"""What a language model and a retrieval are measured by."""

import math

import numpy as np


def perplexity(log_probs) -> float:
    """exp of the mean negative log-likelihood, every token counted once.

    Args:
        log_probs (array): shape (N,), natural log; -inf makes it infinite.

    Returns:
        float: in [1, inf], lower is better.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(-np.mean(np.asarray(log_probs, dtype=np.float64))))


def recall_at_k(found_ids, exact_ids) -> float:
    """Share of the exact k nearest neighbours that were found.

    Args:
        found_ids (array): shape (N, k), ids; -1 where there is none.
        exact_ids (array): shape (N, k), ids.

    Returns:
        float: in [0, 1], higher is better.
    """
    hits = sum(len(np.intersect1d(found, exact)) for found, exact in zip(found_ids, exact_ids))
    return hits / np.size(exact_ids)


def without_infinities(value):
    """JSON has no infinity: null in its place, anywhere in dictionaries and lists."""
    if isinstance(value, dict):
        return {name: without_infinities(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
