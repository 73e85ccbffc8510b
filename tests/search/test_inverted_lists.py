"""The lists of an index and what probes them, against FAISS itself and float64."""

import faiss
import numpy as np
import pytest
from helpers.small import all_distances

from fairseq_knnlm.search.index_build import load
from fairseq_knnlm.search.inverted_lists import InvertedLists, pair_distances

METRICS = ["l2", "ip"]
FACTORIES = ["IVF16,Flat", "IVF16,PQ8x4fs", "OPQ8,IVF16,PQ8", "PCA8,IVF16,Flat", "IVF16,PQ8,RFlat"]


@pytest.fixture(params=FACTORIES)
def index(request, index_path):
    return load(index_path(request.param))


def test_every_key_is_in_one_list(index, keys):
    lists = InvertedLists(index, 4)
    every = [lists.ids(number) for number in range(16)]
    assert [len(ids) for ids in every] == lists.sizes.tolist()
    assert np.array_equal(np.sort(np.concatenate(every)), np.arange(len(keys)))


def transformed(index, queries):
    """Queries as the index compares them with its centroids: rotated, projected or as they are."""
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexPreTransform):
        return queries
    linear = faiss.downcast_VectorTransform(index.chain.at(0))
    matrix = faiss.vector_to_array(linear.A).reshape(linear.d_out, linear.d_in)
    offset = faiss.vector_to_array(linear.b) if linear.have_bias else 0
    return queries @ matrix.T + offset


@pytest.mark.parametrize("nprobe", [1, 5, 16, 1000])
def test_a_query_probes_the_lists_with_the_nearest_centroids(index, queries, nprobe):
    probes = InvertedLists(index, nprobe).probes(queries)
    centroids = faiss.try_extract_index_ivf(index).quantizer.reconstruct_n(0, 16)
    distances = all_distances(transformed(index, queries), centroids)
    nearest = distances.argsort(axis=1, kind="stable")
    assert probes.shape == (len(queries), min(nprobe, 16))
    assert (probes == nearest[:, : min(nprobe, 16)]).mean() > 0.99


def test_a_list_without_keys_is_empty():
    index = faiss.index_factory(4, "IVF2,Flat")
    index.train(np.repeat(np.eye(2, 4, dtype=np.float32), 50, axis=0))
    index.add(np.eye(1, 4, dtype=np.float32))
    lists = InvertedLists(index, 2)
    assert sorted(lists.sizes.tolist()) == [0, 1]
    assert sorted(lists.ids(number).tolist() for number in range(2)) == [[], [0]]
    assert all(lists.ids(number).dtype == np.int64 for number in range(2))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pairs", [0, 1, 1000])
def test_distances_of_pairs(keys, queries, metric, pairs):
    rng = np.random.default_rng(1)
    rows, columns = rng.integers(len(queries), size=pairs), rng.integers(100, size=pairs)
    some_keys = keys[:100].astype(np.float32)
    found = pair_distances(metric)(queries, rows, some_keys, columns)
    expected = all_distances(queries, some_keys, metric)[rows, columns]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
