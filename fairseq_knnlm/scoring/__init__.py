"""Scoring targets with neighbours: where model, datastore and mixture meet.

``settings`` says what the flags mean, ``in_effect`` where each comes from, ``compatibility`` what
fits a datastore; ``scorer`` scores, ``recorder`` keeps what it computes, ``words`` and
``text_bytes`` count.
Imports from ``probability``, ``datastore``, ``search``, ``encoding`` and the root.
"""

from .scorer import KNNScorer, make_scorer
from .settings import Settings

__all__ = ["KNNScorer", "Settings", "make_scorer"]
