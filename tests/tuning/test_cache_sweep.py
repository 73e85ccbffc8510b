"""The grid of the continuous cache: through the commands, and by itself."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.commands import call, evaluate
from helpers.oracle import one_token_at_a_time

from fairseq_knnlm.cli import tune
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.tuning.cache_sweep import CacheSweep
from fairseq_knnlm.tuning.grid import CacheGridPoint, best
from fairseq_knnlm.tuning.tuning_data import TuningData

SIZE = 50


@pytest.fixture
def tuned(data, checkpoints, tmp_path):
    def tuned_with(*flags):
        output = tmp_path / "tuned.json"
        call(
            tune.main, data, "--path", checkpoints["adaptive"], "--tokens-per-sample", 32, "--cpu",
            "--log-format", "none", "--num-workers", 0, "--knn-output", output,
            "--knn-cache-size", SIZE, *flags,
        )  # fmt: skip
        return json.loads(output.read_text())

    return tuned_with


def cache_flags(setting):
    return [
        word
        for name in ("size", "theta", "lambda")
        for word in (f"--knn-cache-{name}", setting[f"cache_{name}"])
    ]


@pytest.mark.parametrize("reset", ["none", "document"])
def test_tuned_alone(data, checkpoints, tuned, reset):
    result = tuned("--report-subset", "test", "--knn-cache-reset", reset)
    setting, reported = result["best_cache"], result["reported_on"]
    assert result["tuned_on"]["cache_perplexity"] == pytest.approx(setting["perplexity"])
    assert setting["perplexity"] < result["tuned_on"]["base_perplexity"]
    alone = evaluate(
        data, checkpoints["adaptive"], *cache_flags(setting), "--knn-cache-reset", reset
    )
    assert reported["cache_perplexity"] == pytest.approx(alone, rel=1e-5)
    for name in ("cache_theta", "cache_lambda"):
        for factor in (0.7, 1.4):
            other = {**setting, name: setting[name] * factor}
            flags = [*cache_flags(other), "--knn-cache-reset", reset, "--gen-subset", "valid"]
            assert evaluate(data, checkpoints["adaptive"], *flags) >= setting["perplexity"] - 1e-3


def test_tuned_with_neighbours(data, checkpoints, datastores, tuned, tmp_path):
    neighbors = ["--knn-neighbors", tmp_path / "neighbors.npz"]
    flags = ["--knn-datastore", datastores["adaptive"], "--knn-k", 16, *neighbors]
    result = tuned(*flags, "--report-subset", "test")
    reported, setting = result["reported_on"], result["best_knn_cache"]
    assert reported["knn_cache_change_from_knn"]["value"] == pytest.approx(
        reported["knn_cache_perplexity"] / reported["knn_perplexity"] - 1
    )
    lowest = min(result["tuned_on"][f"{name}_perplexity"] for name in ("base", "cache", "knn"))
    assert setting["perplexity"] <= lowest
    by_flags = evaluate(
        data, checkpoints["adaptive"], "--knn-datastore", datastores["adaptive"],
        "--knn-k", result["best"]["k"], "--knn-temperature", result["best"]["temperature"],
        "--knn-lambda", setting["knn_lambda"], *cache_flags(setting),
    )  # fmt: skip
    as_tuned = evaluate(
        data, checkpoints["adaptive"], "--knn-datastore", datastores["adaptive"], "--knn-tuned"
    )
    assert by_flags == as_tuned == pytest.approx(reported["knn_cache_perplexity"], rel=1e-5)
    with pytest.raises(UserError, match="--knn-cache-size is 3"):
        evaluate(
            data, checkpoints["adaptive"], "--knn-datastore", datastores["adaptive"],
            "--knn-tuned", "--knn-cache-size", 3,
        )  # fmt: skip
    again = tuned(*flags, "--report-subset", "test")
    assert again["best_knn_cache"] == setting and again["reported_on"] == reported


def test_neighbours_that_were_kept_without_states(tuned, datastores, tmp_path):
    path = tmp_path / "neighbors.npz"
    flags = ["--knn-datastore", datastores["adaptive"], "--knn-k", 4, "--knn-neighbors", path]
    tuned(*flags, "--knn-cache-size", 0)
    with pytest.raises(UserError, match="queries was null"):
        tuned(*flags)


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--knn-cache-size", 0], "nothing to tune"),
        (
            ["--knn-datastore", "x", "--knn-cache-size", 0, "--knn-grid-cache-size", 3],
            "need --knn-c",
        ),
        (["--knn-grid-cache-size", "3,51"], "in [1, 50]"),
        (["--knn-grid-cache-theta", "-1"], "--knn-grid-cache-theta"),
        (["--knn-grid-lambda", "0.5"], "computed together"),
        (["--report", "somewhere"], "--knn-datastore is missing"),
    ],
    ids=str,
)
def test_grids_that_cannot_be(tuned, flags, part):
    with pytest.raises(UserError) as error:
        tuned(*flags)
    assert part in str(error.value)


def make_data(count=240, seed=5):
    """A text of documents whose near states have the same tokens, and two models of it."""
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(6, (count,), generator=rng)
    states = torch.randn(count, 8, generator=rng)
    states += 2 * torch.nn.functional.one_hot(targets, 8) * torch.rand(count, 1, generator=rng)
    log_p_lm, log_p_knn = 3 * torch.rand(2, count, generator=rng).log()
    log_p_knn[::3], log_p_knn[5::50] = -math.inf, math.nan
    starts = np.array([0, 30, 31, 200])
    return TuningData(log_p_lm, None, None, targets, starts, None, states), log_p_knn


def mixed(weights, log_probs):
    """Probabilities of a mixture, float64; what is not defined leaves its weight to the others."""
    probabilities = np.exp(np.stack([np.asarray(each, dtype=np.float64) for each in log_probs]))
    weights = np.where(np.isnan(probabilities), 0.0, np.array(weights)[:, None])
    return (weights * np.nan_to_num(probabilities)).sum(axis=0) / weights.sum(axis=0)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("keep_apart", [False, True])
def test_every_point_of_a_grid_equals_one_evaluation(metric, keep_apart):
    (data, log_p_knn), sizes, thetas = make_data(), [40, 15], [0.0, 0.7, 2.0]
    sweep = CacheSweep(data, metric, keep_apart, log_p_knn)
    sweep.run(sizes, thetas)
    resets = data.document_starts if keep_apart else ()
    grid = [(size, theta) for theta in thetas for size in sizes]
    for points in (sweep.alone, sweep.with_knn):
        assert [(point.cache_size, point.cache_theta) for point in points] == grid
    for alone, all_three in zip(sweep.alone, sweep.with_knn):
        log_p_cache = one_token_at_a_time(
            data.queries, data.targets, alone.cache_size, alone.cache_theta, metric, resets
        )
        logs = data.log_p_lm, log_p_knn, log_p_cache
        assert alone.knn_lambda == 0 < min(alone.cache_lambda, all_three.knn_lambda)
        for point in (alone, all_three):
            weights = point.knn_lambda, point.cache_lambda
            likelihood = np.log(mixed([1 - sum(weights), *weights], logs)).mean()
            assert point.perplexity == pytest.approx(math.exp(-likelihood), rel=1e-5)
        assert all_three.perplexity < alone.perplexity
        for other in np.linspace(0.0, 0.95, 20):
            likelihood = np.log(mixed([1 - other, 0.0, other], logs)).mean()
            assert alone.perplexity <= math.exp(-likelihood) * (1 + 1e-3)


def test_without_neighbours_there_are_no_points_with_them():
    sweep = CacheSweep(make_data()[0], "ip", keep_apart=False)
    sweep.run([5], [1.0])
    assert len(sweep.alone) == 1 and sweep.with_knn == []


def tried_thetas(points):
    return sorted({point.cache_theta for point in points})


@pytest.mark.parametrize(
    "metric, variance, middle", [("ip", 4.0, 1 / 4), ("l2", 4.0, 1 / 8), ("l2", 0.25, 2.0)]
)
def test_thetas_are_powers_of_two_about_the_variance_and_closer_around_the_best(
    metric, variance, middle
):
    rng = torch.Generator().manual_seed(4)
    targets = torch.randint(4, (3000,), generator=rng)
    # two dimensions, each with half of the variance, far from the origin
    states = torch.randn(3000, 2, generator=rng)
    states += torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])[targets] * 2
    states = (states - states.mean(dim=0)) / states.std(dim=0, correction=0)
    states *= (variance / 2) ** 0.5
    data = TuningData(torch.full((3000,), -4.0), None, None, targets, None, None, states)
    sweep = CacheSweep(data, metric, keep_apart=False)
    sweep.run([100])
    thetas, lowest = tried_thetas(sweep.alone), best(sweep.alone).cache_theta
    for exponent in range(-1, 7):
        assert min(abs(theta / (middle * 2.0**exponent) - 1) for theta in thetas) < 1e-3
    assert thetas[0] < lowest < thetas[-1]
    assert all(float(f"{theta:.4g}") == theta for theta in thetas)
    place = thetas.index(lowest)
    assert thetas[place + 1] / thetas[place - 1] == pytest.approx(2**0.5, rel=1e-3)
    assert len(thetas) == 8 + 4


def signed(signs, other_norm=30.0):
    """A text in which each of seven tokens follows its own state, of one sign or the other."""
    targets = torch.arange(70) % 7
    states = torch.nn.functional.one_hot(targets, 8) * signs.unsqueeze(1)
    states[0, 7] = other_norm  # makes the variance large, and is like no other
    return TuningData(torch.full((70,), -3.0), None, None, targets, None, None, states)


SAME, OTHER = torch.ones(70), (-1.0) ** (torch.arange(70) // 7)


@pytest.mark.parametrize(
    "signs, other_norm, end, lowest", [(OTHER, 30.0, 0, -13), (SAME, 2000.0, -1, -1)]
)
def test_thetas_that_go_on_getting_better_come_to_an_end(signs, other_norm, end, lowest):
    """The state that the same token followed is the farthest, or the nearest."""
    data = signed(signs, other_norm)
    sweep = CacheSweep(data, "ip", keep_apart=False)
    sweep.run([7])
    thetas = tried_thetas(sweep.alone)
    assert len(thetas) == len(sweep.alone) == 8 + 12 + 4
    assert thetas[end] == best(sweep.alone).cache_theta
    middle = 1 / data.queries.numpy().var(axis=0).sum()
    for exponent in range(lowest, lowest + 20):
        assert min(abs(theta / (middle * 2.0**exponent) - 1) for theta in thetas) < 1e-3


def test_with_neighbours_thetas_are_those_that_are_best_beside_them():
    """Neighbours know the tokens for which a high theta is best."""
    data = signed(torch.cat([SAME[:35], OTHER[35:]]))
    log_p_knn = torch.zeros(70)
    log_p_knn[35:] = -math.inf
    sweep = CacheSweep(data, "ip", False, log_p_knn)
    sweep.run([7])
    thetas = tried_thetas(sweep.with_knn)
    assert thetas[0] == best(sweep.with_knn).cache_theta < best(sweep.alone).cache_theta
    assert thetas[0] < 2.0**-12 / data.queries.numpy().var(axis=0).sum()
    assert len(thetas) == len(sweep.with_knn) == 8 + 12 + 4


def test_states_that_are_all_the_same_have_thetas_too():
    data = make_data()[0]._replace(queries=torch.ones(240, 8))
    sweep = CacheSweep(data, "l2", keep_apart=False)
    sweep.run([50])
    assert {0.5, 1.0, 64.0} <= set(tried_thetas(sweep.alone))


def test_weights_are_never_1_together():
    """Else the one target that neither neighbours nor cache have made perplexity infinite."""
    count = 30_000
    log_p_knn = torch.zeros(count)
    log_p_knn[7] = -math.inf
    targets = torch.arange(count)  # nothing is ever in the cache
    states = torch.zeros(count, 1)
    data = TuningData(torch.full((count,), -5.0), None, None, targets, None, None, states)
    sweep = CacheSweep(data, "ip", False, log_p_knn)
    sweep.run([1], [1.0])
    (point,) = sweep.with_knn
    assert (point.knn_lambda, point.cache_lambda) == (0.9999, 0.0)
    assert point.perplexity < 1.001
    # of half of the tokens only the neighbours know, of the others only the cache
    targets[: count // 2], log_p_knn[: count // 2] = 0, -math.inf
    sweep = CacheSweep(data, "ip", False, log_p_knn)
    sweep.run([1], [1.0])
    (point,) = sweep.with_knn
    assert point.knn_lambda == pytest.approx(0.5, abs=1e-3)
    assert point.knn_lambda + point.cache_lambda == pytest.approx(0.9999, abs=1e-12)


def test_thetas_go_on_while_the_best_is_at_an_end():
    rng = torch.Generator().manual_seed(3)
    states, targets = torch.randn(300, 8, generator=rng), torch.randint(4, (300,), generator=rng)
    # The nearest state alone says which token follows.
    states = 0.05 * states + torch.nn.functional.one_hot(targets, 8)
    log_p_lm = torch.full((300,), -3.0)
    data = TuningData(log_p_lm, None, None, targets, np.array([0]), None, states)
    sweep = CacheSweep(data, "l2", keep_apart=False)
    sweep.run([20, 100])
    lowest = best(sweep.alone)
    assert lowest.cache_theta < max(point.cache_theta for point in sweep.alone)
    assert lowest.perplexity < 1.2


def test_the_smallest_of_equal_caches_is_the_best():
    points = [
        CacheGridPoint(20, 0.1, 0.2, 0.0, 7.0),
        CacheGridPoint(10, 0.3, 0.2, 0.0, 7.0),
        CacheGridPoint(5, 0.3, 0.2, 0.0, 8.0),
    ]
    assert best(points) == points[1]


def test_a_sweep_that_cannot_be_is_refused():
    data = TuningData(torch.zeros(3), None, None, torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match="lacks queries, document_starts"):
        CacheSweep(data, "ip", keep_apart=True)
    with pytest.raises(UserError, match="metric must be one of ip, l2, got 'cos'; .*got \\(2,\\)"):
        CacheSweep(data._replace(queries=torch.zeros(3, 2)), "cos", False, torch.zeros(2))
