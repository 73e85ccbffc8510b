"""Searching an index with arrays in and out."""

from typing import NamedTuple

import numpy as np
import torch

from fairseq_knnlm.search.exact_search import ExactSearch
from fairseq_knnlm.search.index_build import load
from fairseq_knnlm.search.index_search import IndexSearch


class Arrays(NamedTuple):
    """Distances and ids, shape (N, k)."""

    distances: np.ndarray
    ids: np.ndarray


def values_for(count):
    """A token for each entry, which tells entries apart: shape (count,)."""
    return (np.arange(count) % 251).astype(np.uint16)


def as_arrays(neighbors):
    """Neighbours as arrays; their values must be those of ``values_for``."""
    distances, values, ids = (part.cpu().numpy() for part in neighbors)
    np.testing.assert_array_equal(values, np.where(ids < 0, 0, ids % 251))
    return Arrays(distances, ids)


def search_index(path, metric, keys, queries, k, nprobe, device="cpu"):
    """The k nearest by an index: with exact distances where *keys* are given, else its own."""
    values = values_for(1 << 16)
    if keys is None:
        searcher = IndexSearch(None, values, metric, index=load(path), nprobe=nprobe, device=device)
    else:
        searcher = ExactSearch(keys, values, metric, index=load(path), nprobe=nprobe, device=device)
    return as_arrays(searcher.search(torch.from_numpy(queries), k))
