"""Adding probabilities: neighbours and cache to log p, mixtures, their weights, and what they gain.

``log_sums`` has the one sum of exponential weights, ``knn`` and ``continuous_cache`` are its uses;
``mixture`` mixes and ``weights`` solves for the best weights; ``metrics`` and ``bootstrap`` say how
good a mixture is and how sure that is. Imports from the root only; knows no model and no search.
"""

from .batch_memory import joint_log_probs, memory_log_sums
from .bootstrap import Interval, paired_interval
from .continuous_cache import ContinuousCache
from .knn import knn_log_probs, knn_weights, vocabulary_log_probs
from .metrics import perplexity, recall_at_k
from .mixture import mix
from .text_memory import TextMemory
from .weights import best_weights

__all__ = [
    "ContinuousCache",
    "Interval",
    "TextMemory",
    "best_weights",
    "joint_log_probs",
    "knn_log_probs",
    "knn_weights",
    "memory_log_sums",
    "mix",
    "paired_interval",
    "perplexity",
    "recall_at_k",
    "vocabulary_log_probs",
]
