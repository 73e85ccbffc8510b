"""The grid over one retrieval, against one evaluation at a time."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability.knn import knn_log_probs
from fairseq_knnlm.probability.metrics import perplexity
from fairseq_knnlm.probability.mixture import mix
from fairseq_knnlm.tuning import knn_sweep
from fairseq_knnlm.tuning.grid import KNNGridPoint, best
from fairseq_knnlm.tuning.knn_sweep import (
    best_lambda,
    best_of_each_k,
    k_at_an_end,
    log_p_knn,
    mixture_perplexities,
    sweep,
    temperature_at_an_end,
)
from fairseq_knnlm.tuning.tuning_data import TuningData

INF = math.inf


def make_data(seed, count=400, k=12):
    """A language model and neighbours that are each good at something."""
    rng = torch.Generator().manual_seed(seed)
    distances = (20 * torch.rand(count, k, generator=rng)).round().sort(dim=1).values
    matches = torch.rand(count, k, generator=rng) < 0.4
    matches[: count // 4] = False  # no neighbour has the target
    log_p_lm = torch.rand(count, generator=rng).clamp(min=1e-3).log()
    return TuningData(log_p_lm, distances, matches)


def make_scaled(scale):
    """Neighbours of which the near ones are right far more often than the far ones."""
    data = make_data(seed=9)
    near = data.distances < 4
    rng = torch.Generator().manual_seed(1)
    matches = torch.rand(near.shape, generator=rng) < torch.where(near, 0.6, 0.02)
    return TuningData(data.log_p_lm, scale * data.distances, matches)


def log_p_knn_one_at_a_time(data, k, temperature):
    ones = torch.ones(len(data.matches), dtype=torch.long)
    return knn_log_probs(data.distances[:, :k], data.matches[:, :k].long(), ones, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 30.0])
def test_every_k_is_the_prefix(temperature):
    data = make_data(seed=1)
    data.distances[7, 3:] = INF
    data.distances[8] = INF
    ks = [5, 1, 12, 5]
    for k, result in zip(ks, log_p_knn(data, ks, temperature)):
        expected = log_p_knn_one_at_a_time(data, k, temperature)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert result[8].isnan() and not result[7].isnan()


def test_prefixes_do_not_depend_on_how_rows_are_cut(monkeypatch):
    data = make_data(seed=2)
    whole = log_p_knn(data, [3, 12], 2.0)
    monkeypatch.setattr(knn_sweep, "_ROWS", 7)
    assert torch.equal(log_p_knn(data, [3, 12], 2.0), whole)


def test_negative_distances_of_inner_products_do_not_overflow():
    distances = torch.tensor([[-5000.0, -5000.0 + math.log(3), -100.0]])
    data = TuningData(torch.zeros(1), distances, torch.tensor([[False, True, True]]))
    (result,) = log_p_knn(data, [2], 1.0).exp()
    assert result.item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_best_lambda_equals_a_fine_grid(seed):
    data = make_data(seed)
    log_p_lm = data.log_p_lm.double().numpy()
    (scores,) = log_p_knn(data, [12], 5.0)
    lambdas = np.linspace(0, 1, 2001)[:, None]
    with np.errstate(divide="ignore"):
        likelihood = np.log(
            (1 - lambdas) * np.exp(log_p_lm) + lambdas * np.exp(scores.double().numpy())
        ).mean(axis=1)
    on_grid = lambdas[likelihood.argmax(), 0]
    assert 0.0 < on_grid < 1.0
    result = best_lambda(data.log_p_lm, scores)
    assert result == pytest.approx(on_grid, abs=1e-3)
    (lowest,) = mixture_perplexities(data.log_p_lm, scores, [result])
    assert lowest == pytest.approx(math.exp(-likelihood.max()), rel=1e-5)


@pytest.mark.parametrize(
    "scores", [[-2.0, -3.0], [-INF, -3.0], [-INF, -INF], [math.nan, -3.0], [math.nan, math.nan]]
)
def test_lambda_is_0_where_neighbours_only_hurt(scores):
    assert best_lambda(torch.tensor([-1.0, -2.0]), torch.tensor(scores)) == 0.0


@pytest.mark.parametrize("scores", [[-1.0, -1.0], [math.nan, -1.0], [-1.0, math.nan]])
def test_lambda_stays_below_1_where_neighbours_only_help(scores):
    result = best_lambda(torch.tensor([-3.0, -2.0]), torch.tensor(scores))
    assert 1 - 1e-6 < result < 1


def test_a_lambda_is_a_number():
    data = make_data(seed=1)
    assert type(best_lambda(data.log_p_lm, log_p_knn(data, [12], 1.0)[0])) is float


def test_lambda_is_1_where_neighbours_only_help():
    result = best_lambda(torch.tensor([-4.0, -400.0]), torch.tensor([-1.0, -2.0]))
    assert 1 - 1e-9 < result <= 1.0


def test_one_impossible_target_keeps_lambda_below_1():
    scores = torch.zeros(1000)
    scores[0] = -INF
    result = best_lambda(torch.full((1000,), -5.0), scores)
    # d/dl (ln(1 - l) + 999 ln(p + (1 - p) l)) = 0 with p = exp(-5)
    p = math.exp(-5)
    assert result == pytest.approx((999 * (1 - p) - p) / (1000 * (1 - p)), abs=1e-6)


def test_a_query_without_matches_costs_its_share_of_lambda():
    matches = torch.ones(8, 2, dtype=torch.bool)
    matches[0] = False
    data = TuningData(torch.full((8,), 0.5).log(), torch.zeros(8, 2), matches)
    (point,) = sweep(data, [2], [5.0])
    # ln((1 - l) / 2) + 7 ln((1 + l) / 2) is highest at l = 3/4
    assert point.knn_lambda == pytest.approx(0.75)
    assert point.perplexity == pytest.approx((0.125 * 0.875**7) ** (-1 / 8))


def test_a_query_without_neighbours_is_left_to_the_language_model():
    distances, matches = torch.zeros(9, 2), torch.ones(9, 2, dtype=torch.bool)
    distances[0] = INF
    matches[:2] = False
    data = TuningData(torch.full((9,), 0.5).log(), distances, matches)
    (point,) = sweep(data, [2], [5.0])
    assert point.knn_lambda == pytest.approx(0.75)
    assert point.perplexity == pytest.approx((0.5 * 0.125 * 0.875**7) ** (-1 / 9))


def test_sweep_covers_the_grid_and_never_loses_to_the_language_model():
    data = make_data(seed=4)
    points = sweep(data, [1, 8], [0.5, 2.0, 9.0])
    assert sorted((s.k, s.temperature) for s in points) == [
        (k, temperature) for k in (1, 8) for temperature in (0.5, 2.0, 9.0)
    ]
    for point in points:
        scores = log_p_knn_one_at_a_time(data, point.k, point.temperature).double()
        mixed = (1 - point.knn_lambda) * data.log_p_lm.double().exp()
        mixed += point.knn_lambda * scores.exp()
        assert point.perplexity == pytest.approx(math.exp(-mixed.log().mean()), rel=1e-5)
        assert point.perplexity <= perplexity(data.log_p_lm) * (1 + 1e-6)


@pytest.mark.parametrize("temperature", [0.03, 1.0, 40.0])
def test_every_lambda_equals_one_evaluation_at_a_time(temperature):
    data = make_data(seed=8)
    lambdas = [0.0, 0.1, 0.25, 0.9999]
    points = sweep(data, [1, 5, 12], [temperature], lambdas)
    assert [(s.k, s.knn_lambda) for s in points] == [(k, x) for k in (1, 5, 12) for x in lambdas]
    for point in points:
        scores = log_p_knn_one_at_a_time(data, point.k, temperature)
        mixed = mix(data.log_p_lm, scores, knn_lambda=point.knn_lambda)
        assert point.perplexity == pytest.approx(perplexity(mixed), rel=1e-6)


def test_lambda_1_of_matches_far_behind_the_nearest():
    """Their weights are 0 in float32, their probability is not."""
    distances = torch.tensor([[0.0, 300.0, 500.0], [0.0, 1.0, 2.0]])
    matches = torch.tensor([[False, True, False], [True, False, True]])
    data = TuningData(torch.tensor([-3.0, -2.0]), distances, matches)
    one, three = sweep(data, [1, 3], [1.0], [1.0])
    assert one.perplexity == INF
    second = (1 + math.exp(-2)) / (1 + math.exp(-1) + math.exp(-2))
    assert three.perplexity == pytest.approx(math.exp((300 - math.log(second)) / 2))


@pytest.mark.parametrize(
    "ks, temperatures, lambdas, message",
    [
        ([0], [1.0], None, r"k in \[1, 12\], .* got 0"),
        ([3, 13], [1.0], None, r"k in \[1, 12\], .* got 3, 13"),
        ([], [1.0], None, r"k in \[1, 12\], .* got none"),
        ([1], [], None, "empty"),
        ([1], [1.0], [], "empty"),
        ([1], [1e-31], None, r"temperatures in .*got 1e-31"),
        ([1.5], [1.0], None, r"k in \[1, 12\], .* got 1.5"),
        ([1], [1.0], [0.5, 1.5], r"lambda must be in \[0, 1\], got 1.5"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(ks, temperatures, lambdas, message):
    with pytest.raises(UserError, match=message):
        sweep(make_data(seed=0), ks, temperatures, lambdas)


def test_temperatures_are_refined_around_the_best():
    data = make_scaled(1.0)
    powers = [2.0**exponent for exponent in range(-6, 11)]
    coarse = best(sweep(data, [4, 12], powers))
    points = sweep(data, [4, 12])
    assert best(points).perplexity <= coarse.perplexity
    tried = sorted({point.temperature for point in points})
    assert set(powers) < set(tried)
    place = tried.index(best(points).temperature)
    assert tried[place + 1] / tried[place - 1] == pytest.approx(2**0.5, rel=1e-4)
    in_order = list(dict.fromkeys(point.temperature for point in points))
    for lower, higher, factor in ((-4, -3, 2.0), (-2, -1, 2**0.5)):
        assert in_order[higher] / in_order[lower] == pytest.approx(factor, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e7])
def test_the_range_of_temperatures_follows_the_distances(scale):
    """The best temperature is result on any scale of the distances."""
    scaled = make_scaled(scale)
    points = sweep(scaled, [12])
    lowest = best(points)
    assert not temperature_at_an_end(points)
    everywhere = [scale * 2.0**exponent for exponent in range(-8, 9)]
    reference = best(sweep(scaled, [12], everywhere))
    assert lowest.perplexity <= reference.perplexity * (1 + 1e-6)


def tried_temperatures(points):
    return sorted({point.temperature for point in points})


def test_temperatures_go_on_below_while_the_best_is_at_an_end():
    """Only the nearest are right, and the next are nearer to them than a millionth of the rest."""
    distances = torch.tensor([[0.0, 1e-3, 1000.0]]).repeat(50, 1)
    matches = torch.tensor([[True, False, False]]).repeat(50, 1)
    points = sweep(TuningData(torch.full((50,), -3.0), distances, matches), [3])
    assert best(points).perplexity == pytest.approx(1 / (0.9999 + 1e-4 * math.exp(-3)), rel=1e-5)
    tried = tried_temperatures(points)
    assert tried[-1] == 1024 * 2.0**6 and 1024 * 2.0**-26 < tried[0] < 1024 * 2.0**-20
    # it ends where nothing is gained any more, and the rest are powers of two
    assert {float(f"{1024 * 2.0**exponent:.6g}") for exponent in range(-20, 7)} <= set(tried)


def test_temperatures_that_go_on_getting_better_come_to_an_end():
    """Only the nearest are right, and on every scale there are some that are a little farther."""
    distances = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-45, 1, 3)]).repeat(50, 1)
    matches = distances == 0
    points = sweep(TuningData(torch.full((50,), -3.0), distances, matches), [distances.size(1)])
    tried = tried_temperatures(points)
    assert len(tried) == 17 + 16 + 4
    assert tried[0] == best(points).temperature and tried[-1] == 2.0**6


def test_temperatures_do_not_go_on_where_hardly_anything_is_gained():
    """Here the farther are as good as the near: the higher the temperature, the better."""
    data = make_scaled(1.0)
    every = data._replace(matches=torch.arange(data.matches.numel()).view(-1, 12) % 5 == 0)
    tried = tried_temperatures(sweep(every, [12]))
    assert tried[0] == 16 * 2.0**-10 and 16 * 2.0**7 in tried
    assert len(tried) < 17 + 16 + 4


def test_the_temperatures_are_about_the_spread_of_the_distances():
    """The median of the farthest beyond the nearest, where there is any; a power of two near it."""
    spreads = torch.tensor([0.1, 0.2, 60.0, 650.0, 700.0] + 10 * [0.0])
    distances = 100 + spreads[:, None] * torch.tensor([0.0, 0.9, 1.0])
    distances = torch.cat([distances, torch.full((3, 3), INF)])
    matches = torch.arange(distances.numel()).view(-1, 3) % 4 == 0
    points = sweep(TuningData(torch.full((18,), -3.0), distances, matches), [3])
    tried = list(dict.fromkeys(point.temperature for point in points))
    assert tried[:17] == [64 * 2.0**exponent for exponent in range(-10, 7)]


def test_some_of_many_rows_tell_the_spread(monkeypatch):
    data = make_data(seed=3)
    on_all = sweep(data, [12])
    monkeypatch.setattr(knn_sweep, "_SPREAD_ROWS", 50)
    assert sweep(data, [12]) == on_all


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_the_temperatures_at_the_ends_of_what_can_be(temperature):
    points = sweep(make_data(seed=3), [12], [temperature])
    assert math.isfinite(points[0].perplexity)
    with pytest.raises(UserError, match="temperatures in"):
        sweep(make_data(seed=3), [12], [temperature**1.01])


def test_missing_neighbours_do_not_change_the_temperatures():
    data = make_data(seed=3)
    more = data._replace(
        distances=torch.nn.functional.pad(data.distances, (0, 3), value=INF),
        matches=torch.nn.functional.pad(data.matches, (0, 3), value=True),
    )
    assert sweep(more, [12]) == sweep(data, [12])
    assert [point[1:] for point in sweep(more, [15])] == [point[1:] for point in sweep(data, [12])]


def test_without_any_neighbour_every_point_is_the_language_model():
    data = make_data(seed=3)
    nothing = data._replace(distances=torch.full_like(data.distances, INF))
    for point in sweep(nothing, [1, 12]):
        assert point.knn_lambda == 0.0
        assert point.perplexity == pytest.approx(perplexity(data.log_p_lm), rel=1e-6)


def test_a_best_temperature_at_an_end_is_told():
    data = make_data(seed=9)
    assert temperature_at_an_end(sweep(data, [12], [1e-3, 2e-3]))
    assert not temperature_at_an_end(sweep(data, [12], [1.0]))


@pytest.mark.parametrize("best_place, is_at_an_end", [(0, True), (1, False), (2, True)])
def test_both_ends_of_the_temperatures_are_told(best_place, is_at_an_end):
    points = [
        KNNGridPoint(8, temperature, 0.5, 7.0 - (place == best_place))
        for place, temperature in enumerate((1.0, 2.0, 4.0))
    ]
    assert temperature_at_an_end(points) == is_at_an_end


def point(k, perplexity):
    return KNNGridPoint(k, 1.0, 0.5, perplexity)


@pytest.mark.parametrize(
    "points, expected",
    [
        ([point(1, 9.0), point(8, 8.0), point(64, 7.0)], "largest"),
        ([point(1, 9.0), point(8, 7.0)], "largest"),
        ([point(1, 9.0), point(8, 7.0), point(64, 7.5)], None),
        ([point(1, 7.0), point(8, 8.0)], None),  # there is no smaller one
        ([point(4, 7.0), point(8, 8.0)], "smallest"),
        ([point(2, 7.0), point(8, 8.0)], "smallest"),
        ([point(8, 7.0)], None),
    ],
)
def test_a_best_k_at_an_end_is_told(points, expected):
    assert k_at_an_end(points) == expected


def test_settings_can_be_typed_as_flags():
    for point in sweep(make_data(seed=5), [4, 12]):
        assert float(f"{point.knn_lambda:.4f}") == point.knn_lambda < 1.0
        assert float(f"{point.temperature:.6g}") == point.temperature


def test_best_of_each_k():
    points = [
        KNNGridPoint(1024, 1.0, 0.1, 9.0),
        KNNGridPoint(8, 1.0, 0.2, 8.0),
        KNNGridPoint(1024, 3.0, 0.3, 7.0),
    ]
    assert best_of_each_k(points) == [points[1], points[2]]
    assert best(points) == points[2]
    with pytest.raises(UserError, match="^best_of_each_k: there is no point"):
        best_of_each_k([])


def test_the_smallest_of_equal_ks_is_the_best():
    points = [KNNGridPoint(8, 1.0, 0.0, 7.0), KNNGridPoint(2, 3.0, 0.0, 7.0)]
    assert best(points) == points[1]


def test_shapes_that_do_not_fit_are_named():
    data = make_data(seed=0)
    with pytest.raises(UserError, match=r"got \(400, 12\), \(400, 11\), \(400,\)"):
        sweep(data._replace(matches=data.matches[:, 1:]), [1])
    with pytest.raises(UserError, match=r"got \(400, 12\), \(400, 12\), \(399,\)"):
        sweep(data._replace(log_p_lm=data.log_p_lm[1:]), [1])
