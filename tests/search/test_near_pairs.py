"""What is near is never missed, and little else is called near, whatever the rounding."""

import numpy as np
import pytest
from helpers.small import all_distances

from fairseq_knnlm.search import near_pairs, product_type
from fairseq_knnlm.search.float_products import columns
from fairseq_knnlm.search.list_blocks import are_near, padded

DIMENSION = 40
TYPES = tuple(product_type.TYPES)
METRICS = ("l2", "ip")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def products(queries, keys, limits, metric, name, rounding=True):
    """What is computed of all pairs, shape (queries, keys)."""
    compared = product_type.products_of(name, metric, queries.shape[1])
    sides, scratch = compared.query_sides(queries), compared.scratch(padded(len(keys)))
    compared.write_queries(sides, slice(None), limits.astype(np.float32), rounding)
    right = compared.write_keys(scratch, keys)
    found = compared.multiply(scratch, sides, np.arange(len(queries)), right)
    assert not are_near(found[:, len(keys) :]).any()
    return found[:, : len(keys)]


def some_vectors(rng, count):
    """Of very different lengths, some of them equal."""
    lengths = 10 ** rng.uniform(-2, 2, size=(count, 1))
    vectors = lengths * rng.normal(size=(count, DIMENSION))
    vectors[1::7] = vectors[::7][: len(vectors[1::7])]
    return vectors.astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_pair_at_the_limit_is_near(rng, dtype, metric):
    queries, keys = some_vectors(rng, 60), some_vectors(rng, 80)
    keys[:10] = queries[:10]
    exact = all_distances(queries, keys, metric)
    for column, limits in enumerate(exact.T):
        near = are_near(products(queries, keys, limits, metric, dtype))
        assert near[exact <= limits[:, None]].all()
        assert near[:, column].all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rest, sign", [(0.99, 1), (1.01, -1)])
def test_a_pair_that_rounding_parts_most_is_near(rest, sign, metric):
    # every number is almost half way between two of bfloat16, and all errors add up
    queries = np.full((1, DIMENSION), 1 + rest * 2.0**-8, dtype=np.float32)
    limits = all_distances(queries, sign * queries, metric)[0]
    found = products(queries, sign * queries, limits, metric, "bfloat16")
    assert are_near(found).all()
    without = products(queries, sign * queries, limits, metric, "bfloat16", rounding=False)
    assert not are_near(without).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rest, sign", [(0.999, 1), (1.001, -1)])
def test_rounding_of_what_allows_for_rounding_is_allowed_for(rest, sign, metric):
    """As above; the terms that stand for rounding are rounded too, up or down with the length."""
    for dimension in range(1, 100):
        queries = np.full((1, dimension), 1 + rest * 2.0**-8, dtype=np.float32)
        limits = all_distances(queries, sign * queries, metric)[0]
        found = products(queries, sign * queries, limits, metric, "bfloat16")
        assert are_near(found).all(), dimension


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dimension", [8, 40])
def test_parallel_vectors_at_the_limit_are_near(rng, dtype, metric, dimension):
    """Nothing is left of the room that Cauchy and Schwarz give to others."""
    queries = rng.normal(size=(300, dimension)).astype(np.float32)
    for factor in (1.0, -1.0, 0.01, 100.0):
        keys = np.float32(factor) * queries
        limits = np.diag(all_distances(queries, keys, metric)).astype(np.float32)
        near = are_near(products(queries, keys, limits, metric, dtype))
        assert near.diagonal().all(), factor


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype, room", [("bfloat16", 0.04), ("float32", 0.001), ("int8", 0.06)])
def test_what_is_well_beyond_the_limit_is_not_near(rng, dtype, room, metric):
    queries, keys = some_vectors(rng, 60), some_vectors(rng, 80)
    exact = all_distances(queries, keys, metric)
    # the integers are of keys relative to their mean
    mean = np.linalg.norm(keys.mean(axis=0)) if dtype == "int8" else 0
    lengths = np.linalg.norm(queries, axis=1)[:, None] * (np.linalg.norm(keys, axis=1) + mean)
    squares = (queries**2).sum(axis=1)[:, None] + (keys**2).sum(axis=1)
    for limits in exact.T[:20]:
        near = are_near(products(queries, keys, limits, metric, dtype))
        beyond = exact > limits[:, None] + room * lengths + 0.001 * (squares + abs(limits[:, None]))
        assert beyond.any() and not near[beyond].any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_is_left_of_the_block_before(rng, dtype, metric):
    """A longer block was in the same memory; what pads the shorter one is near to nothing."""
    queries, keys = some_vectors(rng, 20), some_vectors(rng, 17)
    compared = product_type.products_of(dtype, metric, DIMENSION)
    sides, scratch = compared.query_sides(queries), compared.scratch(padded(80))
    compared.write_queries(sides, slice(None), np.full(20, 1e7, np.float32))
    for block in (some_vectors(rng, 80), keys):
        right = compared.write_keys(scratch, block)
        found = compared.multiply(scratch, sides, np.arange(len(queries)), right)
    assert found.shape[1] > len(keys)
    assert are_near(found[:, : len(keys)]).all() and not are_near(found[:, len(keys) :]).any()


@pytest.mark.parametrize("dtype", TYPES)
def test_without_a_limit_all_are_near(rng, dtype):
    queries, keys = some_vectors(rng, 9), some_vectors(rng, 11)
    found = products(queries, keys, np.full(9, np.inf), "l2", dtype)
    assert are_near(found).all() and not are_near(-found).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TYPES)
def test_without_rounding_and_limit_products_are_about_the_distances(rng, dtype, metric):
    queries, keys = (rng.normal(size=(50, DIMENSION)).astype(np.float32) for _ in range(2))
    found = products(queries, keys, np.zeros(50), metric, dtype, rounding=False)
    exact = all_distances(queries, keys, metric)
    np.testing.assert_allclose(found.float(), exact, rtol=0.01, atol=0.2)


def test_rows_have_room_for_a_vector_and_its_terms():
    for dimension in range(1, 500):
        count = columns(dimension)
        assert dimension + 7 <= count < dimension + 7 + 32 and count % 32 == 0


@pytest.mark.parametrize("count", [1, 9000])
def test_the_center_is_about_the_mean(rng, count):
    keys = rng.normal(size=(count, 5), loc=[1000, -3, 0, 0.5, 60000]).astype(np.float16)
    center = near_pairs.center_of(keys, "l2")
    assert center.shape == (5,) and center.dtype == np.float32
    np.testing.assert_allclose(center, keys.astype(np.float64).mean(axis=0), rtol=1e-3, atol=0.1)
    assert not near_pairs.center_of(keys, "ip").any()
