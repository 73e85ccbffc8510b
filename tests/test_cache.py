"""The continuous cache: against a loop over tokens, as a property, and through the commands."""

import json
import logging
import math
import re

import numpy as np
import oracle
import pytest
import torch
from conftest import evaluate

from fairseq_knnlm import cache_sweep
from fairseq_knnlm.cache import ContinuousCache
from fairseq_knnlm.cli import tune
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.interpolation import mix
from fairseq_knnlm.neighbors_file import Retrieved

EOS = 2
THETA, SIZE, WEIGHT = 0.2, 50, 0.15


def one_token_at_a_time(states, targets, size, theta, metric="ip", resets=()):
    """log p_cache by its formula, in float64; nan where there is nothing to look back on."""
    states, targets = np.asarray(states, dtype=np.float64), np.asarray(targets)
    found, first = np.full(len(targets), np.nan), 0
    for t in range(len(targets)):
        first = t if t in resets else first
        past = slice(max(first, t - size), t)
        if past.start == t:
            continue
        if metric == "ip":
            log_weights = theta * states[past] @ states[t]
        else:
            log_weights = -theta * ((states[past] - states[t]) ** 2).sum(axis=1)
        matched = log_weights[targets[past] == targets[t]]
        found[t] = -np.inf
        if len(matched):
            found[t] = np.logaddexp.reduce(matched) - np.logaddexp.reduce(log_weights)
    return found


def make_text(count, dimension=8, types=30, seed=3):
    chance = torch.Generator().manual_seed(seed)
    states = torch.randn(count, dimension, generator=chance)
    return states, torch.randint(types, (count,), generator=chance)


def mixed(log_p_lm, log_p_cache, log_p_knn=None, knn_lambda=0.0, weight=WEIGHT):
    """The mixture in float64; the cache's weight goes to the others where it is empty."""
    others = (1 - weight - knn_lambda) * np.exp(log_p_lm)
    if log_p_knn is not None:
        others += knn_lambda * np.exp(log_p_knn)
    with_cache = others + weight * np.exp(np.nan_to_num(log_p_cache, nan=0.0))
    return np.where(np.isnan(log_p_cache), others / (1 - weight), with_cache)


def perplexity(probabilities):
    return math.exp(-np.log(probabilities).mean())


def documents(targets):
    """Rows after an empty line."""
    return {
        t
        for t in range(2, len(targets))
        if targets[t - 1] == EOS and targets[t - 2] == EOS and targets[t] != EOS
    }


# -- the distribution ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("resets", [(), (0, 5, 6, 300)], ids=["one-text", "documents"])
def test_equals_one_token_at_a_time_whatever_the_pieces(metric, resets):
    states, targets = make_text(700)
    sizes, thetas = [100, 7, 1, 1000], [0.0, 0.3, 20.0]
    cache = ContinuousCache(sizes, thetas, metric)
    bounds = [0, 0, 1, 300, 301, 700]
    pieces = [
        cache.log_probs(
            states[a:b], targets[a:b], [row - a for row in resets if a <= row < b]
        )
        for a, b in zip(bounds, bounds[1:])
    ]  # fmt: skip
    found = torch.cat(pieces, dim=2).numpy()
    for theta, of_sizes in zip(thetas, found):
        for size, scores in zip(sizes, of_sizes):
            expected = one_token_at_a_time(states, targets, size, theta, metric, resets)
            np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-4)


def test_a_token_that_is_remembered_gains_and_no_other_does():
    states, targets = make_text(400, types=200)
    log_p_lm = -8 * torch.rand(400)
    ((log_p_cache,),) = ContinuousCache([40], [0.5]).log_probs(states, targets)
    found = mix(log_p_lm, None, log_p_cache, cache_lambda=WEIGHT) - log_p_lm
    remembered = np.array([targets[t] in targets[max(0, t - 40) : t] for t in range(400)])
    without = math.log(1 - WEIGHT)
    assert 50 < remembered.sum() < 350
    assert (found[remembered] > without).all()
    assert found[~remembered][1:].numpy() == pytest.approx(without, abs=1e-5)
    assert found[0] == 0 and np.isnan(log_p_cache[0])


def test_sums_to_one_over_the_vocabulary():
    states, targets = make_text(60, types=5)
    total = 0.0
    for token in range(5):
        last = torch.cat([targets[:-1], torch.tensor([token])])
        total += ContinuousCache([20], [0.7]).log_probs(states, last)[0, 0, -1].exp()
    assert total == pytest.approx(1.0, abs=1e-6)


def test_large_products_do_not_overflow():
    states, targets = make_text(80)
    ((found,),) = ContinuousCache([30], [1e4]).log_probs(100 * states, targets)
    expected = one_token_at_a_time(100 * states, targets, 30, 1e4)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-3, atol=20)
    assert np.isneginf(found[np.isneginf(expected)]).all()


def test_theta_that_is_not_given_scales_with_the_dimension():
    states, targets = make_text(50, dimension=16)
    for metric, theta in (("ip", 1 / 4), ("l2", 1 / 8)):
        ((found,),) = ContinuousCache([30], metric=metric).log_probs(states, targets)
        expected = one_token_at_a_time(states, targets, 30, theta, metric)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "arguments", [([],), ([0],), ([5], []), ([5], [-1.0]), ([5], [math.nan]), ([5], [1.0], "cos")]
)
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(UserError, match="must be"):
        ContinuousCache(*arguments)


def test_mixture_is_convex():
    lm, knn, cache = torch.log(torch.tensor([[0.5], [0.2], [0.1]])).unbind()
    found = mix(lm, knn, cache, knn_lambda=0.3, cache_lambda=0.2).exp()
    assert found.item() == pytest.approx(0.5 * 0.5 + 0.3 * 0.2 + 0.2 * 0.1)
    assert torch.equal(mix(lm, knn, cache, 0.0, 1.0), cache)
    assert mix(lm, knn, cache, 0.9, 0.1).exp().item() == pytest.approx(0.9 * 0.2 + 0.1 * 0.1)
    empty = torch.tensor([math.nan])
    assert mix(lm, knn, empty, 0.3, 0.2).exp().item() == pytest.approx((0.25 + 0.06) / 0.8)
    assert torch.equal(mix(lm, knn, empty, 0.0, 1.0), lm)
    with pytest.raises(UserError, match="together at most 1"):
        mix(lm, knn, cache, 0.9, 0.2)


# -- evaluation ------------------------------------------------------------------------------------

CACHE = ("--knn-cache-size", SIZE, "--knn-cache-theta", THETA, "--knn-cache-lambda", WEIGHT)


@pytest.fixture(scope="module")
def scored(data, checkpoints):
    """States, targets and log p_lm of the test split, by fairseq alone."""
    task, model = oracle.load(data, checkpoints["adaptive"], 32)
    return oracle.score(task, model, "test")


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(
    "batches",
    [
        ["--batch-size", 1],
        ["--batch-size", 16, "--num-workers", 2],
        ["--max-tokens", 100, "--num-workers", 1],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_evaluation_equals_one_token_at_a_time(data, checkpoints, scored, metric, batches):
    states, targets, log_p_lm = scored
    log_p_cache = one_token_at_a_time(states, targets, SIZE, THETA, metric)
    found = evaluate(data, checkpoints["adaptive"], *CACHE, "--knn-cache-metric", metric, *batches)
    assert found == pytest.approx(perplexity(mixed(log_p_lm, log_p_cache)), rel=1e-5)
    assert abs(found / perplexity(np.exp(log_p_lm)) - 1) > 1e-3


def test_small_chunks_share_one_cache(data, checkpoints, scored, monkeypatch):
    monkeypatch.setattr("fairseq_knnlm.task.CHUNK_TOKENS", 70)
    states, targets, log_p_lm = scored
    for reset, resets in (("none", ()), ("document", documents(targets))):
        log_p_cache = one_token_at_a_time(states, targets, SIZE, THETA, resets=resets)
        found = evaluate(data, checkpoints["adaptive"], *CACHE, "--knn-cache-reset", reset)
        assert found == pytest.approx(perplexity(mixed(log_p_lm, log_p_cache)), rel=1e-5), reset


def test_documents_of_complete_doc_are_kept_apart(data, checkpoints):
    task, model = oracle.load(data, checkpoints["adaptive"], 32, "complete_doc")
    states, targets, log_p_lm = oracle.score(task, model, "test")
    slices = task.dataset("test").dataset.slice_indices
    sizes = [len(task.dataset("test")[i]["target"]) for i in range(len(slices))]
    rows = np.cumsum([0, *sizes])
    resets = {
        rows[i] for i in range(1, len(slices)) if slices[i][0] != slices[i - 1][1]
    }  # fmt: skip
    assert len(resets) == 11
    log_p_cache = one_token_at_a_time(states, targets, SIZE, THETA, resets=resets)
    found = evaluate(
        data, checkpoints["adaptive"], *CACHE, "--knn-cache-reset", "document",
        "--sample-break-mode", "complete_doc",
    )  # fmt: skip
    assert found == pytest.approx(perplexity(mixed(log_p_lm, log_p_cache)), rel=1e-5)


def test_three_weights(data, checkpoints, datastores, scored):
    task, model = oracle.load(data, checkpoints["adaptive"], 32)
    keys, values, _ = oracle.score(task, model, "train")
    states, targets, log_p_lm = scored
    log_p_knn = oracle.knn_log_probs(keys, values, states, targets, 16, 5.0)
    log_p_cache = one_token_at_a_time(states, targets, SIZE, THETA)
    found = evaluate(
        data, checkpoints["adaptive"], *CACHE, "--knn-datastore", datastores["adaptive"],
        "--knn-k", 16, "--knn-temperature", 5, "--knn-lambda", 0.3,
    )  # fmt: skip
    expected = mixed(log_p_lm, log_p_cache, log_p_knn, 0.3)
    assert found == pytest.approx(perplexity(expected), rel=1e-4)


@pytest.mark.parametrize("reset", ["none", "document"])
def test_every_shard_looks_back_over_its_beginning(data, checkpoints, caplog, reset):
    flags = [*CACHE, "--knn-cache-reset", reset, "--max-tokens", 64]
    whole = evaluate(data, checkpoints["adaptive"], *flags)
    nats = tokens = 0
    for shard in range(3):
        with caplog.at_level(logging.INFO):
            found = evaluate(
                data, checkpoints["adaptive"], *flags, "--num-shards", 3, "--shard-id", shard
            )
        count = int(re.findall(r"Evaluated ([\d,]+) tokens", caplog.text)[-1].replace(",", ""))
        nats, tokens = nats + count * math.log(found), tokens + count
    assert math.exp(nats / tokens) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--knn-cache-size", -1], ["--knn-cache-size", ">= 0", "-1"]),
        (["--knn-cache-size", 5, "--knn-cache-theta", -1], ["--knn-cache-theta", ">= 0"]),
        (["--knn-cache-size", 5, "--knn-cache-lambda", 1.5], ["--knn-cache-lambda", "1.5"]),
        (["--knn-cache-theta", 1], ["--knn-cache-theta", "without --knn-cache-size"]),
    ],
)
def test_flags_that_cannot_be(data, checkpoints, flags, parts):
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoints["adaptive"], *flags)
    assert all(part in str(error.value) for part in parts)


def test_weights_of_more_than_all(data, checkpoints, datastores):
    flags = ["--knn-datastore", datastores["adaptive"], "--knn-k", 8, "--knn-lambda", 0.9]
    with pytest.raises(UserError, match="at most 1 together"):
        evaluate(data, checkpoints["adaptive"], *flags, *CACHE)


# -- tuning ----------------------------------------------------------------------------------------


@pytest.fixture
def tuned(data, checkpoints, tmp_path):
    def call(*flags):
        output = tmp_path / "tuned.json"
        tune.main([str(word) for word in (
            data, "--path", checkpoints["adaptive"], "--tokens-per-sample", 32, "--cpu",
            "--log-format", "none", "--num-workers", 0, "--knn-output", output,
            "--knn-cache-size", SIZE, *flags,
        )])  # fmt: skip
        return json.loads(output.read_text())

    return call


def cache_flags(setting):
    return [
        word
        for name in ("size", "theta", "lambda")
        for word in (f"--knn-cache-{name}", setting[f"cache_{name}"])
    ]


@pytest.mark.parametrize("reset", ["none", "document"])
def test_tuned_alone(data, checkpoints, tuned, reset):
    found = tuned("--report-subset", "test", "--knn-cache-reset", reset)
    setting, reported = found["best_cache"], found["reported_on"]
    assert found["tuned_on"]["cache_perplexity"] == pytest.approx(setting["perplexity"])
    assert setting["perplexity"] < found["tuned_on"]["base_perplexity"]
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
    found = tuned(*flags, "--report-subset", "test")
    reported, setting = found["reported_on"], found["best_knn_cache"]
    assert reported["knn_cache_change_from_knn"]["value"] == pytest.approx(
        reported["knn_cache_perplexity"] / reported["knn_perplexity"] - 1
    )
    best = min(found["tuned_on"][f"{name}_perplexity"] for name in ("base", "cache", "knn"))
    assert setting["perplexity"] <= best
    by_flags = evaluate(
        data, checkpoints["adaptive"], "--knn-datastore", datastores["adaptive"],
        "--knn-k", found["best"]["k"], "--knn-temperature", found["best"]["temperature"],
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


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_best_weights_against_expectation_maximisation(seed):
    chance = np.random.default_rng(seed)
    probabilities = chance.random((3, 2000)) ** np.array([[1.0], [2.0], [1.0 + 2 * seed]])
    probabilities[1:][chance.random((2, 2000)) < 0.5] = 0.0
    expected = np.full(3, 1 / 3)
    for _ in range(5000):
        expected *= (probabilities / (expected @ probabilities)).mean(axis=1)
    with np.errstate(divide="ignore"):
        log_probs = torch.from_numpy(np.log(probabilities))
    assert cache_sweep.best_weights(log_probs) == pytest.approx(expected, abs=1e-4)


def test_best_weights_at_the_corners():
    good, bad = torch.full((10,), -1.0), torch.full((10,), -math.inf)
    assert cache_sweep.best_weights([good, bad]).tolist() == [1.0, 0.0]
    twins = cache_sweep.best_weights([good, good, good - 1.0])
    assert twins[2] == 0.0 and twins.sum() == pytest.approx(1.0)
    unknown = torch.full((10,), math.nan)
    with pytest.raises(UserError, match="no token"):
        cache_sweep.best_weights([good, unknown])


def test_thetas_go_on_while_the_best_is_at_an_end():
    states, targets = make_text(300, types=4)
    # the token that follows is told by the nearest state alone
    states = 0.05 * states + torch.nn.functional.one_hot(targets, 8)
    log_p_lm = torch.full((300,), -3.0)
    retrieved = Retrieved(log_p_lm, None, None, targets, np.array([0]), None, states)
    found = cache_sweep.CacheSweep(retrieved, "l2", keep_apart=False)
    found.run([20, 100])
    best = cache_sweep.best(found.alone)
    assert best.cache_theta < max(setting.cache_theta for setting in found.alone)
    assert best.perplexity < 1.2
