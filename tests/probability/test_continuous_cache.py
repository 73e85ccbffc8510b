"""The continuous cache: against a loop over tokens, as a property, and through the commands."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.commands import evaluate
from helpers.oracle import one_token_at_a_time

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability import continuous_cache
from fairseq_knnlm.probability.continuous_cache import ContinuousCache
from fairseq_knnlm.probability.mixture import mix

EOS = 2
THETA, SIZE, WEIGHT = 0.2, 50, 0.15


def make_text(count, dimension=8, types=30, seed=3):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(count, dimension, generator=rng)
    return states, torch.randint(types, (count,), generator=rng)


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
@pytest.mark.parametrize("size, theta", [(7, 0.3), (1000, None), (40, 0.0)])
def test_what_the_cache_finds_most_probable(metric, size, theta, monkeypatch):
    """Against the distribution over all tokens, one token at a time in float64."""
    monkeypatch.setattr(continuous_cache, "_MAX_PRODUCTS", 900)
    monkeypatch.setattr(continuous_cache, "_MIN_ROWS", 3)
    (states, targets), types, resets = make_text(120, types=9), 9, (0, 60)
    thetas = None if theta is None else [theta]
    cache, same = (ContinuousCache([size], thetas, metric) for _ in range(2))
    scale = theta if theta is not None else (0.5 if metric == "l2" else 1) / math.sqrt(8)
    parts = []
    for a, b in ((0, 50), (50, 120)):
        within = [row - a for row in resets if a <= row < b]
        parts.append(cache.log_probs_and_top(states[a:b], targets[a:b], 5, within))
        ((log_p,),) = same.log_probs(states[a:b], targets[a:b], within)
        torch.testing.assert_close(parts[-1][0], log_p, equal_nan=True)
    _, top, ids = map(torch.cat, zip(*parts))
    of_all = np.stack([
        one_token_at_a_time(states, targets, size, scale, metric, resets, predicted=token)
        for token in range(types)
    ])  # fmt: skip
    for row, (found, of_row) in enumerate(zip(top.exp().numpy(), np.exp(of_all.T))):
        expected = np.sort(np.nan_to_num(of_row))[::-1][:5]
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
        there = found > 0
        np.testing.assert_allclose(found[there], of_row[ids[row].numpy()[there]], rtol=2e-4)
    assert not top[[0, 60]].isfinite().any()  # the cache is empty


def test_what_is_most_probable_is_of_one_size_and_one_theta():
    states, targets = make_text(3)
    for several in (ContinuousCache([1, 2]), ContinuousCache([1], [0.1, 0.2])):
        with pytest.raises(UserError, match="one size and one theta"):
            several.log_probs_and_top(states, targets, 5)


def in_pieces(cache, states, targets, bounds, resets=()):
    """log p_cache of a text that comes in pieces."""
    pieces = [
        cache.log_probs(
            states[a:b], targets[a:b], [row - a for row in resets if a <= row < b]
        )
        for a, b in zip(bounds, bounds[1:])
    ]  # fmt: skip
    return torch.cat(pieces, dim=2).numpy()


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_largest_theta_leaves_what_is_nearest(metric):
    """Beyond what float32 holds as well: all of p_cache is where most is in common."""
    states, targets = make_text(60)
    ((nearest,), (beyond,)) = ContinuousCache([20], [1e9, 1e300], metric).log_probs(states, targets)
    np.testing.assert_array_equal(beyond.exp(), nearest.exp())
    assert beyond[1:].exp().unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("resets", [(), (0, 5, 6, 150)], ids=["one-text", "documents"])
@pytest.mark.parametrize("bounds", [[0, 0, 1, 150, 151, 350], [0, 40, 350]], ids=len)
@pytest.mark.parametrize("products", [1 << 20, 1700], ids=["large blocks", "small blocks"])
def test_equals_one_token_at_a_time_whatever_the_pieces(
    metric, resets, bounds, products, monkeypatch
):
    monkeypatch.setattr(continuous_cache, "_MAX_PRODUCTS", products)
    monkeypatch.setattr(continuous_cache, "_MIN_ROWS", 3)
    states, targets = make_text(350)
    sizes, thetas = [100, 7, 1, 10**15], [0.0, 0.3, 20.0]
    result = in_pieces(ContinuousCache(sizes, thetas, metric), states, targets, bounds, resets)
    for theta, of_sizes in zip(thetas, result):
        for size, scores in zip(sizes, of_sizes):
            expected = one_token_at_a_time(states, targets, size, theta, metric, resets)
            np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-4)


def test_states_in_half_precision_are_compared_in_full():
    states, targets = make_text(60, dimension=1)
    half = (5 * states).half()
    result = in_pieces(ContinuousCache([20], [0.5]), half, targets, [0, 25, 60])
    expected = one_token_at_a_time(half.float(), targets, 20, 0.5)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_tokens_are_told_apart_whatever_their_ids():
    states, targets = make_text(100, types=3)
    results = [
        in_pieces(ContinuousCache([20], [0.5]), states, targets + offset, [0, 50, 100])
        for offset in (0, 1 << 25)
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("shapes", [[(3, 4), (2,)], [(3,), (3,)], [(3, 1, 4), (3,)], [(3, 4), ()]])
def test_shapes_that_do_not_fit_are_named(shapes):
    states, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(UserError, match=r"expected states \(N, D\) and targets") as error:
        ContinuousCache([5]).log_probs(states, targets.long())
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_a_token_that_is_remembered_gains_and_no_other_does():
    states, targets = make_text(400, types=200)
    log_p_lm = -8 * torch.rand(400)
    ((log_p_cache,),) = ContinuousCache([40], [0.5]).log_probs(states, targets)
    result = mix(log_p_lm, None, log_p_cache, cache_lambda=WEIGHT) - log_p_lm
    remembered = np.array([targets[t] in targets[max(0, t - 40) : t] for t in range(400)])
    without = math.log(1 - WEIGHT)
    assert 50 < remembered.sum() < 350
    assert (result[remembered] > without).all()
    assert result[~remembered][1:].numpy() == pytest.approx(without, abs=1e-5)
    assert result[0] == 0 and np.isnan(log_p_cache[0])


def test_sums_to_one_over_the_vocabulary():
    states, targets = make_text(60, types=5)
    total = 0.0
    for token in range(5):
        last = torch.cat([targets[:-1], torch.tensor([token])])
        total += ContinuousCache([20], [0.7]).log_probs(states, last)[0, 0, -1].exp()
    assert total == pytest.approx(1.0, abs=1e-6)


def test_large_products_do_not_overflow():
    states, targets = make_text(80)
    ((result,),) = ContinuousCache([30], [1e4]).log_probs(100 * states, targets)
    expected = one_token_at_a_time(100 * states, targets, 30, 1e4)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(result[finite], expected[finite], rtol=1e-3, atol=20)
    assert np.isneginf(result[np.isneginf(expected)]).all()


def test_theta_that_is_not_given_scales_with_the_dimension():
    states, targets = make_text(50, dimension=16)
    for metric, theta in (("ip", 1 / 4), ("l2", 1 / 8)):
        ((result,),) = ContinuousCache([30], metric=metric).log_probs(states, targets)
        expected = one_token_at_a_time(states, targets, 30, theta, metric)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        ([],), ([0],), ([5, 0],), ([1.5],),
        ([5], []), ([5], [-1.0]), ([5], [1.0, -1.0]), ([5], [math.nan]), ([5], [math.inf]),
        ([5], [1.0], "cos"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(UserError, match="must be"):
        ContinuousCache(*arguments)


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
    result = evaluate(data, checkpoints["adaptive"], *CACHE, "--knn-cache-metric", metric, *batches)
    assert result == pytest.approx(perplexity(mixed(log_p_lm, log_p_cache)), rel=1e-5)
    assert abs(result / perplexity(np.exp(log_p_lm)) - 1) > 1e-3


def test_small_chunks_share_one_cache(data, checkpoints, scored, monkeypatch):
    monkeypatch.setattr("fairseq_knnlm.plugin.task.SEARCH_TOKENS", 70)
    states, targets, log_p_lm = scored
    for reset, resets in (("none", ()), ("document", documents(targets))):
        log_p_cache = one_token_at_a_time(states, targets, SIZE, THETA, resets=resets)
        result = evaluate(data, checkpoints["adaptive"], *CACHE, "--knn-cache-reset", reset)
        assert result == pytest.approx(perplexity(mixed(log_p_lm, log_p_cache)), rel=1e-5), reset


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
    result = evaluate(
        data, checkpoints["adaptive"], *CACHE, "--knn-cache-reset", "document",
        "--sample-break-mode", "complete_doc",
    )  # fmt: skip
    assert result == pytest.approx(perplexity(mixed(log_p_lm, log_p_cache)), rel=1e-5)


def test_three_weights(data, checkpoints, datastores, scored):
    task, model = oracle.load(data, checkpoints["adaptive"], 32)
    keys, values, _ = oracle.score(task, model, "train")
    states, targets, log_p_lm = scored
    log_p_knn = oracle.knn_log_probs(keys, values, states, targets, 16, 5.0)
    log_p_cache = one_token_at_a_time(states, targets, SIZE, THETA)
    result = evaluate(
        data, checkpoints["adaptive"], *CACHE, "--knn-datastore", datastores["adaptive"],
        "--knn-k", 16, "--knn-temperature", 5, "--knn-lambda", 0.3,
    )  # fmt: skip
    expected = mixed(log_p_lm, log_p_cache, log_p_knn, 0.3)
    assert result == pytest.approx(perplexity(expected), rel=1e-4)


@pytest.mark.parametrize("reset", ["none", "document"])
def test_every_shard_looks_back_over_its_beginning(data, checkpoints, caplog, reset):
    flags = [*CACHE, "--knn-cache-reset", reset, "--max-tokens", 64]
    whole = evaluate(data, checkpoints["adaptive"], *flags)
    nats = tokens = 0
    for shard in range(3):
        with caplog.at_level(logging.INFO):
            result = evaluate(
                data, checkpoints["adaptive"], *flags, "--num-shards", 3, "--shard-id", shard
            )
        count = int(re.findall(r"Evaluated ([\d,]+) tokens", caplog.text)[-1].replace(",", ""))
        nats, tokens = nats + count * math.log(result), tokens + count
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
