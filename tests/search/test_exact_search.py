"""Whatever the codes of the index, nothing that lies in a probed list is missed."""

import numpy as np
import pytest
import torch
from helpers.searching import as_arrays, search_index, values_for
from helpers.small import all_distances, assert_nearest

from fairseq_knnlm.search.exact_search import FEW_NEIGHBORS, ExactSearch
from fairseq_knnlm.search.index_build import load

LISTS = 16
COARSE = ["IVF16,PQ4x4fs", "IVF16,PQ2np", "IVF16,Flat", "IVF16,SQ4"]


@pytest.mark.parametrize("k", [1, FEW_NEIGHBORS, FEW_NEIGHBORS + 1])
@pytest.mark.parametrize("factory", COARSE)
def test_few_neighbours_of_all_lists_are_those_of_brute_force(
    keys, queries, index_path, factory, k
):
    found = search_index(index_path(factory, "l2"), "l2", keys, queries, k, LISTS)
    assert_nearest(found.distances, found.ids, all_distances(queries, keys))


def test_few_queries_are_served_by_candidates(keys, queries, index_path):
    """They are fewer than the keys of the lists, and most of the nearest are among them."""
    index = load(index_path("IVF16,PQ8x4fs", "l2"))
    search = ExactSearch(keys, values_for(len(keys)), "l2", index=index, nprobe=LISTS)
    few = queries[:3]
    found = as_arrays(search.search(torch.from_numpy(few), 8))
    nearest = np.argsort(all_distances(few, keys), axis=1, kind="stable")[:, :8]
    assert np.mean([np.isin(*rows).mean() for rows in zip(found.ids, nearest)]) > 0.9
