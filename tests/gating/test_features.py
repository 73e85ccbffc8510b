"""What a gate looks at, against plain loops."""

import collections
import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.gating.features import after_search, before_search, ranks, scalars_after


def by_hand(distances, values, temperature):
    """The features of one row, in the order of ``after_search``."""
    k, near = len(distances), min(len(distances), 128)
    chosen = [distances[i - 1] for i in ranks(k)]
    weights = np.exp(-(np.array(distances[:near], dtype=np.float64) - distances[0]) / temperature)
    p_knn = collections.Counter()
    for value, weight in zip(values, weights / weights.sum()):
        p_knn[value] += weight
    return [
        *(math.copysign(math.log1p(abs(d) / temperature), d) for d in chosen),
        *(min(1.0, max(0.0, distances[0] / d)) if d > 0 else 1.0 for d in chosen),
        *(math.log1p((d - distances[0]) / temperature) for d in chosen),
        *(math.log(len(set(values[:i]))) for i in ranks(near)),
        -sum(p * math.log(p) for p in p_knn.values()),
        math.log(max(p_knn.values())),
    ]


@pytest.mark.parametrize("k, types", [(1, 5), (6, 3), (32, 20), (50, 2**31), (150, 40)])
@pytest.mark.parametrize("lowest", [0.5, -40.0])
def test_equals_a_loop(k, types, lowest):
    rng = np.random.default_rng(k)
    distances = np.sort(lowest + rng.gamma(2.0, 8.0, size=(12, k)), axis=1).astype(np.float32)
    values = rng.integers(types, size=(12, k))
    found = after_search(torch.from_numpy(distances), torch.from_numpy(values), 4.0)
    expected = [by_hand(*row, 4.0) for row in zip(distances.tolist(), values.tolist())]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (12, scalars_after(k))


def test_they_are_finite_without_neighbours_and_where_a_key_is_the_query():
    distances = torch.tensor([[0.0, 0.0, math.inf], [math.inf] * 3, [0.0, 1.0, 2.0]])
    assert after_search(distances, torch.zeros(3, 3, dtype=torch.long), 1.0).isfinite().all()


def test_ranks():
    assert [ranks(k) for k in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]


def test_the_hidden_state_comes_last():
    keys, confidence, counts = torch.rand(3, 5).half(), torch.rand(3, 2), torch.rand(3, 8)
    found = before_search(keys, confidence, counts)
    assert torch.equal(found, torch.cat([confidence, counts, keys.float()], dim=1))
