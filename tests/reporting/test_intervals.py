"""The rule by which there is an interval, and what it is of."""

import numpy as np
import pytest
import torch

from fairseq_knnlm.probability.bootstrap import paired_interval
from fairseq_knnlm.reporting.intervals import (
    change_between,
    perplexity_with_bounds,
    starts_within,
)
from fairseq_knnlm.tuning.tuning_data import TuningData

ROWS = 12_000


@pytest.fixture
def scores():
    rng = np.random.default_rng(1)
    return -rng.random((2, ROWS))


@pytest.mark.parametrize(
    "documents, units, unit", [(10, 10, "documents"), (9, 12, "blocks"), (1, 12, "blocks")]
)
def test_ten_units_have_an_interval(scores, documents, units, unit):
    starts = np.linspace(0, ROWS, documents, endpoint=False).astype(int)
    change = change_between(*scores, starts)
    expected = paired_interval(*scores, starts)
    assert (change["units"], change["unit"]) == (units, unit)
    assert (change["low"], change["high"]) == (expected.low, expected.high)
    assert change["low"] < change["relative_change"] < change["high"]


def test_nine_units_have_none(scores):
    scores = scores[:, :9000]
    change = change_between(*scores, np.array([0]))
    assert (change["units"], change["unit"]) == (9, "blocks")
    assert change["low"] is change["high"] is None
    assert change["relative_change"] == pytest.approx(
        np.exp(scores[0].mean() - scores[1].mean()) - 1
    )


def test_bounds_of_a_perplexity_are_those_of_its_change(scores):
    log_p_lm, mixed = map(torch.from_numpy, scores)
    starts = np.arange(0, ROWS, 500)
    shown = perplexity_with_bounds(TuningData(log_p_lm, None, None, None, starts), mixed)
    base = np.exp(-scores[0].mean())
    expected = paired_interval(*scores, starts)
    assert shown["perplexity"] == pytest.approx(np.exp(-scores[1].mean()))
    for name in ("low", "high"):  # fewer resamples move them a little
        bound = base * (1 + getattr(expected, name))
        assert shown[f"perplexity_{name}"] == pytest.approx(bound, rel=2e-3)


def test_a_perplexity_of_words_is_that_of_their_sums(scores):
    """Words of one and of three tokens; documents begin with words."""
    starts = np.unique(np.append(np.arange(0, ROWS, 4), np.arange(1, ROWS, 4)))
    documents = np.arange(0, ROWS, 500)
    log_p_lm, mixed = map(torch.from_numpy, scores)
    data = TuningData(log_p_lm, None, None, None, documents)
    shown = perplexity_with_bounds(data, mixed, starts)
    words = [[of[a:b].sum() for a, b in zip(starts, [*starts[1:], ROWS])] for of in scores]
    assert shown["perplexity"] == pytest.approx(np.exp(-np.mean(words[1])))
    expected = paired_interval(*map(np.array, words), documents // 2)
    base = np.exp(-np.mean(words[0]))
    for name in ("low", "high"):
        bound = base * (1 + getattr(expected, name))
        assert shown[f"perplexity_{name}"] == pytest.approx(bound, rel=4e-3)


def test_documents_of_some_rows():
    rows, starts = np.array([1, 2, 7, 8, 30]), np.array([0, 5, 10, 20, 40])
    # the third document has none of them, the last neither
    assert starts_within(rows, starts).tolist() == [0, 2, 4, 4]
