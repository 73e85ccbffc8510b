"""Comparing all keys by matrix products against brute force in float64."""

import numpy as np
import pytest
import torch
from helpers.searching import as_arrays, values_for
from helpers.small import all_distances, assert_nearest, random_keys, save_keys

from fairseq_knnlm.search import exhaustive_search
from fairseq_knnlm.search.exhaustive_search import ExhaustiveSearch

METRICS = ["l2", "ip"]
CPU = torch.device("cpu")


def search(keys, queries, k, metric="l2"):
    """Arrays of distances and ids."""
    searcher = ExhaustiveSearch(keys, values_for(len(keys)), metric, device=CPU)
    return as_arrays(searcher.search(torch.from_numpy(queries), k))


@pytest.fixture(params=[(1 << 16, 1 << 26), (64, 64 * 7), (100, 100), (1500, 1500 * 60)])
def blocks(request, monkeypatch):
    """Keys and products of a block: all in one, many with a rest, a query at a time, just all."""
    monkeypatch.setattr(exhaustive_search, "_KEYS", request.param[0])
    monkeypatch.setattr(exhaustive_search, "_PRODUCTS", {"cpu": request.param[1]})


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 20, 300, 1500])
def test_equals_brute_force(keys, queries, blocks, k, metric):
    distances, ids = search(keys, queries, k, metric)
    assert distances.dtype == np.float32 and ids.dtype == np.int64
    assert (np.diff(distances, axis=1) >= 0).all()
    assert_nearest(distances, ids, all_distances(queries, keys, metric))


def test_keys_far_from_the_origin_keep_their_digits(tmp_path, blocks):
    keys = save_keys(tmp_path, (random_keys(3, 1000, 16) + 60).astype(np.float16))
    queries = random_keys(4, 30, 16).astype(np.float32) + 60
    distances, ids = search(keys, queries, 50)
    exact = all_distances(queries, keys)
    np.testing.assert_allclose(distances, np.sort(exact, axis=1)[:, :50], rtol=1e-4)
    np.testing.assert_allclose(distances, np.take_along_axis(exact, ids, axis=1), rtol=1e-4)


def test_of_equal_distances_the_lower_id_comes_first(tmp_path, blocks):
    keys = save_keys(tmp_path, np.repeat(random_keys(5, 4, 16), 30, axis=0))
    queries = keys[::40].astype(np.float32)
    distances, ids = search(keys, queries, 120)
    for row, row_ids in zip(distances, ids):
        same = np.diff(row) == 0
        assert same.any() and (np.diff(row_ids)[same] > 0).all()
        assert (row >= 0).all()


def test_half_precision_allowed_elsewhere_does_not_count_here(tmp_path):
    # smaller products torch computes in full precision anyway
    keys = save_keys(tmp_path, random_keys(6, 1500, 256))
    queries = random_keys(7, 60, 256).astype(np.float32)
    exact = search(keys, queries, 20)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = search(keys, queries, 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for part, expected in zip(found, exact):
        np.testing.assert_array_equal(part, expected)


def test_no_queries(keys, queries):
    distances, ids = search(keys, queries[:0], 5)
    assert distances.shape == ids.shape == (0, 5)
