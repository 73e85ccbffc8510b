"""What is kept of the keys that many blocks bring, against a plain sort of all of them."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fairseq_knnlm.search.nearest import SAMPLE, Nearest, capacity, sampled_rank
from fairseq_knnlm.search.ordering import NO_ENTRY

COUNT, KEYS = 23, 3000


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def blocks_of(rng, distances, block_keys=700, some=0.8):
    """Cut all pairs into blocks of queries and keys, as a list search finds them.

    Yields:
        tuple: queries, rows of these, distances and ids of the pairs that are in the block.
    """
    near = rng.random(distances.shape) < some
    for first in range(0, distances.shape[1], block_keys):
        ids = rng.permutation(np.arange(first, min(first + block_keys, distances.shape[1])))
        queries = rng.permutation(len(distances))[: len(distances) - 3]
        rows, columns = near[np.ix_(queries, ids)].nonzero()
        yield queries, rows, distances[queries[rows], ids[columns]], ids[columns]


def sorted_pairs(blocks, k):
    """For each query the k first of its pairs by distance, then id."""
    pairs = {query: [] for query in range(COUNT)}
    for queries, rows, distances, ids in blocks:
        for row, distance, key in zip(rows, distances.tolist(), ids.tolist()):
            pairs[queries[row]].append((distance, key))
    return [sorted(pairs[query])[:k] for query in range(COUNT)]


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("spare", [0, 1, 17, 10_000], ids="{} more".format)
def test_keeps_the_k_nearest_whatever_room_there_is(rng, pool, k, spare):
    distances = rng.integers(-20, 60, size=(COUNT, KEYS)).astype(np.float32)
    blocks = list(blocks_of(rng, distances))
    memory = rng.integers(1 << 60, size=(COUNT, k + spare)).astype(np.uint64)
    nearest = Nearest(k, np.full(COUNT, np.inf, np.float32), memory)
    for block in blocks:
        nearest.add(*block)
    nearest.sort(pool)
    found = nearest.of(slice(0, COUNT))
    for row, expected in enumerate(sorted_pairs(blocks, k)):
        assert list(zip(*(part[row].tolist() for part in found))) == expected


def test_fewer_than_k_are_followed_by_nothing(rng, pool):
    nearest = Nearest(4, np.full(2, np.inf, np.float32), np.zeros((2, 9), np.uint64))
    # the last query of the block has no pair
    queries, distances = np.array([1, 0]), np.array([3.0, 1.0], np.float32)
    nearest.add(queries, np.zeros(2, int), distances, np.array([7, 8]))
    nearest.sort(pool)
    distances, ids = nearest.of(slice(0, 2))
    assert ids.tolist() == [[-1] * 4, [8, 7, -1, -1]]
    assert distances.tolist() == [[math.inf] * 4, [1.0, 3.0, math.inf, math.inf]]


def test_a_query_with_fewer_than_k_within_its_limit_is_incomplete(pool):
    """With exactly k at the limit it is whole, and without a limit there was nothing to miss."""
    limits = np.array([5.0, 5.0, 5.0, math.inf], np.float32)
    nearest = Nearest(2, limits, np.zeros((4, 6), np.uint64))
    queries, rows = np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1, 2, 3])
    distances = np.array([1.0, 5.0, 1.0, 5.5, 2.0, 2.0], np.float32)
    nearest.add(queries, rows, distances, np.arange(6))
    nearest.sort(pool)
    assert nearest.incomplete().tolist() == [1, 2]


def test_what_was_searched_again_takes_its_place(pool):
    limits, again = np.zeros(3, np.float32), np.full(2, math.inf, np.float32)
    first = Nearest(2, limits, np.full((3, 5), NO_ENTRY))
    first.add(np.array([1]), np.zeros(2, int), np.array([1.0, 2.0], np.float32), np.array([3, 4]))
    second = Nearest(2, again, np.full((2, 7), NO_ENTRY))
    numbers = np.array([5.0, 6.0, 7.0, 8.0], np.float32)
    second.add(np.array([0, 1]), np.array([0, 0, 1, 1]), numbers, np.array([50, 60, 70, 80]))
    for nearest in (first, second):
        nearest.sort(pool)
    first.replace(np.array([2, 0]), second)
    assert first.of(slice(0, 3))[1].tolist() == [[70, 80], [3, 4], [50, 60]]


@pytest.mark.parametrize("k", [1, 2, 16, 100, 1024])
def test_a_limit_of_the_sample_is_seldom_too_low_and_not_far_too_high(k):
    """As many of the k nearest are in the sample as a binomial distribution says."""
    in_sample = np.random.default_rng(1).binomial(k, 1 / SAMPLE, size=20_000)
    assert (in_sample >= sampled_rank(k)).mean() < 1e-3
    assert SAMPLE * sampled_rank(k) < k + 5 * SAMPLE * math.sqrt(k / SAMPLE) + 4 * SAMPLE
    within = np.random.default_rng(2).negative_binomial(sampled_rank(k), 1 / SAMPLE, size=20_000)
    assert k <= capacity(k) and (within + sampled_rank(k) > capacity(k)).mean() < 0.01
