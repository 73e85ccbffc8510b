"""Finding the nearest keys: the only door to FAISS.

An index is chosen (``factory``), estimated (``index_cost``), built (``index_build``) and searched.
``retriever.Retriever`` is the way in, ``searcher`` the protocol that every kind of search has.
Imports from ``datastore`` and the root only.
"""

from ..neighbors import Neighbors
from .factory import default_factory
from .index_build import build_index
from .retriever import Retriever
from .searcher import Searcher

__all__ = [
    "Neighbors",
    "Retriever",
    "Searcher",
    "build_index",
    "default_factory",
]
