"""What was stored by tuning is taken in the ranges of flags, and in no others."""

import math

import pytest

from fairseq_knnlm.plugin.config import KNNLMConfig, check_settings
from fairseq_knnlm.scoring.settings import DISTANCES, RANGES, Settings, flag_of
from fairseq_knnlm.scoring.tuned_settings import settings_of_tuned
from fairseq_knnlm.search import retriever

KNN = {"k": 64, "knn_lambda": 0.25, "temperature": 10.0, "nprobe": 32, "distances": "exact"}
CACHE = {
    "cache_size": 500, "cache_lambda": 0.1, "cache_theta": 0.05, "cache_metric": "ip",
    "cache_reset": "none",
}  # fmt: skip


def test_the_settings_are_taken_and_the_rest_is_not():
    tuned = {**KNN, "datastores": ["12345678"], "tuned_on": {"split": "valid"}}
    assert settings_of_tuned(tuned, "d") == KNN
    assert settings_of_tuned({**tuned, **CACHE}, "d") == {**KNN, **CACHE}
    whole = {**KNN, "temperature": 10, "knn_lambda": 1}  # JSON of other programs
    assert settings_of_tuned(whole, "d") == whole


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("k", -5, "--knn-k must be a whole number >= 1, got -5"),
        ("k", 0, "--knn-k must be a whole number >= 1, got 0"),
        ("k", 8.0, "--knn-k must be a whole number >= 1, got 8.0"),
        ("k", True, "--knn-k must be a whole number >= 1, got True"),
        ("k", "8", "--knn-k must be a whole number >= 1, got '8'"),
        ("k", [8], "--knn-k must be a whole number >= 1, got [8]"),
        ("knn_lambda", math.nan, "--knn-lambda must be in [0, 1], got nan"),
        ("knn_lambda", 1.5, "--knn-lambda must be in [0, 1], got 1.5"),
        ("knn_lambda", "0.3", "--knn-lambda must be in [0, 1], got '0.3'"),
        ("temperature", math.inf, "--knn-temperature must be a finite number > 0, or auto"),
        ("temperature", -1.0, "--knn-temperature must be a finite number > 0, or auto"),
        ("temperature", {}, "--knn-temperature must be a finite number > 0, or auto, got {}"),
        ("nprobe", 0, "--knn-nprobe must be a whole number >= 1, got 0"),
        ("distances", "zzz", "--knn-distances must be one of exact, index, exhaustive, got 'zzz'"),
        ("distances", 1, "--knn-distances must be one of"),
        (
            "cache_size",
            -1,
            "--knn-cache-size must be a whole number >= 0 and <= 2147483647, got -1",
        ),
        (
            "cache_size",
            "many",
            "--knn-cache-size must be a whole number >= 0 and <= 2147483647, got 'many'",
        ),
        ("cache_lambda", 2, "--knn-cache-lambda must be in [0, 1], got 2"),
        ("cache_lambda", 0.9, "at most 1 together"),
        ("cache_theta", math.inf, "--knn-cache-theta must be a finite number >= 0"),
        ("cache_metric", "cos", "--knn-cache-metric must be one of ip, l2, got 'cos'"),
        ("cache_reset", None, "cache_reset is missing"),
        *((name, None, f"{name} is missing") for name in KNN),
    ],
    ids=str,
)
def test_what_a_flag_could_not_be_is_refused(name, value, message):
    with pytest.raises(ValueError) as error:
        settings_of_tuned({**KNN, **CACHE, name: value}, "DIR")
    for part in ("DIR/tuned.json cannot be used", message, "run fairseq-knnlm-tune again"):
        assert part in str(error.value)


def test_a_setting_that_is_not_there_is_missing():
    for name in KNN:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            settings_of_tuned({key: KNN[key] for key in KNN if key != name}, "d")


@pytest.mark.parametrize(
    "name, value", [("k", 0), ("knn_lambda", 1.5), ("nprobe", -2), ("cache_size", -1)]
)
def test_flags_and_what_was_tuned_have_one_range(name, value):
    flags = KNNLMConfig()
    setattr(flags, name if name.startswith("knn_") else f"knn_{name}", value)
    with pytest.raises(ValueError) as of_flags:
        check_settings(flags)
    with pytest.raises(ValueError) as of_tuned:
        settings_of_tuned({**KNN, **CACHE, name: value}, "d")
    message = next(part for part in str(of_flags.value).split("; ") if flag_of(name) in part)
    assert message in str(of_tuned.value)


def test_every_setting_has_a_range():
    assert set(RANGES) == set(Settings._fields)
    assert DISTANCES == retriever.DISTANCES
