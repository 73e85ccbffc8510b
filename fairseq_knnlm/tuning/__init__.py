"""Choosing settings: one pass of model and search over a text, then every grid without either.

``collect`` makes the pass and ``tuning_data`` keeps it; ``knn_sweep`` and ``cache_sweep`` try grids
of neighbours and of a continuous cache, ``temperature`` finds the one that a datastore starts with;
``choose_gate`` has ``fit_gate`` and ``train_gate`` fit gates to ``gate_data``; ``choice`` says how
good a choice is and stores it. Imports from ``probability``, ``datastore``, ``search``,
``encoding``, ``gating``, ``scoring`` and the root.
"""

from .cache_sweep import CacheSweep, log_p_cache
from .choice import Chosen, measure
from .collect import collect
from .grid import CacheGridPoint, KNNGridPoint, best
from .knn_sweep import (
    Prefixes,
    best_lambda,
    best_of_each_k,
    log_p_knn,
    mixture_perplexities,
    sweep,
)
from .tuning_data import TuningData, load, save

__all__ = [
    "CacheGridPoint",
    "CacheSweep",
    "Chosen",
    "KNNGridPoint",
    "Prefixes",
    "TuningData",
    "best",
    "best_lambda",
    "best_of_each_k",
    "collect",
    "load",
    "log_p_cache",
    "log_p_knn",
    "measure",
    "mixture_perplexities",
    "save",
    "sweep",
]
