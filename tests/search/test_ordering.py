"""Nearest first, and of equal distances the lower id first, by integers and by tensors."""

import numpy as np
import pytest
import torch

from fairseq_knnlm.search.ordering import MAX_KEYS, NO_ENTRY, in_order, nearest_first, pack, unpack

RANGES = {"negative": (-50, 0), "positive": (0, 50), "both": (-30, 30)}


def some_entries(lowest, highest, count=40, width=30):
    """Distances with many ties, and ids of which each occurs once in a row."""
    rng = np.random.default_rng(4)
    distances = rng.integers(lowest, highest, size=(count, width)).astype(np.float32) / 4
    ids = np.stack([rng.choice(1000, width, replace=False) for _ in range(count)])
    ids[:, 0] = MAX_KEYS - 1 - np.arange(count)
    return distances, ids.astype(np.int64)


def one_row_at_a_time(distances, ids, k):
    """The same with Python's own sort of pairs."""
    rows = [sorted(zip(*row))[:k] for row in zip(distances.tolist(), ids.tolist())]
    return [np.array(part) for part in zip(*(zip(*row) for row in rows))]


@pytest.mark.parametrize("k", [1, 7, 30])
@pytest.mark.parametrize("signs", RANGES)
def test_the_k_nearest_with_ties_by_id(signs, k):
    distances, ids = some_entries(*RANGES[signs])
    expected = one_row_at_a_time(distances, ids, k)
    found = nearest_first(distances.copy(), ids.copy(), k)
    for part, wanted in zip(found, expected):
        np.testing.assert_array_equal(part, np.stack(wanted))
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


@pytest.mark.parametrize("signs", RANGES)
def test_tensors_give_the_same(signs):
    distances, ids = some_entries(*RANGES[signs])
    found = in_order(torch.from_numpy(distances), torch.from_numpy(ids))
    for part, wanted in zip(found, nearest_first(distances, ids, 30)):
        np.testing.assert_array_equal(part, wanted)


def test_what_is_packed_is_unpacked_again():
    next_to = np.nextafter(np.float32(-1.5), np.float32(0))
    numbers = [-np.inf, -3e38, -1.5, next_to, -1e-42, 0.0, 1e-42, 7.25]
    distances = np.array([numbers, numbers[::-1]], dtype=np.float32)
    ids = np.array([np.arange(8), MAX_KEYS - 1 - np.arange(8)])
    packed = pack(distances, ids)
    assert (np.diff(packed[0].astype(object)) > 0).all()
    before = packed.copy()
    for part, wanted in zip(unpack(packed), (distances, ids)):
        np.testing.assert_array_equal(part, wanted)
    np.testing.assert_array_equal(packed, before)
    np.testing.assert_array_equal(distances[1], np.float32(numbers[::-1]))


def test_where_there_is_no_entry_it_comes_last():
    distances = np.array([[np.inf, 2.0, np.inf, -1.0], [4.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    ids = np.array([[-1, 5, -1, 6], [1, 2, 3, 4]])
    found = nearest_first(distances, ids, 4)
    assert found[0].tolist() == [[-1.0, 2.0, np.inf, np.inf], [1.0, 2.0, 3.0, 4.0]]
    assert found[1].tolist() == [[6, 5, -1, -1], [4, 3, 2, 1]]
    for width in (1, 3):
        nothing = unpack(np.full((1, width), NO_ENTRY))
        assert [part.tolist() for part in nothing] == [[[np.inf] * width], [[-1] * width]]


def test_no_rows():
    distances, ids = nearest_first(np.empty((0, 3), np.float32), np.empty((0, 3), np.int64), 2)
    assert distances.shape == ids.shape == (0, 2)
