"""The share of each neighbour in p_knn."""

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability.knn import knn_weights


def test_weights_of_few_neighbors():
    distances = torch.tensor([[1.0, 3.0, np.inf], [np.inf, np.inf, np.inf], [1e30, 1e30, np.inf]])
    weights = knn_weights(distances, 2.0)
    first = 1 / (1 + np.exp(-1.0))
    expected = [[first, 1 - first, 0], [0, 0, 0], [0.5, 0.5, 0]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    with pytest.raises(UserError):
        knn_weights(distances, 0.0)


def test_weights_are_of_differences_alone():
    """Large distances, by inner products also negative ones, keep their digits, row by row."""
    rng = torch.Generator().manual_seed(1)
    distances = (20 * torch.rand(6, 9, generator=rng)).round()
    distances[:, 7:] = np.inf
    exact = np.exp(-distances.double().numpy())
    distances += torch.tensor([[0.0], [60000.0], [-60000.0]] * 2)
    weights = knn_weights(distances)
    assert weights.dtype == knn_weights(distances.half()).dtype == torch.float32
    np.testing.assert_allclose(weights, exact / exact.sum(axis=1, keepdims=True), rtol=1e-5)
