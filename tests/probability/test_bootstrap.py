"""Intervals of differences, against one resample at a time and against known answers."""

import math
import warnings

import numpy as np
import pytest

from fairseq_knnlm.probability import bootstrap
from fairseq_knnlm.probability.bootstrap import (
    BLOCK_TOKENS,
    MIN_UNITS,
    Interval,
    in_words,
    paired_interval,
)


def make_scores(seed, documents, tokens=40, gain=0.2):
    """Two settings' log probabilities; what the second gains differs from document to document."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(tokens // 2, 2 * tokens, size=documents)
    first = -rng.exponential(3.0, size=sizes.sum())
    gains = np.repeat(rng.normal(gain, 0.1, size=documents), sizes)
    second = first + gains + rng.normal(0, 0.3, size=sizes.sum())
    return first, second, np.cumsum(sizes) - sizes


def test_the_value_is_the_relative_change_of_perplexity():
    first, second, starts = make_scores(1, 30)
    interval = paired_interval(first, second, starts)
    assert interval.value == pytest.approx(np.exp(-second.mean()) / np.exp(-first.mean()) - 1)
    assert interval.low < interval.value < interval.high < 0
    assert (interval.units, interval.unit) == (30, "documents")


def test_equals_resampling_one_document_at_a_time():
    first, second, starts = make_scores(2, 25)
    interval = paired_interval(first, second, starts)
    rng = np.random.default_rng(9)
    documents = np.split(np.stack([first, second]), starts[1:], axis=1)
    changes = []
    for _ in range(4000):
        drawn = [documents[i] for i in rng.integers(25, size=25)]
        mean = np.concatenate(drawn, axis=1).mean(axis=1)
        changes.append(math.exp(mean[0] - mean[1]) - 1)
    expected = np.quantile(changes, [0.025, 0.975])
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.05 * np.ptp(expected))


def test_it_covers_the_truth_as_often_as_it_says():
    """The same gain everywhere in expectation: 95% of the intervals hold it, about."""
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        gains = np.repeat(rng.normal(0.2, 0.1, size=40), 10)
        first = -rng.exponential(3.0, size=400)
        interval = paired_interval(first, first + gains, np.arange(0, 400, 10), resamples=500)
        held += interval.low <= math.expm1(-0.2) <= interval.high
    assert 0.89 <= held / 200 <= 0.99


def test_a_setting_does_not_differ_from_itself():
    first, _, starts = make_scores(3, 20)
    assert paired_interval(first, first, starts)[:3] == (0.0, 0.0, 0.0)


def test_it_is_paired():
    """What makes a document hard for both settings does not widen the interval."""
    first, second, starts = make_scores(4, 50)
    hard = np.repeat(np.random.default_rng(5).normal(0, 2, 50), np.diff([*starts, len(first)]))
    plain, harder = (paired_interval(first + x, second + x, starts) for x in (0, hard))
    assert harder == plain._replace(**{
        name: pytest.approx(getattr(plain, name)) for name in ("value", "low", "high")
    })  # fmt: skip


def test_few_documents_are_cut_into_blocks():
    first, second, _ = make_scores(6, 100)
    interval = paired_interval(first, second, [0, 100, 200])
    assert (interval.units, interval.unit) == (-(-len(first) // BLOCK_TOKENS), "blocks")


@pytest.mark.parametrize("tokens, units", [(9_000, 9), (9_001, 10)])
def test_few_units_have_no_interval(tokens, units):
    assert MIN_UNITS == 10
    first = -np.random.default_rng(9).exponential(3.0, size=tokens)
    interval = paired_interval(first, first + 0.1, [0, 100])
    assert interval.value == pytest.approx(math.expm1(-0.1))
    assert (interval.units, interval.unit) == (units, "blocks")
    assert (interval.low is None) == (interval.high is None) == (units < 10)


@pytest.mark.parametrize(
    "change, expected",
    [
        (Interval(-0.1, -0.125, -0.0751, 1300, "documents"),
         "95% interval [-12.50%, -7.51%] (1,300 documents)"),
        (Interval(-0.1, -0.125, -0.0751, 12, "blocks"),
         "95% interval [-12.50%, -7.51%] (12 blocks of 1,000 tokens, for want of 10 documents)"),
        (Interval(-0.1, None, None, 6, "blocks"),
         "no 95% interval (too few: 6 blocks of 1,000 tokens, for want of 10 documents)"),
    ],
)  # fmt: skip
def test_in_words(change, expected):
    assert in_words(change) == expected


def test_many_documents_are_drawn_together():
    rng = np.random.default_rng(7)
    first = -rng.exponential(3.0, size=100_000)
    interval = paired_interval(first, first + 0.1, np.arange(0, 100_000, 2), resamples=100)
    assert interval.units <= 4096
    assert interval.low == pytest.approx(math.expm1(-0.1)) == interval.high


def test_an_impossible_token_makes_the_change_infinite():
    first, second, starts = make_scores(8, 20)
    second[5] = -math.inf
    interval = paired_interval(first, second, starts)
    assert interval.value == interval.high == math.inf
    assert interval.low < 0


def test_low_and_high_are_as_far_from_the_ends():
    """The other way round, low and high take each other's place."""
    first, second, starts = make_scores(9, 30)
    there = paired_interval(first, second, starts, resamples=1000)
    back = paired_interval(second, first, starts, resamples=1000)
    assert 1 + there.low == pytest.approx(1 / (1 + back.high))
    assert 1 + there.high == pytest.approx(1 / (1 + back.low))


def test_one_resample_is_both_ends():
    first, second, starts = make_scores(10, 30)
    interval = paired_interval(first, second, starts, resamples=1)
    assert interval.low == interval.high != interval.value
    assert all(type(number) is float for number in interval[:3])


def test_draws_do_not_depend_on_how_many_fit_in_memory(monkeypatch):
    scores = make_scores(11, 30)
    whole = paired_interval(*scores, resamples=7)
    for draws in (1, 200, 100_000):
        monkeypatch.setattr(bootstrap, "_DRAWS", draws)
        assert paired_interval(*scores, resamples=7) == whole


def test_ten_documents_are_enough():
    first, second, starts = make_scores(12, 10)
    assert paired_interval(first, second, starts)[3:] == (10, "documents")
    assert paired_interval(first, second, starts[:9])[3:] == (1, "blocks")


def test_what_stands_before_the_first_document_counts_as_one():
    first, second, starts = make_scores(13, 20)
    whole = paired_interval(first, second, starts)
    assert paired_interval(first, second, starts[1:]) == whole
    assert paired_interval(first, second, np.repeat(starts, 2)) == whole


def test_single_precision_is_summed_in_double():
    first, second, starts = make_scores(14, 20, tokens=400)
    first, second = first.astype(np.float32), second.astype(np.float32)
    expected = paired_interval(first.astype(np.float64), second.astype(np.float64), starts)
    assert paired_interval(first, second, starts) == expected


def test_a_change_beyond_all_numbers_is_infinite_without_a_warning():
    first, _, starts = make_scores(15, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_interval(first, first - 2000.0, starts).low == math.inf
