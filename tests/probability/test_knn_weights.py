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
