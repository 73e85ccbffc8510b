"""Gates: weights of neighbours and cache that depend on the token, and searches left out.

``ngram_counts`` and ``features`` are what a gate looks at, ``gates`` has the protocol and the two
gates of a few numbers, ``learned`` the one of a ``network``; ``gated_search`` asks a gate before
and after it searches, ``store`` is its file. Imports from ``encoding`` and the root.
"""

from .features import after_search, before_search
from .gated_search import Gated, GatedSearch
from .gates import Buckets, Gate, Nest, Weights
from .learned import Learned
from .ngram_counts import NgramCounts
from .store import from_bytes, to_bytes

__all__ = [
    "Buckets",
    "Gate",
    "Gated",
    "GatedSearch",
    "Learned",
    "Nest",
    "NgramCounts",
    "Weights",
    "after_search",
    "before_search",
    "from_bytes",
    "to_bytes",
]
