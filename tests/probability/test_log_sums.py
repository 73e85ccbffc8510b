"""Shares of exponential weights, against float64 numpy."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.probability.log_sums import LogShares, log_shares

SEGMENTS = [slice(0, 3), slice(3, 4), slice(4, 12)]


def by_numpy(scores, matches, scale, segments):
    """Shape (N, segments), float64."""
    log_weights = scale * scores.double().numpy()
    shares, columns = [], []
    for segment in segments:
        columns += range(12)[segment]
        every = np.logaddexp.reduce(log_weights[:, columns], axis=1)
        matched = np.where(matches.numpy(), log_weights, -np.inf)[:, columns]
        with np.errstate(invalid="ignore"):
            shares.append(np.logaddexp.reduce(matched, axis=1) - every)
    return np.stack(shares, axis=1)


def random_scores(seed, spread, count=300, lowest=True):
    """Scores in no order; some are missing, whole rows and whole segments among them."""
    rng = torch.Generator().manual_seed(seed)
    scores = spread * torch.rand(count, 12, generator=rng)
    matches = torch.rand(count, 12, generator=rng) < 0.3
    matches[:5] = False
    nothing = math.inf if lowest else -math.inf
    scores[torch.rand(count, 12, generator=rng) < 0.1] = nothing
    scores[:20] = nothing
    scores[20:40, :4] = nothing
    return scores, matches


@pytest.mark.parametrize("scale", [-1e-30, -0.01, -1.0, -20.0, 0.5, 8.0])
@pytest.mark.parametrize("spread", [1.0, 300.0])
@pytest.mark.parametrize("segments", [SEGMENTS, SEGMENTS[::-1], [slice(0, 12)]], ids=len)
def test_equals_float64(scale, spread, segments):
    scores, matches = random_scores(1, spread, lowest=scale < 0)
    expected = by_numpy(scores, matches, scale, segments)
    shares = LogShares(scores, matches, scale < 0, segments).at(scale)
    assert shares.dtype == torch.float32
    np.testing.assert_allclose(shares, expected, rtol=1e-5, atol=2e-5 * max(1, abs(scale)))
    if len(segments) == 1:
        shares = log_shares(scores, matches, scale).unsqueeze(1)
        np.testing.assert_allclose(shares, expected, rtol=1e-5, atol=2e-5 * max(1, abs(scale)))


def test_in_order_and_in_place_give_the_same():
    scores, matches = random_scores(2, 30.0)
    scores = scores.sort(dim=1).values
    scales = (-0.1, -1.0, -7.0)
    plain = LogShares(scores, matches, True, SEGMENTS)
    in_order = LogShares(scores, matches, True, SEGMENTS, best_first=True)
    in_place = LogShares(scores.clone(), matches, True, SEGMENTS, overwrite=True)
    room = torch.empty_like(scores)
    for scale in scales:
        expected = by_numpy(scores, matches, scale, SEGMENTS)
        for shares in (plain, in_order, in_place):
            np.testing.assert_allclose(shares.at(scale, room), expected, rtol=1e-5, atol=1e-5)


def test_large_scores_differ_as_exactly_as_small_ones():
    """Scores are subtracted before they are scaled; by float32 products digits would be lost."""
    scores, matches = random_scores(3, 8.0)
    scores = scores.round()
    for far in (-60000.0, 60000.0):
        shares = log_shares(scores + far, matches, -0.3)
        torch.testing.assert_close(shares, log_shares(scores, matches, -0.3), equal_nan=True)
        of_segments = LogShares(scores + far, matches, True, SEGMENTS).at(-0.3)
        expected = by_numpy(scores + far, matches, -0.3, SEGMENTS)
        np.testing.assert_allclose(of_segments, expected, rtol=1e-5, atol=1e-5)


def every_way(scores, matches, scale):
    """The shares of all columns, by each of the ways to sum."""
    yield log_shares(scores, matches, scale)
    for options in ({}, {"segments": SEGMENTS}, {"segments": SEGMENTS, "best_first": True}):
        yield LogShares(scores, matches, scale < 0, **options).at(scale)[:, -1]


@pytest.mark.parametrize("scale", [-2.0, 2.0])
def test_rows_do_not_depend_on_each_other(scale):
    """Nor do few rows of many columns differ from many rows of few."""
    scores, matches = random_scores(5, 400.0, lowest=scale < 0)
    scores = scores.sort(dim=1, descending=scale > 0).values
    for rows in (slice(0, 1), slice(3, 200, 60)):
        whole = every_way(scores, matches, scale)
        for alone, expected in zip(every_way(scores[rows], matches[rows], scale), whole):
            torch.testing.assert_close(alone, expected[rows], equal_nan=True)


@pytest.mark.parametrize("scale", [-3.0, 0.1])
def test_no_share_is_above_all(scale):
    scores = random_scores(6, 5.0, lowest=scale < 0)[0][40:]
    scores = scores.sort(dim=1, descending=scale > 0).values
    for shares in every_way(scores, torch.ones_like(scores, dtype=torch.bool), scale):
        assert (shares <= 0).all() and shares.min() > -1e-5


def test_many_matches_do_not_cost_digits():
    scores = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(7))
    matches = torch.ones_like(scores, dtype=torch.bool)
    matches[:, ::3] = False
    expected = np.exp(-scores.double().numpy())
    expected = np.log((expected * matches.numpy()).sum(axis=1) / expected.sum(axis=1))
    shares = LogShares(scores, matches, True).at(-1.0)[:, 0]
    np.testing.assert_allclose(shares, expected, rtol=0, atol=2e-6)


def test_what_may_not_be_overwritten_stays_as_it_is():
    scores, matches = random_scores(4, 30.0)
    before = scores.clone(), matches.clone()
    shares = LogShares(scores, matches, True, SEGMENTS)
    assert len(shares) == 300
    first = [shares.at(scale) for scale in (-1.0, -0.1)]
    log_shares(scores, matches, -1.0)
    assert torch.equal(scores, before[0]) and torch.equal(matches, before[1])
    for scale, expected in zip((-1.0, -0.1), first):
        torch.testing.assert_close(shares.at(scale), expected, equal_nan=True)


def test_no_rows():
    scores, matches = torch.empty(0, 12), torch.empty(0, 12, dtype=torch.bool)
    assert log_shares(scores, matches, -1.0).shape == (0,)
    assert LogShares(scores, matches, True, SEGMENTS).at(-1.0).shape == (0, 3)
