"""Mixtures, against numbers on paper and float64 numpy."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability.mixture import mix, weights_of_rows

INF, NAN = math.inf, math.nan


def test_mixture_on_paper():
    mixed = mix(torch.tensor([0.5, 0.1]).log(), torch.tensor([0.2, 0.9]).log(), knn_lambda=0.25)
    assert mixed.exp().tolist() == pytest.approx([0.425, 0.3])


@pytest.mark.parametrize("knn_lambda", [1e-6, 0.3, 0.999])
def test_mixture_equals_float64_and_sums_to_1(knn_lambda):
    rng = np.random.default_rng(6)
    p_lm, p_knn = rng.dirichlet(np.full(30, 0.2), size=2)
    p_knn[:10] = 0.0
    p_knn /= p_knn.sum()
    with np.errstate(divide="ignore"):
        logs = [torch.from_numpy(np.log(p)).float() for p in (p_lm, p_knn)]
    mixed = mix(*logs, knn_lambda=knn_lambda).double().exp()
    np.testing.assert_allclose(mixed, (1 - knn_lambda) * p_lm + knn_lambda * p_knn, rtol=1e-5)
    assert mixed.sum().item() == pytest.approx(1.0)


def test_lambda_0_and_1_are_exact():
    log_p_lm, log_p_knn = (
        torch.tensor([-1.234567, -INF, -2.0]),
        torch.tensor([-INF, -7.654321, 0.0]),
    )
    assert torch.equal(mix(log_p_lm, log_p_knn, knn_lambda=0.0), log_p_lm)
    assert torch.equal(mix(log_p_lm, log_p_knn, knn_lambda=1.0), log_p_knn)


def test_a_weight_of_what_is_not_there_does_not_count():
    lm, other = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.2, 0.9]).log()
    assert torch.equal(mix(lm, other, other), lm)
    assert torch.equal(mix(lm, knn_lambda=0.7, cache_lambda=0.7), lm)
    for mixed in (
        mix(lm, None, other, knn_lambda=0.9, cache_lambda=0.25),
        mix(lm, other, None, knn_lambda=0.25, cache_lambda=0.9),
    ):
        assert mixed.exp().tolist() == pytest.approx([0.425, 0.3])


def test_what_is_mixed_stays_as_it_is():
    parts = [torch.rand(5, generator=torch.Generator().manual_seed(1)).log() for _ in range(3)]
    before = [part.clone() for part in parts]
    mix(*parts, 0.3, 0.2)
    mix(*parts, torch.full((5,), 0.3), 0.2)
    assert all(torch.equal(part, kept) for part, kept in zip(parts, before))


def test_what_neither_gives_is_impossible():
    assert mix(torch.tensor([-INF]), torch.tensor([-INF]), knn_lambda=0.5).tolist() == [-INF]


def test_half_precision_is_mixed_in_float32():
    half = torch.tensor([-1.0], dtype=torch.float16)
    for knn_lambda in (0.0, 0.5, 1.0):
        assert mix(half, half, knn_lambda=knn_lambda).dtype == torch.float32


@pytest.mark.parametrize("knn_lambda", [-0.1, 1.1, math.nan])
def test_lambda_must_be_a_weight(knn_lambda):
    with pytest.raises(UserError, match=rf"lambda must be in \[0, 1\], got {knn_lambda}$"):
        mix(torch.zeros(1), torch.zeros(1), knn_lambda=knn_lambda)


def test_mixture_is_convex():
    lm, knn, cache = torch.log(torch.tensor([[0.5], [0.2], [0.1]])).unbind()
    result = mix(lm, knn, cache, knn_lambda=0.3, cache_lambda=0.2).exp()
    assert result.item() == pytest.approx(0.5 * 0.5 + 0.3 * 0.2 + 0.2 * 0.1)
    assert torch.equal(mix(lm, knn, cache, 0.0, 1.0), cache)
    assert mix(lm, knn, cache, 0.9, 0.1).exp().item() == pytest.approx(0.9 * 0.2 + 0.1 * 0.1)
    empty = torch.tensor([math.nan])
    assert mix(lm, knn, empty, 0.3, 0.2).exp().item() == pytest.approx((0.25 + 0.06) / 0.8)
    assert torch.equal(mix(lm, knn, empty, 0.0, 1.0), lm)


# -- weights of rows, and rows without neighbours or cache -----------------------------------------


def three_distributions(count):
    """log p of model, neighbours and cache; some rows without matches, neighbours or a cache."""
    rng = np.random.default_rng(8)
    lm, knn, cache = np.log(rng.random((3, count)))
    knn[1::4], cache[2::4] = -INF, -INF
    knn[2::8], cache[::8], knn[3::8], cache[3::8] = NAN, NAN, NAN, NAN
    return [torch.from_numpy(each).float() for each in (lm, knn, cache)]


WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.2), (0.9, 0.1), (0.25, 0.0), (0.0, 0.4)]


def test_weights_of_rows_equal_one_row_at_a_time():
    lm, knn, cache = three_distributions(8 * len(WEIGHTS))
    knn_lambda, cache_lambda = torch.tensor(WEIGHTS).repeat_interleave(8, dim=0).unbind(dim=1)
    mixed = mix(lm, knn, cache, knn_lambda, cache_lambda)
    assert mixed.dtype == torch.float32
    for row, (first, second) in enumerate(zip(knn_lambda.tolist(), cache_lambda.tolist())):
        part = slice(row, row + 1)
        alone = mix(lm[part], knn[part], cache[part], first, second)
        torch.testing.assert_close(mixed[part], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("knn_lambda, cache_lambda", WEIGHTS)
def test_what_is_not_defined_leaves_its_weight_to_the_others(knn_lambda, cache_lambda):
    logs = three_distributions(64)
    probabilities = np.exp([each.double().numpy() for each in logs])
    of_lm = round(1.0 - knn_lambda - cache_lambda, 9)
    weights = np.array([[of_lm], [knn_lambda], [cache_lambda]])
    weights = np.where(np.isnan(probabilities), 0.0, weights)
    nothing_left = weights.sum(axis=0) == 0
    weights[0, nothing_left] = 1.0
    expected = (weights * np.nan_to_num(probabilities)).sum(axis=0) / weights.sum(axis=0)
    mixed = mix(*logs, knn_lambda, cache_lambda).double().exp()
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-12)
    rows = torch.tensor([[knn_lambda], [cache_lambda]], dtype=torch.float64).expand(2, 64)
    mixed = mix(*logs, *rows).double().exp()
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("as_weight", [float, lambda weight: torch.full((2,), weight)])
def test_without_neighbours_it_is_exactly_the_language_model(as_weight):
    log_p_lm, knn = torch.tensor([-1.2345678, -7.0]), torch.tensor([NAN, -2.0])
    mixed = mix(log_p_lm, knn, knn_lambda=as_weight(0.7))
    assert mixed[0] == log_p_lm[0] and mixed[1] > -2.4
    assert mix(log_p_lm, knn, knn_lambda=as_weight(1.0)).tolist() == [log_p_lm[0], -2.0]
    nothing = torch.full((2,), NAN)
    assert torch.equal(mix(log_p_lm, nothing, nothing, as_weight(0.5), as_weight(0.5)), log_p_lm)


def test_weights_0_and_1_of_rows_are_exact():
    lm = torch.tensor([-1.234567, -INF, -2.0, -1.234567])
    knn = torch.tensor([-INF, -7.654321, 0.0, -5.4321])
    mixed = mix(lm, knn, knn_lambda=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert mixed.tolist() == [lm[0], knn[1], knn[2], lm[3]]
    assert mix(lm, lm, knn, torch.zeros(4), torch.ones(4)).tolist() == knn.tolist()


def test_weights_of_rows_of_whole_distributions():
    rng = torch.Generator().manual_seed(1)
    lm, knn = torch.rand(2, 3, 7, generator=rng).log_softmax(dim=2)
    knn[1] = NAN
    mixed = mix(lm, knn, knn_lambda=torch.tensor([0.2, 0.9, 0.5]))
    for row, knn_lambda in enumerate((0.2, 0.0, 0.5)):
        expected = (1 - knn_lambda) * lm[row].exp() + (knn_lambda * knn[row].exp()).nan_to_num()
        torch.testing.assert_close(mixed[row].exp(), expected)
    assert torch.equal(mixed[1], lm[1])
    assert torch.equal(mix(lm, knn, knn_lambda=0.3)[1], lm[1])


@pytest.mark.parametrize(
    "knn_lambda, cache_lambda, message",
    [
        ([0.1, 1.5], None, r"lambda must be in \[0, 1\], got 1.5 in row 1"),
        ([NAN, 0.5], None, r"lambda must be in \[0, 1\], got nan in row 0"),
        ([0.1, 0.9], 0.25, "together at most 1, got 0.8.* and 0.25 in row 1"),
        (0.5, [0.25, -0.25], "together at most 1, got 0.5 and -0.25 in row 1"),
        ([0.1, 0.2, 0.3], None, r"of shape \(2,\), one for each row, got shape \(3,\)"),
        ([[0.1], [0.2]], None, r"of shape \(2,\), one for each row, got shape \(2, 1\)"),
        ([0.2, -0.25], None, r"lambda must be in \[0, 1\], got -0.25 in row 1"),
        ([1.5, 1.5], None, r"lambda must be in \[0, 1\], got 1.5 in row 0"),
        (0.9, 0.2, "together at most 1, got 0.9 and 0.2$"),
        (0.5, -0.25, "together at most 1, got 0.5 and -0.25$"),
        (0.0, 1 + 5e-10, "together at most 1, got 0.0 and 1.0000000005$"),
        ([0.0, 0.0], [1.0, 1 + 2.0**-22], "together at most 1, got 0.0 and 1.0000002.* in row 1"),
    ],
)
def test_weights_that_cannot_be_are_refused(knn_lambda, cache_lambda, message):
    log_p = torch.tensor([-1.0, -2.0])
    knn_lambda, cache_lambda = (
        torch.tensor(weight) if isinstance(weight, list) else weight
        for weight in (knn_lambda, cache_lambda)
    )
    with pytest.raises(UserError, match=message):
        if cache_lambda is None:
            mix(log_p, log_p, knn_lambda=knn_lambda)
        else:
            mix(log_p, log_p, log_p, knn_lambda, cache_lambda)


def test_the_row_of_a_weight_is_named_for_whole_distributions():
    log_p = torch.rand(3, 4).log()
    with pytest.raises(UserError, match="got 0.75 and 0.5 in row 2"):
        mix(log_p, log_p, log_p, torch.tensor([0.0, 0.25, 0.75]), torch.tensor([0.0, 0.5, 0.5]))


@pytest.mark.parametrize("shape", [(0,), (0, 7)])
@pytest.mark.parametrize("as_weight", [float, lambda weight: torch.full((0,), weight)])
def test_no_rows(shape, as_weight):
    nothing = torch.empty(shape)
    mixed = mix(nothing, nothing, nothing, as_weight(0.3), as_weight(0.2))
    assert mixed.shape == shape and mixed.dtype == torch.float32


# -- the weights of each row -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "knn_lambda, cache_lambda", [(0.3, 0.2), (0.0, 0.4), (1.0, 0.0), (0.6, 0.4)]
)
@pytest.mark.parametrize("per_row", [False, True])
def test_weights_of_rows_are_those_of_the_mixture(knn_lambda, cache_lambda, per_row):
    """Also where one memory, the other or both have nothing to say."""
    rng = np.random.default_rng(1)
    p = rng.random((3, 200))
    p[1, 20:60] = p[2, 40:90] = NAN
    p[1, 100:120] = 0.0
    if per_row:
        knn_lambda, cache_lambda = (
            torch.full((200,), weight, dtype=torch.float64) for weight in (knn_lambda, cache_lambda)
        )
    mixture = (*torch.from_numpy(p).float().log(), knn_lambda, cache_lambda)
    weights = weights_of_rows(*mixture).numpy()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert (weights >= 0).all()
    assert not weights[20:60, 1].any() and not weights[40:90, 2].any()
    expected = (weights.T * np.nan_to_num(p)).sum(axis=0)
    np.testing.assert_allclose(mix(*mixture).exp().numpy(), expected, rtol=1e-5)


def test_weights_of_rows_without_memories():
    log_p = torch.tensor([-1.0, -2.0])
    assert weights_of_rows(log_p).tolist() == [[1.0, 0.0, 0.0]] * 2
    assert weights_of_rows(log_p, log_p, knn_lambda=0.25).tolist() == [[0.75, 0.25, 0.0]] * 2


@pytest.mark.parametrize("knn_lambda", [0.01, 0.1, 0.3, 0.7, 0.9999])
def test_weights_that_are_1_together_leave_the_model_none(knn_lambda):
    """Also where 1 - mu is more than lambda by what float64 rounds."""
    impossible = torch.tensor([-math.inf])
    for cache_lambda in (1.0 - knn_lambda, round(1.0 - knn_lambda, 4)):
        mixed = mix(torch.tensor([-1.0]), impossible, impossible, knn_lambda, cache_lambda)
        assert mixed.item() == -math.inf
    some = mix(torch.tensor([-1.0]), impossible, impossible, knn_lambda, 1.0 - knn_lambda - 1e-10)
    assert some.item() == pytest.approx(-1 + math.log(1e-10), rel=1e-5)
