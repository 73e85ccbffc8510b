"""Buckets and the rule of two numbers, against loops and grids in float64."""

import math

import numpy as np
import pytest
import torch

from fairseq_knnlm.gating.gates import Buckets, Nest
from fairseq_knnlm.tuning.fit_gate import fit_buckets, fit_nest
from fairseq_knnlm.tuning.gate_data import GateData, folds_of, mixture, weigh

K, TEMPERATURE = 8, 2.0


def make_data(count=4000, with_cache=False, seed=0, useful=True):
    """Tokens whose p_knn is better than p_lm the nearer the nearest neighbour is."""
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.gamma(2.0, 5.0, size=(count, K)), axis=1)
    ratio = distances[:, 0] / distances[:, -1] if useful else rng.random(count)
    p_lm = rng.beta(1, 4, size=count)
    p_knn = np.where(rng.random(count) < ratio, 0.0, rng.beta(2, 2, size=count))
    columns = [p_lm, p_knn, *([rng.beta(0.3, 4, size=count)] if with_cache else [])]
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.stack(columns, axis=1))
    return GateData(
        torch.from_numpy(log_probs).float(),
        torch.from_numpy(distances).float(),
        torch.zeros(count, K, dtype=torch.long),
        None,
        folds_of(count, np.arange(0, count, 100)),
    )


def expectation_maximisation(probabilities, steps=1000):
    """The weights of one bucket, by a plain loop in float64."""
    weights = np.full(probabilities.shape[1], 1.0 / probabilities.shape[1])
    for _ in range(steps):
        shares = weights * probabilities
        weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    return weights


@pytest.mark.parametrize("with_cache", [False, True])
def test_buckets_are_equally_large_and_their_weights_those_of_em(with_cache):
    data = make_data(with_cache=with_cache)
    gate = fit_buckets(data, K, TEMPERATURE)
    assert gate.measure == "ratio"
    distances = data.distances.double().numpy()
    quality = (distances[:, 0] / distances[:, -1]).astype(np.float32)
    edges = np.sort(quality)[np.arange(1, 32) * len(quality) // 32]
    np.testing.assert_allclose(gate.edges, edges, rtol=1e-6)
    for bucket, (low, high) in enumerate(zip([-1.0, *edges], [*edges, 2.0])):
        inside = (quality >= low) & (quality < high)
        assert inside.sum() == pytest.approx(len(quality) / 32, abs=1)
        probabilities = data.log_probs[inside].double().exp().numpy()
        expected = expectation_maximisation(probabilities)
        found = [gate.knn_lambdas[bucket], *([gate.cache_lambdas[bucket]] if with_cache else [])]
        found = np.array([1.0 - sum(map(float, found)), *map(float, found)])
        reached, by_em = (np.log(probabilities @ w).mean() for w in (found, expected))
        assert by_em - 1e-6 < reached < by_em + 1e-3
        if expected[0] > 0.1:  # near the edge EM takes many steps
            np.testing.assert_allclose(found, expected, atol=5e-3)


def test_weights_are_those_of_each_tokens_bucket():
    gate = Buckets(
        3, 1.0, "nearest", torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.2, 0.1]), torch.zeros(3)
    )
    nearest = torch.tensor([0.0, 0.99, 1.0, 3.9, 4.0, 9.0, math.inf])
    distances = nearest.unsqueeze(1) + torch.arange(3)
    found = gate.weigh(None, distances, torch.zeros(7, 3, dtype=torch.long))
    expected = torch.tensor([0.5, 0.5, 0.2, 0.2, 0.1, 0.1, 0.1])
    assert torch.equal(found.knn_lambda, expected) and not found.cache.any()


def test_buckets_gain_and_never_lose_where_quality_says_nothing():
    constant = Buckets(K, TEMPERATURE, "ratio", torch.empty(0), torch.tensor([0.0]), torch.zeros(1))
    for useful, least in ((True, 0.01), (False, -0.005)):
        data, other = (make_data(useful=useful, seed=seed) for seed in (1, 2))
        weights = expectation_maximisation(data.log_probs.double().exp().numpy())
        constant.knn_lambdas = torch.tensor(weights[1:]).float()
        by_gate, by_one = (
            mixture(weigh(gate, other), other.log_probs).mean().item()
            for gate in (fit_buckets(data, K, TEMPERATURE), constant)
        )
        assert by_gate - by_one > least


def test_a_bucket_in_which_the_model_is_never_needed_leaves_it_something():
    log_probs = torch.tensor([[0.1, 0.5]]).log().repeat(60, 1)
    data = make_data(60)._replace(log_probs=log_probs)
    gate = fit_buckets(data, K, TEMPERATURE)
    assert gate.knn_lambdas.tolist() == pytest.approx([60 / 61])


def test_a_bucket_without_any_neighbour_is_the_models():
    data = make_data(400)
    data.log_probs[:200, 1], data.distances[:200] = math.nan, math.inf
    gate = fit_buckets(data, K, TEMPERATURE)
    assert gate.weigh(None, data.distances[:1], None).knn_lambda.item() < 1
    assert mixture(weigh(gate, data), data.log_probs).isfinite().all()


@pytest.mark.parametrize("with_cache", [False, True])
def test_the_rule_has_the_best_of_a_grid(with_cache):
    data = make_data(with_cache=with_cache)
    gate = fit_nest(data, K, TEMPERATURE)
    found = mixture(weigh(gate, data), data.log_probs).double().mean().item()
    probabilities = data.log_probs.double().exp().numpy()
    ratio = (data.distances[:, 0] / data.distances[:, -1]).double().numpy()
    best = -math.inf
    for alpha in np.linspace(-0.5, 1.5, 21):
        for tau in 0.02 * 2.0 ** np.arange(8):
            rest = 1 / (1 + np.exp(-(ratio - alpha) / tau))
            for share in np.linspace(0, 0.5, 11) if with_cache else [0.0]:
                columns = [rest * (1 - share), 1 - rest, *([rest * share] if with_cache else [])]
                mixed = (np.stack(columns, axis=1) * probabilities).sum(axis=1)
                best = max(best, np.log(mixed).mean())
    assert best - 1e-4 < found < best + 0.01


def test_the_rule_never_leaves_the_model_nothing():
    gate = Nest(2, 1.0, alpha=0.9, tau=1e-4, cache_share=0.0)
    weights = gate.weigh(None, torch.tensor([[0.0, 5.0]]), None)
    assert 0.999 < weights.knn_lambda.item() < 1


def test_folds_are_whole_documents_of_about_as_many_tokens():
    starts = np.array([0, 10, 400, 420, 700, 990, 1000])
    folds = folds_of(1300, starts)
    for start, stop in zip(starts, [*starts[1:], 1300]):
        assert len(set(folds[start:stop])) == 1
    assert np.bincount(folds).tolist() == [390, 310, 300, 290, 10] or max(np.bincount(folds)) == 390
    assert len(set(folds_of(9000, [0, 4000]))) == 5  # blocks, for want of documents
    assert len(folds_of(3, [0])) == 3
