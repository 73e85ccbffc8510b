"""log p_knn, against numbers on paper and float64 numpy."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability.knn import knn_log_probs, knn_weights, vocabulary_log_probs
from fairseq_knnlm.probability.mixture import mix

INF = math.inf


def by_numpy(distances, values, targets, temperature):
    """Eq. 2 of the paper as it is written, in float64."""
    weights = np.exp(-distances.numpy().astype(np.float64) / temperature)
    matches = values.numpy() == targets.numpy()[:, None]
    with np.errstate(divide="ignore"):
        return np.log((weights * matches).sum(axis=1) / weights.sum(axis=1))


def random_neighbors(seed, count=50, k=20, vocabulary_size=9):
    rng = torch.Generator().manual_seed(seed)
    distances = (30 * torch.rand(count, k, generator=rng)).sort(dim=1).values
    values = torch.randint(vocabulary_size, (count, k), generator=rng)
    targets = torch.randint(vocabulary_size, (count,), generator=rng)
    return distances, values, targets


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_numbers_on_paper(temperature):
    # weights 1, 1/2, 1/4: 7 has 5/7 of them, 8 has 2/7, 9 none
    distances = temperature * torch.tensor([[0.0, math.log(2), math.log(4)]] * 3)
    values = torch.tensor([[7, 8, 7]] * 3)
    result = knn_log_probs(distances, values, torch.tensor([7, 8, 9]), temperature)
    assert result.exp().tolist() == pytest.approx([5 / 7, 2 / 7, 0.0])
    assert result[2] == -INF


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_equals_float64(temperature):
    neighbors = random_neighbors(seed=1)
    result = knn_log_probs(*neighbors, temperature)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, by_numpy(*neighbors, temperature), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature, expected", [(1e-300, 1.0), (1e300, 0.5)])
def test_extreme_temperatures_are_their_limits(temperature, expected):
    distances = torch.tensor([[0.5, 2.0, math.inf]])
    result = knn_log_probs(
        distances, torch.tensor([[7, 8, 0]]), torch.tensor([7]), temperature=temperature
    )
    assert result.exp().item() == pytest.approx(expected)


def test_distribution_over_the_vocabulary_sums_to_1():
    distances, values, _ = random_neighbors(seed=2, vocabulary_size=9)
    distances[:, 15:] = INF
    every = [knn_log_probs(distances, values, torch.full((50,), y), 5.0) for y in range(9)]
    assert torch.stack(every).exp().sum(dim=0).tolist() == pytest.approx([1.0] * 50)


def test_order_of_neighbours_and_ties_do_not_matter():
    distances, values, targets = random_neighbors(seed=3)
    distances = distances.round()  # many ties
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        knn_log_probs(distances[:, shuffled], values[:, shuffled], targets),
        knn_log_probs(distances, values, targets),
    )


@pytest.mark.parametrize("shift", [-20000.0, 20000.0])
def test_only_differences_of_distances_matter(shift):
    distances, values, targets = random_neighbors(seed=5)
    distances = distances.round()
    torch.testing.assert_close(
        knn_log_probs(distances + shift, values, targets), knn_log_probs(distances, values, targets)
    )


def test_far_targets_keep_a_finite_probability():
    result = knn_log_probs(torch.tensor([[0.0, 500.0]]), torch.tensor([[1, 2]]), torch.tensor([2]))
    assert result.item() == pytest.approx(-500.0)


def test_a_missing_neighbour_counts_for_nothing():
    # missing neighbours carry the value 0, which may be somebody's target
    distances, values = torch.tensor([[1.0, 1.0, INF]] * 2), torch.tensor([[5, 6, 0]] * 2)
    result = knn_log_probs(distances, values, torch.tensor([5, 0]))
    assert result[0].exp().item() == pytest.approx(0.5)
    assert result[1] == -INF


def test_a_query_without_neighbours_is_left_to_the_language_model():
    distances, values = torch.full((1, 3), INF), torch.zeros(1, 3, dtype=torch.long)
    # Missing neighbours carry the value 0, which is no neighbour's here.
    for target in (0, 1):
        nothing = knn_log_probs(distances, values, torch.tensor([target]))
        assert nothing.isnan().tolist() == [True]
        log_p_lm = torch.tensor([math.log(0.5)])
        assert torch.equal(mix(log_p_lm, nothing, knn_lambda=0.25), log_p_lm)
    for every in (vocabulary_log_probs(distances, values, 4), nothing.expand(1, 4)):
        log_p_lm = torch.full((1, 4), 0.25).log()
        assert every.isnan().all()
        assert torch.equal(mix(log_p_lm, every, knn_lambda=0.25), log_p_lm)


@pytest.mark.parametrize(
    "distances, values, targets", [((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((3,), (3,), ())]
)
def test_shapes_that_do_not_fit_are_named(distances, values, targets):
    with pytest.raises(UserError) as caught:
        knn_log_probs(
            torch.zeros(distances),
            torch.zeros(values, dtype=torch.long),
            torch.zeros(targets, dtype=torch.long),
        )
    assert all(str(shape) in str(caught.value) for shape in (distances, values, targets))


def test_shapes_that_do_not_fit_a_vocabulary_are_named():
    with pytest.raises(UserError, match=r"of one shape \(N, k\), got \(2, 3\), \(2, 4\)"):
        vocabulary_log_probs(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.long), 5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(UserError, match=f"temperature must be > 0, got {temperature}"):
        knn_log_probs(*random_neighbors(seed=0), temperature)


def test_half_precision_gives_float32():
    half = torch.tensor([-1.0], dtype=torch.float16)
    assert knn_log_probs(half[None], torch.tensor([[1]]), torch.tensor([1])).dtype == torch.float32


def test_far_targets_of_many_queries():
    """Some rows have matches that are near, others only such whose weights are 0 in float32."""
    distances, values, targets = random_neighbors(seed=7)
    distances[::2] *= 100
    result = knn_log_probs(distances, values, targets)
    every = vocabulary_log_probs(distances, values, 9).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert (result < -90).any() and (result > -1).any() and result.isneginf().any()
    torch.testing.assert_close(result, every, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_every_token_of_the_vocabulary_equals_float64(temperature):
    """Also where neighbours are missing, and where all of a query are far away."""
    distances, values, _ = random_neighbors(seed=8)
    distances, exact = distances.round(), distances.round()
    distances[:, 15:], exact[:, 15:], values[:, 15:] = INF, INF, 0
    distances[::3] += 60000
    result = vocabulary_log_probs(distances, values, 9, temperature)
    assert result.dtype == torch.float32
    for token in range(9):
        expected = by_numpy(exact, values, torch.full((50,), token), temperature)
        np.testing.assert_allclose(result[:, token], expected, rtol=1e-5, atol=1e-5)
    # only missing neighbours have the token 0 here
    values[:, :15].clamp_(min=1)
    assert vocabulary_log_probs(distances, values, 9, temperature)[:, 0].isneginf().all()


def test_a_token_that_all_neighbours_have_is_certain():
    distances = random_neighbors(seed=9, count=2000)[0]
    result = vocabulary_log_probs(distances, torch.full_like(distances, 3).long(), 5)[:, 3]
    assert (result <= 0).all() and result.min() > -1e-6


def test_distances_and_values_stay_as_they_are():
    distances, values, targets = random_neighbors(seed=10)
    before = distances.clone(), values.clone()
    knn_log_probs(distances, values, targets)
    vocabulary_log_probs(distances, values, 9)
    assert torch.equal(distances, before[0]) and torch.equal(values, before[1])


def test_weights_of_few_neighbors():
    distances = torch.tensor([[1.0, 3.0, INF], [INF, INF, INF], [1e30, 1e30, INF]])
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
    distances[:, 7:] = INF
    exact = np.exp(-distances.double().numpy())
    distances += torch.tensor([[0.0], [60000.0], [-60000.0]] * 2)
    weights = knn_weights(distances)
    assert weights.dtype == knn_weights(distances.half()).dtype == torch.float32
    np.testing.assert_allclose(weights, exact / exact.sum(axis=1, keepdims=True), rtol=1e-5)
