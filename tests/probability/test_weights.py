"""The best weights of a mixture, against expectation-maximisation."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability.weights import best_weights

NAN = float("nan")


@pytest.mark.parametrize("seed", range(4))
def test_best_weights_against_expectation_maximisation(seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.random((3, 2000)) ** np.array([[1.0], [2.0], [1.0 + 2 * seed]])
    probabilities[1:][rng.random((2, 2000)) < 0.5] = 0.0
    expected = np.full(3, 1 / 3)
    for _ in range(5000):
        expected *= (probabilities / (expected @ probabilities)).mean(axis=1)
    with np.errstate(divide="ignore"):
        log_probs = torch.from_numpy(np.log(probabilities))
    assert best_weights(log_probs) == pytest.approx(expected, abs=1e-4)


def test_best_weights_at_the_corners():
    good, bad = torch.full((10,), -1.0), torch.full((10,), -math.inf)
    assert best_weights([good, bad]).tolist() == [1.0, 0.0]
    twins = best_weights([good, good, good - 1.0])
    assert twins[2] == 0.0 and twins.sum() == pytest.approx(1.0)
    unknown = torch.full((10,), math.nan)
    with pytest.raises(UserError, match="no token"):
        best_weights([good, unknown])


@pytest.mark.parametrize("seed", range(6))
def test_best_weights_of_two_against_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, 3000)) ** [[1.0], [0.3 + seed]]
    second[rng.random(3000) < 0.2 * seed] = 0.0
    with np.errstate(divide="ignore"):
        result = best_weights([torch.from_numpy(np.log(each)) for each in (first, second)])
        lambdas = np.linspace(0, 1, 4001)[:, None]
        likelihood = np.log((1 - lambdas) * first + lambdas * second).mean(axis=1)
    assert result[1] == pytest.approx(lambdas[likelihood.argmax(), 0], abs=3e-4)
    assert result.sum() == 1.0


@pytest.mark.parametrize("undefined", [(1,), (2,), (1, 2)])
def test_best_weights_leave_out_rows_of_nan(undefined):
    rng = torch.Generator().manual_seed(2)
    log_probs = torch.rand(3, 500, generator=rng).log()
    expected = best_weights(log_probs)
    rows = torch.rand(3, 200, generator=rng).log()
    for first, number in enumerate(undefined):
        rows[number, first :: len(undefined)] = NAN
    assert best_weights(torch.cat([rows, log_probs], dim=1)) == pytest.approx(expected)


def test_best_weights_of_a_mixture_are_its_weights():
    """Of many draws from a mixture, maximum likelihood finds it again."""
    rng = np.random.default_rng(5)
    distributions, weights = rng.dirichlet(np.full(20, 0.3), size=4), [0.4, 0.3, 0.2, 0.1]
    draws = rng.choice(20, size=200_000, p=weights @ distributions)
    log_probs = torch.from_numpy(np.log(distributions[:, draws]))
    assert best_weights(log_probs) == pytest.approx(weights, abs=0.01)


def test_best_weights_of_probabilities_far_apart():
    first, second = torch.tensor([-4.0, -4000.0, -1.0]), torch.tensor([-4000.0, -1.0, -5000.0])
    assert best_weights([first, second]) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("shapes", [[(3,)], [(3,), (4,)], [(3, 2), (3, 2)], []])
def test_best_weights_of_other_shapes_are_refused(shapes):
    with pytest.raises(UserError, match="two or more of one shape"):
        best_weights([torch.zeros(shape) for shape in shapes])


def random_distributions(rng, number, count=400):
    """Probabilities of tokens by some models: good and bad ones, twins, some that have zeros."""
    sharpness = 10.0 ** rng.uniform(-1.5, 1.0, size=(number, 1))
    probabilities = rng.random((number, count)) ** sharpness
    probabilities[1:][rng.random((number - 1, count)) < 0.4 * rng.random()] = 0.0
    if number > 3 and rng.random() < 0.3:
        probabilities[3] = probabilities[1]
    return probabilities


def assert_best(probabilities):
    with np.errstate(divide="ignore"):
        weights = best_weights([torch.from_numpy(np.log(each)) for each in probabilities])
    assert (
        weights.dtype == np.float64 and (weights >= 0).all() and weights.sum() == pytest.approx(1)
    )
    means = (probabilities / (weights @ probabilities)).mean(axis=1)
    assert (means <= 1 + 1e-6).all()
    assert means[weights > 0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("seed", range(12))
def test_no_direction_leads_upwards_from_the_best_weights(seed, number):
    """At the maximum the mean of p_j / mixture is 1 where a weight is positive, else at most 1."""
    assert_best(random_distributions(np.random.default_rng([seed, number]), number))


@pytest.mark.parametrize("seed", [8, 25, 29, 68, 143, 149])
def test_nor_where_most_weights_are_0(seed):
    """Few tokens and many models, some of which are worth something only beside others."""
    rng = np.random.default_rng(seed)
    number, count = int(rng.integers(2, 7)), int(rng.choice([3, 5, 16, 17, 31, 40, 100, 400]))
    sharpness = 10.0 ** rng.uniform(-2, 1 + seed % 2, size=(number, 1))
    probabilities = np.maximum(rng.random((number, count)) ** sharpness, 1e-120)
    probabilities[1:][rng.random((number - 1, count)) < 0.9 * rng.random()] = 0.0
    assert_best(probabilities)


@pytest.mark.parametrize("number", [2, 3])
def test_a_first_that_nothing_is_gained_from_gets_nothing(number):
    rng = np.random.default_rng(3)
    others = torch.from_numpy(np.log(rng.random((number - 1, 200)) + 0.1))
    weights = best_weights([others.amin(dim=0) - 3.0, *others])
    assert weights[0] < 1e-6 and weights.sum() == pytest.approx(1.0)


def test_the_distributions_stay_as_they_are():
    log_probs = torch.rand(3, 100, generator=torch.Generator().manual_seed(4)).log()
    log_probs[1, 3] = NAN
    before = log_probs.clone()
    best_weights(log_probs)
    assert torch.equal(log_probs.nan_to_num(), before.nan_to_num())
