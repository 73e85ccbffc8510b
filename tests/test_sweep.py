"""The grid over one retrieval against one evaluation at a time, and the metrics."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm import sweep
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.interpolation import interpolate, knn_log_probs
from fairseq_knnlm.metrics import perplexity, recall_at_k
from fairseq_knnlm.neighbors_file import Retrieved
from fairseq_knnlm.sweep import Setting

INF = math.inf


def make_retrieved(seed, count=400, k=12):
    """A language model and neighbours that are each good at something."""
    chance = torch.Generator().manual_seed(seed)
    distances = (20 * torch.rand(count, k, generator=chance)).round().sort(dim=1).values
    matches = torch.rand(count, k, generator=chance) < 0.4
    matches[: count // 4] = False  # no neighbour has the target
    log_p_lm = torch.rand(count, generator=chance).clamp(min=1e-3).log()
    return Retrieved(log_p_lm, distances, matches)


def make_scaled(scale):
    """Neighbours of which the near ones are right far more often than the far ones."""
    retrieved = make_retrieved(seed=9)
    near = retrieved.distances < 4
    chance = torch.Generator().manual_seed(1)
    matches = torch.rand(near.shape, generator=chance) < torch.where(near, 0.6, 0.02)
    return Retrieved(retrieved.log_p_lm, scale * retrieved.distances, matches)


def log_p_knn_one_at_a_time(retrieved, k, temperature):
    ones = torch.ones(len(retrieved.matches), dtype=torch.long)
    return knn_log_probs(
        retrieved.distances[:, :k], retrieved.matches[:, :k].long(), ones, temperature
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 30.0])
def test_every_k_is_the_prefix(temperature):
    retrieved = make_retrieved(seed=1)
    retrieved.distances[7, 3:] = INF
    retrieved.distances[8] = INF
    ks = [5, 1, 12, 5]
    for k, found in zip(ks, sweep.log_p_knn(retrieved, ks, temperature)):
        expected = log_p_knn_one_at_a_time(retrieved, k, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_prefixes_do_not_depend_on_how_rows_are_cut(monkeypatch):
    retrieved = make_retrieved(seed=2)
    whole = sweep.log_p_knn(retrieved, [3, 12], 2.0)
    monkeypatch.setattr(sweep, "_ROWS", 7)
    assert torch.equal(sweep.log_p_knn(retrieved, [3, 12], 2.0), whole)


def test_negative_distances_of_inner_products_do_not_overflow():
    distances = torch.tensor([[-5000.0, -5000.0 + math.log(3), -100.0]])
    retrieved = Retrieved(torch.zeros(1), distances, torch.tensor([[False, True, True]]))
    (found,) = sweep.log_p_knn(retrieved, [2], 1.0).exp()
    assert found.item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_best_lambda_equals_a_fine_grid(seed):
    retrieved = make_retrieved(seed)
    log_p_lm = retrieved.log_p_lm.double().numpy()
    (log_p_knn,) = sweep.log_p_knn(retrieved, [12], 5.0)
    lambdas = np.linspace(0, 1, 2001)[:, None]
    with np.errstate(divide="ignore"):
        likelihood = np.log(
            (1 - lambdas) * np.exp(log_p_lm) + lambdas * np.exp(log_p_knn.double().numpy())
        ).mean(axis=1)
    on_grid = lambdas[likelihood.argmax(), 0]
    assert 0.0 < on_grid < 1.0
    found = sweep.best_lambda(retrieved.log_p_lm, log_p_knn)
    assert found == pytest.approx(on_grid, abs=1e-3)
    (lowest,) = sweep.mixture_perplexities(retrieved.log_p_lm, log_p_knn, [found])
    assert lowest == pytest.approx(math.exp(-likelihood.max()), rel=1e-5)


@pytest.mark.parametrize("log_p_knn", [[-2.0, -3.0], [-INF, -3.0], [-INF, -INF]])
def test_lambda_is_0_where_neighbours_only_hurt(log_p_knn):
    assert sweep.best_lambda(torch.tensor([-1.0, -2.0]), torch.tensor(log_p_knn)) == 0.0


def test_lambda_is_1_where_neighbours_only_help():
    found = sweep.best_lambda(torch.tensor([-4.0, -400.0]), torch.tensor([-1.0, -2.0]))
    assert 1 - 1e-9 < found <= 1.0


def test_one_impossible_target_keeps_lambda_below_1():
    log_p_knn = torch.zeros(1000)
    log_p_knn[0] = -INF
    found = sweep.best_lambda(torch.full((1000,), -5.0), log_p_knn)
    # d/dl (ln(1 - l) + 999 ln(p + (1 - p) l)) = 0 with p = exp(-5)
    p = math.exp(-5)
    assert found == pytest.approx((999 * (1 - p) - p) / (1000 * (1 - p)), abs=1e-6)


def test_a_query_without_neighbours_costs_its_share_of_lambda():
    distances = torch.zeros(8, 2)
    distances[0] = INF
    matches = torch.ones(8, 2, dtype=torch.bool)
    matches[0] = False
    (setting,) = sweep.sweep(Retrieved(torch.full((8,), 0.5).log(), distances, matches), [2], [5.0])
    # ln((1 - l) / 2) + 7 ln((1 + l) / 2) is highest at l = 3/4
    assert setting.knn_lambda == pytest.approx(0.75)
    assert setting.perplexity == pytest.approx((0.125 * 0.875**7) ** (-1 / 8))


def test_sweep_covers_the_grid_and_never_loses_to_the_language_model():
    retrieved = make_retrieved(seed=4)
    settings = sweep.sweep(retrieved, [1, 8], [0.5, 2.0, 9.0])
    assert sorted((s.k, s.temperature) for s in settings) == [
        (k, temperature) for k in (1, 8) for temperature in (0.5, 2.0, 9.0)
    ]
    for setting in settings:
        log_p_knn = log_p_knn_one_at_a_time(retrieved, setting.k, setting.temperature).double()
        mixed = (1 - setting.knn_lambda) * retrieved.log_p_lm.double().exp()
        mixed += setting.knn_lambda * log_p_knn.exp()
        assert setting.perplexity == pytest.approx(math.exp(-mixed.log().mean()), rel=1e-5)
        assert setting.perplexity <= perplexity(retrieved.log_p_lm) * (1 + 1e-6)


@pytest.mark.parametrize("temperature", [0.03, 1.0, 40.0])
def test_every_lambda_equals_one_evaluation_at_a_time(temperature):
    retrieved = make_retrieved(seed=8)
    lambdas = [0.0, 0.1, 0.25, 0.9999]
    settings = sweep.sweep(retrieved, [1, 5, 12], [temperature], lambdas)
    assert [(s.k, s.knn_lambda) for s in settings] == [(k, x) for k in (1, 5, 12) for x in lambdas]
    for setting in settings:
        log_p_knn = log_p_knn_one_at_a_time(retrieved, setting.k, temperature)
        mixed = interpolate(retrieved.log_p_lm, log_p_knn, setting.knn_lambda)
        assert setting.perplexity == pytest.approx(perplexity(mixed), rel=1e-6)


def test_lambda_1_of_matches_far_behind_the_nearest():
    """Their weights are 0 in float32, their probability is not."""
    distances = torch.tensor([[0.0, 300.0, 500.0], [0.0, 1.0, 2.0]])
    matches = torch.tensor([[False, True, False], [True, False, True]])
    retrieved = Retrieved(torch.tensor([-3.0, -2.0]), distances, matches)
    one, three = sweep.sweep(retrieved, [1, 3], [1.0], [1.0])
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
    ],
)
def test_a_grid_that_cannot_be_is_refused(ks, temperatures, lambdas, message):
    with pytest.raises(UserError, match=message):
        sweep.sweep(make_retrieved(seed=0), ks, temperatures, lambdas)


def test_temperatures_are_refined_around_the_best():
    retrieved = make_scaled(1.0)
    powers = [2.0**exponent for exponent in range(-6, 11)]
    coarse = sweep.best(sweep.sweep(retrieved, [4, 12], powers))
    settings = sweep.sweep(retrieved, [4, 12])
    assert sweep.best(settings).perplexity <= coarse.perplexity
    tried = sorted({setting.temperature for setting in settings})
    assert set(powers) < set(tried)
    best = tried.index(sweep.best(settings).temperature)
    assert tried[best + 1] / tried[best - 1] == pytest.approx(2**0.5, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e7])
def test_the_range_of_temperatures_follows_the_distances(scale):
    """The best temperature is found on any scale of the distances."""
    scaled = make_scaled(scale)
    settings = sweep.sweep(scaled, [12])
    lowest = sweep.best(settings)
    assert not sweep.temperature_at_an_end(settings)
    everywhere = [scale * 2.0**exponent for exponent in range(-8, 9)]
    reference = sweep.best(sweep.sweep(scaled, [12], everywhere))
    assert lowest.perplexity <= reference.perplexity * (1 + 1e-6)


def test_a_best_temperature_at_an_end_is_told():
    retrieved = make_retrieved(seed=9)
    assert sweep.temperature_at_an_end(sweep.sweep(retrieved, [12], [1e-3, 2e-3]))
    assert not sweep.temperature_at_an_end(sweep.sweep(retrieved, [12], [1.0]))


def test_settings_can_be_typed_as_flags():
    for setting in sweep.sweep(make_retrieved(seed=5), [4, 12]):
        assert float(f"{setting.knn_lambda:.4f}") == setting.knn_lambda < 1.0
        assert float(f"{setting.temperature:.6g}") == setting.temperature


def test_best_of_each_k():
    settings = [Setting(2, 1.0, 0.1, 9.0), Setting(1, 1.0, 0.2, 8.0), Setting(2, 3.0, 0.3, 7.0)]
    assert sweep.best_of_each_k(settings) == [settings[1], settings[2]]
    assert sweep.best(settings) == settings[2]


def test_perplexity_of_a_uniform_distribution_is_its_size():
    assert perplexity(np.full(7, -math.log(50))) == pytest.approx(50)
    assert perplexity(torch.log(torch.tensor([0.5, 0.125]))) == pytest.approx(4)
    assert perplexity(np.zeros(3)) == 1.0


def test_one_impossible_token_makes_perplexity_infinite():
    assert perplexity(np.array([0.0, -INF])) == INF


def test_recall_counts_ids_in_any_order():
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall_at_k(exact[:, ::-1], exact) == 1.0
    assert recall_at_k(exact + 10, exact) == 0.0
    assert recall_at_k([[4, 1, 9, 10], [-1, -1, -1, -1]], exact) == 0.25


def test_recall_is_a_share():
    chance = np.random.default_rng(7)
    for _ in range(50):
        found, exact = (
            np.stack([chance.choice(12, 5, replace=False) for _ in range(3)]) for _ in range(2)
        )
        expected = np.mean([[i in row for i in wanted] for row, wanted in zip(found, exact)])
        assert 0.0 <= recall_at_k(found, exact) <= 1.0
        assert recall_at_k(found, exact) == pytest.approx(expected)
