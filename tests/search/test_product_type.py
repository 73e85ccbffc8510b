"""Every type of products finds the same, and the one that costs least is taken."""

import logging
import re
import time
import types

import numpy as np
import pytest
import torch
from helpers.searching import as_arrays, values_for
from helpers.small import all_distances, make_datastore, random_keys, random_values

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.search import Retriever, product_type
from fairseq_knnlm.search.list_search import ListSearch

DIMENSION, NLIST = 32, 3
KINDS = ("random", "clustered", "equal", "scales", "zeros")


@pytest.fixture(params=product_type.TYPES)
def forced(request, monkeypatch):
    monkeypatch.setenv(product_type.FORCED, request.param)
    return request.param


def some_keys(kind, count, seed):
    """Keys of one kind, shape (count, DIMENSION), float16."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(count, DIMENSION))
    if kind == "clustered":
        return random_keys(seed, count, DIMENSION)
    if kind == "equal":
        keys[count // 20 :] = keys[rng.integers(count // 20, size=count - count // 20)]
    elif kind == "scales":  # from the smallest that float16 holds to the largest
        keys *= 10.0 ** rng.uniform(-6, 4, size=(count, 1))
    elif kind == "zeros":
        keys[rng.random(count) < 0.4] = 0
    return keys.astype(np.float16)


def search_all(keys, queries, metric, k):
    """The k nearest of all keys, which lie in lists that every query probes."""
    lists = types.SimpleNamespace(
        sizes=np.array([len(keys[first::NLIST]) for first in range(NLIST)]),
        ids=lambda number: np.arange(number, len(keys), NLIST),
        probes=lambda queries: np.tile(np.arange(NLIST), (len(queries), 1)),
    )
    search = ListSearch(keys, values_for(len(keys)), metric, lists=lists)
    return as_arrays(search.search(torch.from_numpy(queries), k))


def room_of_float32(queries, keys, metric):
    """What float32 can add to the distances of each query, shape (N, 1)."""
    lengths = np.linalg.norm(queries.astype(float), axis=1)[:, None]
    if metric == "ip":
        return 1e-6 * lengths * np.linalg.norm(keys.astype(float), axis=1).max()
    return 1e-5 * (lengths**2 + (keys.astype(float).mean(axis=0) ** 2).sum())


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_finds_what_brute_force_finds(forced, kind, metric):
    keys = some_keys(kind, 3000, seed=1)
    queries = np.concatenate([some_keys(kind, 50, seed=2), keys[:20]]).astype(np.float32)
    exact = all_distances(queries, keys, metric)
    room = room_of_float32(queries, keys, metric)
    for k in (1, 8, 100, 1024):
        distances, ids = search_all(keys, queries, metric, k)
        assert all(len(set(row)) == k for row in ids.tolist())
        of_ids = np.take_along_axis(exact, ids, axis=1)
        for expected in (of_ids, np.sort(exact, axis=1)[:, :k]):
            assert (abs(distances - expected) <= room + 1e-5 * abs(expected)).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_types_find_the_same_ids_and_distances(monkeypatch, kind, metric):
    keys, queries = some_keys(kind, 3000, 1), some_keys(kind, 200, 2).astype(np.float32)
    found = []
    for name in product_type.TYPES:
        monkeypatch.setenv(product_type.FORCED, name)
        found.append(search_all(keys, queries, metric, 300))
    for other in found[1:]:
        assert all(np.array_equal(*pair) for pair in zip(found[0], other))


def test_the_type_that_costs_least_is_taken_and_logged_once(caplog, monkeypatch):
    monkeypatch.delenv(product_type.FORCED, raising=False)
    product_type._fastest.cache_clear()
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        chosen = [product_type.choose_products("l2", 40, 200) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), random_state)
    (line,) = [r.getMessage() for r in caplog.records if r.name == product_type.__name__]
    costs = {name: float(cost) for name, cost in re.findall(r"(\w+) ([\d.]+) ms", line)}
    assert {"float32", "bfloat16"} <= set(costs) <= set(product_type.TYPES)
    name = re.match(r"products in (\w+):", line)[1]
    assert costs[name] == min(costs.values())
    expected = product_type.products_of(name, "l2", 40)
    for products in chosen:
        assert type(products) is type(expected)
        assert getattr(products, "_dtype", None) == getattr(expected, "_dtype", None)


def test_a_type_that_is_unknown_is_refused_before_any_search(tmp_path, monkeypatch):
    directory = make_datastore(tmp_path / "ds", random_keys(1, 50, 8), random_values(1, 50, 20))
    monkeypatch.setenv(product_type.FORCED, "float8")
    with pytest.raises(UserError, match=r"FAIRSEQ_KNNLM_PRODUCTS .*float32, bfloat16.*'float8'"):
        Retriever.open([directory], k=1)
    monkeypatch.setenv(product_type.FORCED, "")
    assert product_type.forced_type() is None


@pytest.mark.parametrize("cheapest", product_type.TYPES)
def test_whichever_type_costs_least_is_taken(monkeypatch, cheapest):
    def turn_of(name, *shape):
        def turn():
            end = time.thread_time() + (0.0 if name == cheapest else 0.002)
            while time.thread_time() < end:
                pass

        return turn

    monkeypatch.delenv(product_type.FORCED, raising=False)
    monkeypatch.setattr(product_type, "multiplies_integers", lambda: True)
    monkeypatch.setattr(product_type, "_turn", turn_of)
    product_type._fastest.cache_clear()
    chosen = product_type.choose_products("ip", 40, 200)
    product_type._fastest.cache_clear()
    expected = product_type.products_of(cheapest, "ip", 40)
    assert type(chosen) is type(expected)
    assert getattr(chosen, "_dtype", None) == getattr(expected, "_dtype", None)


def test_integers_are_no_choice_where_the_cpu_has_no_products_of_them(monkeypatch):
    monkeypatch.setattr(product_type, "multiplies_integers", lambda: False)
    assert product_type.usable_types() == ["float32", "bfloat16"]
    monkeypatch.setenv(product_type.FORCED, "int8")
    with pytest.raises(UserError, match="int8: this CPU, .* use float32 or bfloat16"):
        product_type.forced_type()
    monkeypatch.setenv(product_type.FORCED, "bfloat16")
    assert product_type.forced_type() == "bfloat16"
