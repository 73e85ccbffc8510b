"""Visiting each list once finds what comparing every query with every probed key finds."""

import numpy as np
import pytest
import torch
from helpers.searching import as_arrays, values_for

from fairseq_knnlm.search import list_blocks
from fairseq_knnlm.search.list_search import ListSearch
from fairseq_knnlm.search.ordering import nearest_first
from fairseq_knnlm.search.searcher import gather
from fairseq_knnlm.search.threads import ROWS

DIMENSION, NLIST = 24, 12
METRICS = ("l2", "ip")


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def make_lists(rng, count, nlist=NLIST):
    """Rows of each list, of very different lengths, one of them empty."""
    of = rng.choice(nlist - 1, count, p=rng.dirichlet(np.full(nlist - 1, 0.7)))
    return [np.flatnonzero(of == number) for number in range(nlist)]


class Lists:
    """Lists of given rows, and probes that a test chooses, in place of those of an index."""

    def __init__(self, lists):
        self._lists = lists
        self.sizes = np.array([len(rows) for rows in lists])
        self.chosen = None

    def ids(self, number):
        return self._lists[number]

    def probes(self, queries):
        assert len(self.chosen) == len(queries)
        return self.chosen


def make_search(keys, lists, metric="l2"):
    return ListSearch(keys, values_for(len(keys)), metric, lists=Lists(lists))


def run(search, queries, probes, k):
    """Distances and ids of all queries."""
    search._lists.chosen = probes
    batches = list(search.batches(torch.from_numpy(queries), k))
    assert [row for rows, _ in batches for row in range(rows.start, rows.stop)] == list(
        range(len(queries))
    )
    return as_arrays(gather(batches, k, torch.device("cpu")))


def oracle(keys, lists, metric, queries, probes, k):
    """The same one pair at a time, in double precision; ties by id."""
    distances = np.full((len(queries), k), np.inf)
    ids = np.full((len(queries), k), -1)
    for row, (query, probed) in enumerate(zip(queries.astype(np.float64), probes)):
        rows = np.concatenate([lists[number] for number in probed if number >= 0] or [[]])
        rows = np.sort(rows).astype(int)
        found = keys[rows].astype(np.float64)
        exact = ((found - query) ** 2).sum(axis=1) if metric == "l2" else -(found @ query)
        order = exact.argsort(kind="stable")[:k]
        distances[row, : len(order)], ids[row, : len(order)] = exact[order], rows[order]
    return distances, ids


def assert_same(found, expected, tolerance=1e-4):
    distances, ids = found
    np.testing.assert_allclose(distances, expected[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(ids < 0, expected[1] < 0)
    # float32 may order near ties otherwise
    assert (ids == expected[1]).mean() > 0.99
    assert (distances[:, 1:] >= distances[:, :-1]).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 7, 100])
def test_finds_the_nearest_of_all_probed_keys(rng, metric, k):
    keys = rng.normal(size=(5000, DIMENSION)).astype(np.float16)
    lists = make_lists(rng, len(keys))
    queries = rng.normal(size=(2 * ROWS + 17, DIMENSION)).astype(np.float32)
    probes = rng.permuted(np.tile(np.arange(NLIST), (len(queries), 1)), axis=1)[:, :5]
    found = run(make_search(keys, lists, metric), queries, probes, k)
    assert_same(found, oracle(keys, lists, metric, queries, probes, k))


def test_a_query_may_probe_fewer_lists_and_find_fewer_keys(rng):
    keys = rng.normal(size=(60, DIMENSION)).astype(np.float16)
    lists = make_lists(rng, len(keys))
    probes = np.array([[0, 1, 2], [3, -1, -1], [-1, -1, -1], [NLIST - 1, 4, -1]])
    queries = rng.normal(size=(4, DIMENSION)).astype(np.float32)
    found = run(make_search(keys, lists), queries, probes, 40)
    assert_same(found, oracle(keys, lists, "l2", queries, probes, 40))


def test_large_common_parts_do_not_cost_digits(rng):
    # hidden states before a layer norm have dimensions of a hundred times the others
    keys = rng.normal(size=(3000, DIMENSION)).astype(np.float16)
    keys[:, 0] += 300
    lists = make_lists(rng, len(keys))
    queries = keys[rng.choice(len(keys), 200)].astype(np.float32)
    queries[:, 1:] += rng.normal(size=(200, DIMENSION - 1), scale=0.1)
    probes = np.tile(np.arange(NLIST), (len(queries), 1))
    found = run(make_search(keys, lists), queries, probes, 20)
    assert_same(found, oracle(keys, lists, "l2", queries, probes, 20), tolerance=1e-4)


def test_outliers_do_not_hide_neighbors(rng):
    # one key of huge norm makes rounding of its block coarse, and so its filter
    keys = rng.normal(size=(3000, DIMENSION)).astype(np.float16)
    keys[rng.choice(len(keys), 5)] *= 2000
    lists = make_lists(rng, len(keys))
    queries = rng.normal(size=(100, DIMENSION)).astype(np.float32)
    queries[::10] *= 1000
    probes = np.tile(np.arange(NLIST), (len(queries), 1))
    found = run(make_search(keys, lists), queries, probes, 20)
    assert_same(found, oracle(keys, lists, "l2", queries, probes, 20))


def test_of_equal_distances_the_lower_id_comes_first(rng):
    keys = rng.normal(size=(40, DIMENSION)).astype(np.float16).repeat(50, axis=0)
    lists = make_lists(rng, len(keys))
    queries = keys[::50].astype(np.float32)
    probes = np.tile(np.arange(NLIST), (len(queries), 1))
    distances, ids = run(make_search(keys, lists), queries, probes, 30)
    assert (distances == 0).all()
    assert (ids == np.arange(len(queries))[:, None] * 50 + np.arange(30)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_fewer_neighbors_are_the_first_of_more(rng, metric):
    keys = rng.integers(-2, 3, size=(4000, DIMENSION)).astype(np.float16)  # many ties
    lists = make_lists(rng, len(keys))
    queries = rng.integers(-2, 3, size=(300, DIMENSION)).astype(np.float32)
    probes = np.tile(np.arange(6), (len(queries), 1))
    search = make_search(keys, lists, metric)
    distances, ids = run(search, queries, probes, 200)
    for k in (1, 5, 64):
        fewer = run(search, queries, probes, k)
        assert (fewer[0] == distances[:, :k]).all() and (fewer[1] == ids[:, :k]).all()


def test_queries_do_not_depend_on_each_other(rng):
    keys = rng.normal(size=(4000, DIMENSION)).astype(np.float16)
    lists = make_lists(rng, len(keys))
    queries = rng.normal(size=(600, DIMENSION)).astype(np.float32)
    probes = rng.permuted(np.tile(np.arange(NLIST), (len(queries), 1)), axis=1)[:, :4]
    search = make_search(keys, lists)
    together = run(search, queries, probes, 50)
    alone = [run(search, queries[i : i + 1], probes[i : i + 1], 50) for i in range(0, 600, 97)]
    for i, part in zip(range(0, 600, 97), alone):
        assert (part[0][0] == together[0][i]).all() and (part[1][0] == together[1][i]).all()


def test_a_limit_that_is_too_low_costs_time_alone(rng, monkeypatch):
    keys = rng.normal(size=(5000, DIMENSION)).astype(np.float16)
    lists = make_lists(rng, len(keys))
    queries = rng.normal(size=(300, DIMENSION)).astype(np.float32)
    probes = np.tile(np.arange(NLIST), (len(queries), 1))
    search = make_search(keys, lists)
    limits = search._limits
    # none is found of some queries, too few of others
    lower = np.linspace(0, 60, len(queries), dtype=np.float32)
    monkeypatch.setattr(search, "_limits", lambda *args: limits(*args) - lower)
    found = run(search, queries, probes, 200)
    assert_same(found, oracle(keys, lists, "l2", queries, probes, 200))


def test_a_limit_that_is_too_high_costs_time_alone(rng, monkeypatch):
    keys = rng.normal(size=(20_000, DIMENSION)).astype(np.float16)
    lists = make_lists(rng, len(keys))
    queries = rng.normal(size=(50, DIMENSION)).astype(np.float32)
    probes = np.tile(np.arange(NLIST), (len(queries), 1))
    search = make_search(keys, lists)
    monkeypatch.setattr(search, "_limits", lambda queries, *rest: np.full(50, np.inf, np.float32))
    found = run(search, queries, probes, 10)
    assert_same(found, oracle(keys, lists, "l2", queries, probes, 10))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [1 << 20, 1 << 13])
def test_most_pairs_are_ruled_out_without_an_exact_distance(rng, monkeypatch, metric, block):
    """A limit is seldom too low, which would cost a second search, and not far too high."""
    monkeypatch.setattr(list_blocks, "_BLOCK", block)
    keys = rng.normal(size=(8000, DIMENSION)).astype(np.float16)
    queries = rng.normal(size=(200, DIMENSION)).astype(np.float32)
    probes = rng.permuted(np.tile(np.arange(4), (len(queries), 1)), axis=1)
    probes[::2, 3], k = -1, 100
    search = make_search(keys, [np.arange(first, 8000, 4) for first in range(4)], metric)
    measured, pair_distances = [], search._pair_distances

    def counted(queries, rows, keys, columns):
        measured.append(len(rows))
        return pair_distances(queries, rows, keys, columns)

    monkeypatch.setattr(search, "_pair_distances", counted)
    run(search, queries, probes, k)
    assert k * len(queries) < sum(measured) < 4 * k * len(queries)


def test_long_lists_are_taken_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(list_blocks, "_BLOCK", 1 << 12)
    monkeypatch.setattr(list_blocks, "_MAX_KEYS_OF_BLOCK", 200)
    keys = rng.normal(size=(3000, DIMENSION)).astype(np.float16)
    lists = make_lists(rng, len(keys), nlist=4)
    queries = rng.normal(size=(500, DIMENSION)).astype(np.float32)
    probes = np.tile(np.arange(4), (len(queries), 1))
    found = run(make_search(keys, lists), queries, probes, 60)
    assert_same(found, oracle(keys, lists, "l2", queries, probes, 60))


@pytest.mark.parametrize("threads", [1, 4])
def test_leaves_the_settings_of_torch_as_they_were(rng, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        keys = rng.normal(size=(1000, DIMENSION)).astype(np.float16)
        lists = make_lists(rng, len(keys))
        queries = rng.normal(size=(300, DIMENSION)).astype(np.float32)
        probes = np.tile(np.arange(NLIST), (len(queries), 1))
        found = run(make_search(keys, lists), queries, probes, 10)
        assert_same(found, oracle(keys, lists, "l2", queries, probes, 10))
        assert torch.get_num_threads() == threads
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_num_threads(before)


def test_a_search_that_begins_before_another_has_ended_does_not_disturb_it(rng):
    keys = rng.normal(size=(3000, DIMENSION)).astype(np.float16)
    queries = rng.normal(size=(2 * ROWS, DIMENSION)).astype(np.float32)
    probes = np.tile(np.arange(NLIST), (len(queries), 1))
    search = make_search(keys, make_lists(rng, len(keys)))
    distances, ids = run(search, queries, probes, 50)
    batches = search.batches(torch.from_numpy(queries), 50)
    first = next(batches)
    run(search, queries[::-1].copy(), probes, 50)
    for rows, neighbors in [first, *batches]:
        assert (neighbors.distances.numpy() == distances[rows]).all()
        assert (neighbors.ids.numpy() == ids[rows]).all()


def test_nearest_first_sorts_by_distance_then_id():
    distances = np.array([[2.0, -1.0, 0.0, -0.5, 2.0, np.inf]], dtype=np.float32)
    ids = np.array([[9, 4, 7, 5, 3, -1]])
    found = nearest_first(distances, ids, 6)
    assert found[1].tolist() == [[4, 5, 7, 3, 9, -1]]
    assert found[0].tolist() == [[-1.0, -0.5, 0.0, 2.0, 2.0, np.inf]]
