"""How often the last tokens of a context stand in a datastore's text, and what follows them.

He et al. (2021, "Efficient nearest neighbor language models", section 4.1) tell from these before a
search whether it is worth it. Counts are exact: an n-gram is the pair of the number of the
(n-1)-gram at its end and of the token before that, so that no two share a number. None reaches from
one document into another.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np

from ..encoding.blocks import document_starts

# n-grams of up to so many tokens are counted, as He et al. do.
ORDERS = 4


class Order(NamedTuple):
    """All n-grams of one n that a token follows in the same document.

    grams (ndarray): shape (G,), int64, ascending: the number of the (n-1)-gram of the latest
        tokens, which is its place in the order before, times the types, plus the token before it.
    counts (ndarray): shape (G,), uint32, how often each stands before a token.
    successors (ndarray): shape (G,), uint32, how many different tokens follow it.
    """

    grams: np.ndarray
    counts: np.ndarray
    successors: np.ndarray


class NgramCounts:
    """Counts of the n-grams of a text, n = 1 to ``ORDERS``.

    Args:
        orders (sequence of Order): of n = 1, 2 and so on.
        types (int): V, above every token id.
    """

    def __init__(self, orders: Sequence[Order], types: int):
        self.orders = list(orders)
        self.types = types

    @classmethod
    def of(
        cls, texts: Sequence[np.ndarray], types: int, eos: Optional[int] = None
    ) -> "NgramCounts":
        """Count the n-grams of texts.

        Args:
            texts (sequence of ndarray): token ids, of shape (T,) each; -1 where a token is not
                known (see ``Datastore.text``). No n-gram reaches across such a place.
            types (int): V, above every token id.
            eos (int): id of the end of a line: a document begins after an empty one. None: each
                text is one document.
        """
        # An unknown token ends each text, so that no n-gram reaches into the next one.
        text = np.concatenate([np.append(np.asarray(part, dtype=np.int64), -1) for part in texts])
        starts = [0] if eos is None else document_starts(text, eos)
        first = np.zeros(len(text), dtype=np.int64)
        first[starts] = starts
        return cls(list(_count(text, np.maximum.accumulate(first), types)), types)

    def log_counts(self, contexts: np.ndarray) -> np.ndarray:
        """What is known of the tokens before each position.

        Args:
            contexts (ndarray): shape (N, ``ORDERS``), the latest token first; -1 where there is
                none.

        Returns:
            ndarray: shape (N, 2 * ``ORDERS``), float32: ln(1 + count) of the last 1, 2, ... tokens,
            then ln(1 + number of different successors) of them.
        """
        known = np.zeros((2, len(self.orders), len(contexts)), dtype=np.uint32)
        rows = np.arange(len(contexts))
        numbers = np.zeros(len(contexts), dtype=np.int64)
        for n, order in enumerate(self.orders):
            tokens = contexts[rows, n]
            grams = numbers * self.types + tokens
            places = np.searchsorted(order.grams, grams)
            there = (tokens >= 0) & (places < len(order.grams))
            there[there] = order.grams[places[there]] == grams[there]
            rows, numbers = rows[there], places[there]
            known[0, n, rows] = order.counts[numbers]
            known[1, n, rows] = order.successors[numbers]
        return np.log1p(known.reshape(-1, len(contexts)).T, dtype=np.float32)


def _count(text: np.ndarray, first: np.ndarray, types: int) -> Iterator[Order]:
    """Yield the n-grams of n = 1, 2, ...

    Args:
        text (ndarray): shape (T,), int64, -1 where a token is not known.
        first (ndarray): shape (T,), where the document of each token begins.
        types (int): V.
    """
    places = np.flatnonzero(text >= 0)
    numbers = np.zeros(len(places), dtype=np.int64)
    for n in range(1, ORDERS + 1):
        within = places - n >= first[places]
        within[within] = text[places[within] - n] >= 0
        places, numbers = places[within], numbers[within]
        grams, numbers, counts = np.unique(
            numbers * types + text[places - n], return_inverse=True, return_counts=True
        )
        # numpy 2.0 gives the inverse another shape
        numbers = numbers.reshape(-1)
        followed = np.unique(numbers * types + text[places])
        successors = np.bincount(followed // types, minlength=len(grams))
        yield Order(grams, counts.astype(np.uint32), successors.astype(np.uint32))
