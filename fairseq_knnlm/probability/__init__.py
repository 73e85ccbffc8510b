"""Adding probabilities: neighbours and cache to log p, mixtures, their weights, and what they gain.

``log_sums`` has the one sum of exponential weights, ``knn`` and ``continuous_cache`` are its uses;
``mixture`` mixes and ``weights`` solves for the best weights; ``metrics`` and ``bootstrap`` say how
good a mixture is and how sure that is. Imports from the root only; knows no model and no search.
"""

from .bootstrap import Interval, paired_interval
from .continuous_cache import ContinuousCache
from .knn import knn_log_probs, knn_weights, vocabulary_log_probs
from .metrics import perplexity, recall_at_k
from .mixture import mix
from .weights import best_weights

__all__ = [
    "ContinuousCache",
    "Interval",
    "best_weights",
    "knn_log_probs",
    "knn_weights",
    "mix",
    "paired_interval",
    "perplexity",
    "recall_at_k",
    "vocabulary_log_probs",
]
