"""The temperature that a datastore starts with, against brute force."""

import numpy as np
import pytest
from helpers.small import make_datastore, random_keys

from fairseq_knnlm.tuning.temperature import find_temperature

DIMENSION = 6


def make_text(count, scale=1.0):
    """Keys, and values that near keys share more often than far ones."""
    keys = random_keys(1, count, DIMENSION).astype(np.float32)
    signs = (keys[:, :4] > 0) @ np.array([1, 2, 4, 8])
    rng = np.random.default_rng(2)
    values = np.where(rng.random(count) < 0.6, signs, rng.integers(16, size=count))
    return (scale * keys).astype(np.float16), values.astype(np.uint8)


def find(path, keys, values, factory="Flat", metric="l2"):
    path = make_datastore(path, keys, values, factory=factory, metric=metric)
    return find_temperature(keys, values, metric, f"{path}/index.faiss", nprobe=32)


def likelihood(keys, values, temperature):
    """Highest mean log-likelihood over lambda of each value, its own key left out."""
    keys = keys.astype(np.float64)
    distances = ((keys[:, None] - keys[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    weights = np.exp(-(distances - distances.min(axis=1, keepdims=True)) / temperature)
    p_knn = (weights * (values == values[:, None])).sum(axis=1) / weights.sum(axis=1)
    frequency = (np.bincount(values) / len(values))[values]
    lambdas = np.linspace(0, 0.999, 400)[:, None]
    return np.log((1 - lambdas) * frequency + lambdas * p_knn).mean(axis=1).max()


def test_no_other_temperature_is_much_better(tmp_path):
    keys, values = make_text(600)
    result = find(tmp_path / "d", keys, values)
    assert result["queries"] == result["k"] == 600
    reached = likelihood(keys, values, result["value"])
    assert reached > likelihood(keys, values, 1e4) + 0.05
    for factor in 2.0 ** np.arange(-6, 7):
        assert reached >= likelihood(keys, values, result["value"] * factor) - 1e-3


@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ6x4fs"])
def test_it_follows_the_scale_of_the_keys(tmp_path, factory):
    keys, values = make_text(600)
    one = find(tmp_path / "one", keys, values, factory)["value"]
    four = find(tmp_path / "four", *make_text(600, scale=4.0), factory)["value"]
    assert four == pytest.approx(16 * one, rel=0.2)


def test_it_is_the_same_every_time(tmp_path):
    keys, values = make_text(3000)
    result = find(tmp_path / "one", keys, values)
    assert result == find(tmp_path / "two", keys, values)
    assert (result["queries"], result["k"]) == (2048, 1024)


def test_inner_product(tmp_path):
    keys, values = make_text(600)
    assert find(tmp_path / "d", keys, values, metric="ip")["value"] > 0


@pytest.mark.parametrize("count", [1, 2, 40])
def test_neighbours_that_tell_nothing(tmp_path, count):
    keys, _ = make_text(count)
    result = find(tmp_path / "d", keys, np.arange(count, dtype=np.uint8))
    assert result["value"] == 1.0
