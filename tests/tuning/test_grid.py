"""Points of a grid: of tokens and of words, and the best of them."""

import math

import pytest

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.tuning.grid import CacheGridPoint, KNNGridPoint, best, of_larger_units


def test_the_perplexity_of_words_of_several_tokens():
    point = KNNGridPoint(k=4, temperature=2.0, knn_lambda=0.5, perplexity=10.0)
    # A word of 1.5 tokens is less probable: 10 ** 1.5.
    assert of_larger_units(point, 1.5) == point._replace(perplexity=pytest.approx(31.6227766))
    assert of_larger_units(point, 1.0) == point


@pytest.mark.parametrize(
    "perplexity, is_finite",
    [(1e153, True), (math.exp(354.95), False), (1e155, False), (math.inf, False)],
)
def test_what_no_float_holds_is_infinite(perplexity, is_finite):
    point = KNNGridPoint(k=4, temperature=2.0, knn_lambda=1.0, perplexity=perplexity)
    assert math.isfinite(of_larger_units(point, 2.0).perplexity) == is_finite


def test_of_equal_points_the_smallest():
    points = [KNNGridPoint(k, 1.0, 0.5, perplexity) for k, perplexity in ((8, 3), (4, 3), (2, 4))]
    assert best(points) == points[1]
    caches = [CacheGridPoint(size, 1.0, 0.1, 0.0, 5.0) for size in (100, 50, 200)]
    assert best(caches) == caches[1]


def test_no_point_is_refused():
    with pytest.raises(UserError, match="there is no point to choose from"):
        best([])
