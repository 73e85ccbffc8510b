"""What a report is made of, for random queries, and the same numbers in plain numpy."""

import types

import numpy as np
import torch

from fairseq_knnlm.reporting.sizes import tune_sizes
from fairseq_knnlm.reporting.tables import make_tables
from fairseq_knnlm.tuning.grid import CacheGridPoint, best
from fairseq_knnlm.tuning.knn_sweep import sweep
from fairseq_knnlm.tuning.tuning_data import TuningData, parts_of
from helpers.oracle import knn_log_probs, perplexity
from helpers.small import all_distances, make_dictionary, random_keys

ENTRIES, ROWS, K, TYPES = 2000, 300, 64, 24
KEYS = random_keys(1, ENTRIES, 6)
# Most tokens are those of one cluster of keys each, two are rarer, and two never occur.
VALUES = np.random.default_rng(1).integers(20, size=ENTRIES)
VALUES[:5], VALUES[5:35] = 20, 21
# Of a cache: the best has 200 positions and theta 0.5.
CACHE_GRID = [
    CacheGridPoint(size, theta, 0.1, 0.2, perplexity)
    for size, theta, perplexity in (
        (100, 0.5, 9.0), (200, 0.5, 8.0), (100, 2.0, 8.5), (200, 2.0, 8.75),
    )
]  # fmt: skip
# Seeds of the two splits.
TUNED_ON, REPORTED_ON = 3, 4


def queries(seed):
    return random_keys(seed, ROWS, 6).astype(np.float32)


def targets(seed):
    """Those of the cluster of the query, and others."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(20, size=ROWS)
    return np.where(rng.random(ROWS) < 0.7, clusters, rng.integers(TYPES, size=ROWS))


def tuning_data(seed):
    """The nearest neighbours of random queries, by brute force."""
    exact = all_distances(queries(seed), KEYS)
    ids = np.argsort(exact, axis=1, kind="stable")[:, :K]
    log_p_lm = np.log(np.random.default_rng(seed).random(ROWS)).astype(np.float32)
    return TuningData(
        torch.from_numpy(log_p_lm),
        torch.from_numpy(np.take_along_axis(exact, ids, axis=1).astype(np.float32)),
        torch.from_numpy(VALUES[ids] == targets(seed)[:, None]),
        torch.from_numpy(targets(seed)),
        np.arange(0, ROWS, 20),
        parts_of(torch.from_numpy(ids)),
    )


def make_study():
    """Data of the split that is tuned on, its grid, data of another split, and all tables."""
    tuned_on, reported_on = tuning_data(TUNED_ON), tuning_data(REPORTED_ON)
    grid = sweep(tuned_on, [1, 8, K], [0.5, 2.0, 8.0])
    sizes = tune_sizes(tuned_on, best(grid).temperature)
    counts = np.bincount(VALUES, minlength=TYPES)
    dictionary = make_dictionary(TYPES - 4)  # fairseq's own four are tokens like any other here
    tables = make_tables(grid, CACHE_GRID, reported_on, sizes, counts, dictionary)
    return types.SimpleNamespace(
        tuned_on=tuned_on, reported_on=reported_on, grid=grid, best=best(grid), sizes=sizes,
        tables=tables, counts=counts, dictionary=dictionary,
    )  # fmt: skip


def log_p_knn(seed, k, temperature, keys=KEYS, values=VALUES):
    """By the oracle."""
    return knn_log_probs(keys, values, queries(seed), targets(seed), k, temperature)


def expected_perplexity(seed, point):
    """Of the k, temperature and lambda of *point*, a dictionary, by the oracle."""
    log_p_lm = np.log(np.random.default_rng(seed).random(ROWS)).astype(np.float32)
    scores = log_p_knn(seed, point["k"], point["temperature"])
    return perplexity(log_p_lm, scores, point["knn_lambda"])


def log_ratios(study):
    """ln(p_mixture / p_lm) of the split that is reported on."""
    scores = log_p_knn(REPORTED_ON, study.best.k, study.best.temperature)
    log_p_lm = study.reported_on.log_p_lm.double().numpy()
    weight = study.best.knn_lambda
    return np.logaddexp(log_p_lm + np.log1p(-weight), scores + np.log(weight)) - log_p_lm
