"""Scoring targets with neighbours: where model, datastore and mixture meet.

``settings`` says what the flags mean, ``compatibility`` what fits a datastore, ``scorer`` scores.
Imports from ``probability``, ``datastore``, ``search``, ``encoding`` and the root.
"""

from .scorer import KNNScorer, make_scorer
from .settings import Settings

__all__ = ["KNNScorer", "Settings", "make_scorer"]
