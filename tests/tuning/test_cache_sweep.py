"""The grid of the continuous cache: through the commands, and by itself."""

import json

import numpy as np
import pytest
import torch
from helpers.commands import call, evaluate

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
