"""Finding the nearest keys: the only door to FAISS.

An index is chosen (``index_factory``), estimated (``index_cost``), built (``index_build``) and
searched. ``retriever.Retriever`` is the way in, ``searcher`` the protocol that every kind of search
has.
Imports from ``datastore`` and the root only.
"""

from ..neighbors import Neighbors
from .index_build import build_index
from .index_factory import default_index_factory
from .retriever import Retriever
from .searcher import Searcher

__all__ = [
    "Neighbors",
    "Retriever",
    "Searcher",
    "build_index",
    "default_index_factory",
]
