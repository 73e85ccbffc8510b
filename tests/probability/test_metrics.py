"""The metrics, against numbers on paper."""

import math
import warnings

import numpy as np
import pytest
import torch

from fairseq_knnlm.probability.metrics import perplexity, recall_at_k

INF = math.inf


def test_perplexity_of_a_uniform_distribution_is_its_size():
    assert perplexity(np.full(7, -math.log(50))) == pytest.approx(50)
    assert perplexity(torch.log(torch.tensor([0.5, 0.125]))) == pytest.approx(4)
    assert perplexity(np.zeros(3)) == 1.0


def test_one_impossible_token_makes_perplexity_infinite():
    assert perplexity(np.array([0.0, -INF])) == INF


def test_perplexity_is_computed_in_double_precision():
    log_probs = -np.random.default_rng(1).random(3000).astype(np.float32)
    result = perplexity(log_probs)
    assert type(result) is float
    assert result == pytest.approx(math.exp(-math.fsum(log_probs) / 3000), rel=1e-12)


def test_perplexity_beyond_all_numbers_is_infinite_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perplexity([-1000.0, -2000.0]) == INF


def test_recall_counts_ids_in_any_order():
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall_at_k(exact[:, ::-1], exact) == 1.0
    assert recall_at_k(exact + 10, exact) == 0.0
    assert recall_at_k([[4, 1, 9, 10], [-1, -1, -1, -1]], exact) == 0.25


def test_recall_is_a_share():
    rng = np.random.default_rng(7)
    for _ in range(50):
        ids, exact = (
            np.stack([rng.choice(12, 5, replace=False) for _ in range(3)]) for _ in range(2)
        )
        expected = np.mean([[i in row for i in wanted] for row, wanted in zip(ids, exact)])
        assert 0.0 <= recall_at_k(ids, exact) <= 1.0
        assert recall_at_k(ids, exact) == pytest.approx(expected)
