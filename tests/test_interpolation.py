"""log p_knn and the mixture, against numbers on paper and float64 numpy."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.interpolation import interpolate, knn_log_probs

INF = math.inf


def by_numpy(distances, values, targets, temperature):
    """Eq. 2 of the paper as it is written, in float64."""
    weights = np.exp(-distances.numpy().astype(np.float64) / temperature)
    matches = values.numpy() == targets.numpy()[:, None]
    with np.errstate(divide="ignore"):
        return np.log((weights * matches).sum(axis=1) / weights.sum(axis=1))


def random_neighbors(seed, count=50, k=20, vocabulary_size=9):
    chance = torch.Generator().manual_seed(seed)
    distances = (30 * torch.rand(count, k, generator=chance)).sort(dim=1).values
    values = torch.randint(vocabulary_size, (count, k), generator=chance)
    targets = torch.randint(vocabulary_size, (count,), generator=chance)
    return distances, values, targets


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_numbers_on_paper(temperature):
    # weights 1, 1/2, 1/4: 7 has 5/7 of them, 8 has 2/7, 9 none
    distances = temperature * torch.tensor([[0.0, math.log(2), math.log(4)]] * 3)
    values = torch.tensor([[7, 8, 7]] * 3)
    found = knn_log_probs(distances, values, torch.tensor([7, 8, 9]), temperature)
    assert found.exp().tolist() == pytest.approx([5 / 7, 2 / 7, 0.0])
    assert found[2] == -INF


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_equals_float64(temperature):
    neighbors = random_neighbors(seed=1)
    found = knn_log_probs(*neighbors, temperature)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, by_numpy(*neighbors, temperature), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature, expected", [(1e-300, 1.0), (1e300, 0.5)])
def test_extreme_temperatures_are_their_limits(temperature, expected):
    distances = torch.tensor([[0.5, 2.0, math.inf]])
    found = knn_log_probs(
        distances, torch.tensor([[7, 8, 0]]), torch.tensor([7]), temperature=temperature
    )
    assert found.exp().item() == pytest.approx(expected)


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
    found = knn_log_probs(torch.tensor([[0.0, 500.0]]), torch.tensor([[1, 2]]), torch.tensor([2]))
    assert found.item() == pytest.approx(-500.0)


def test_a_missing_neighbour_counts_for_nothing():
    # missing neighbours carry the value 0, which may be somebody's target
    distances, values = torch.tensor([[1.0, 1.0, INF]] * 2), torch.tensor([[5, 6, 0]] * 2)
    found = knn_log_probs(distances, values, torch.tensor([5, 0]))
    assert found[0].exp().item() == pytest.approx(0.5)
    assert found[1] == -INF


def test_a_query_without_neighbours_is_left_to_the_language_model():
    nothing = knn_log_probs(
        torch.full((1, 3), INF), torch.zeros(1, 3, dtype=torch.long), torch.tensor([0])
    )
    assert nothing.tolist() == [-INF]
    mixed = interpolate(torch.tensor([math.log(0.5)]), nothing, 0.25)
    assert mixed.exp().item() == pytest.approx(0.75 * 0.5)


def test_mixture_on_paper():
    mixed = interpolate(torch.tensor([0.5, 0.1]).log(), torch.tensor([0.2, 0.9]).log(), 0.25)
    assert mixed.exp().tolist() == pytest.approx([0.425, 0.3])


@pytest.mark.parametrize("knn_lambda", [1e-6, 0.3, 0.999])
def test_mixture_equals_float64_and_sums_to_1(knn_lambda):
    chance = np.random.default_rng(6)
    p_lm, p_knn = chance.dirichlet(np.full(30, 0.2), size=2)
    p_knn[:10] = 0.0
    p_knn /= p_knn.sum()
    with np.errstate(divide="ignore"):
        logs = [torch.from_numpy(np.log(p)).float() for p in (p_lm, p_knn)]
    mixed = interpolate(*logs, knn_lambda).double().exp()
    np.testing.assert_allclose(mixed, (1 - knn_lambda) * p_lm + knn_lambda * p_knn, rtol=1e-5)
    assert mixed.sum().item() == pytest.approx(1.0)


def test_lambda_0_and_1_are_exact():
    log_p_lm, log_p_knn = (
        torch.tensor([-1.234567, -INF, -2.0]),
        torch.tensor([-INF, -7.654321, 0.0]),
    )
    assert torch.equal(interpolate(log_p_lm, log_p_knn, 0.0), log_p_lm)
    assert torch.equal(interpolate(log_p_lm, log_p_knn, 1.0), log_p_knn)


def test_what_neither_gives_is_impossible():
    assert interpolate(torch.tensor([-INF]), torch.tensor([-INF]), 0.5).tolist() == [-INF]


def test_half_precision_is_mixed_in_float32():
    half = torch.tensor([-1.0], dtype=torch.float16)
    for knn_lambda in (0.0, 0.5, 1.0):
        assert interpolate(half, half, knn_lambda).dtype == torch.float32
    assert knn_log_probs(half[None], torch.tensor([[1]]), torch.tensor([1])).dtype == torch.float32


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


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(UserError, match=f"temperature must be > 0, got {temperature}"):
        knn_log_probs(*random_neighbors(seed=0), temperature)


@pytest.mark.parametrize("knn_lambda", [-0.1, 1.1, math.nan])
def test_lambda_must_be_a_weight(knn_lambda):
    with pytest.raises(UserError, match=rf"lambda must be in \[0, 1\], got {knn_lambda}"):
        interpolate(torch.zeros(1), torch.zeros(1), knn_lambda)
