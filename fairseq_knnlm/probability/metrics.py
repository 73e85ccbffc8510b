"""What a language model and a retrieval are measured by."""

import numpy as np

from ..errors import UserError


def perplexity(log_probs, tokens_per_unit: float = 1.0) -> float:
    """exp of the mean negative log-likelihood, every token counted once.

    Args:
        log_probs (array): shape (N,), natural log; -inf makes it infinite.
        tokens_per_unit (float): for the perplexity of larger units, words of several tokens say:
            tokens over units, >= 1.

    Returns:
        float: in [1, inf], lower is better.
    """
    with np.errstate(over="ignore"):
        nll_nats = -np.mean(np.asarray(log_probs, dtype=np.float64))
        return float(np.exp(nll_nats * tokens_per_unit))


def bits_per_byte(log_probs, size_bytes: int) -> float:
    """Bits that a text costs for each of its bytes, whatever it is cut into.

    Args:
        log_probs (array): shape (N,), natural log, of all its tokens, or of all its words.
        size_bytes (int): of the text, >= 1.

    Returns:
        float: in [0, inf], lower is better.
    """
    nll_nats = -np.sum(np.asarray(log_probs, dtype=np.float64))
    return float(nll_nats / np.log(2.0) / size_bytes)


def recall_at_k(ids, exact_ids) -> float:
    """Share of the exact k nearest neighbours that a search gives.

    Args:
        ids (array): shape (N, k), of the search; -1 where there is none.
        exact_ids (array): shape (N, k), ids.

    Returns:
        float: in [0, 1], higher is better.

    Raises:
        UserError: if shapes differ, or there is nothing to find.
    """
    shapes = np.shape(ids), np.shape(exact_ids)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise UserError(
            "recall_at_k: expected ids and exact_ids of one shape (N, k), N and k >= 1, got "
            f"{shapes[0]} and {shapes[1]}"
        )
    hits = sum(len(np.intersect1d(row, exact)) for row, exact in zip(ids, exact_ids))
    return hits / np.size(exact_ids)
