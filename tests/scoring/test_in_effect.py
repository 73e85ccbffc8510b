"""Which settings are in effect, where each comes from, and how that is written."""

from fairseq_knnlm.scoring.in_effect import InEffect, settings_line
from fairseq_knnlm.scoring.settings import Settings

TUNED = {
    "k": 64,
    "knn_lambda": 0.3,
    "temperature": 5.0,
    "nprobe": 8,
    "tuned_on": {"split": "valid"},
}


def test_what_was_tuned_comes_before_what_is_given_and_both_before_defaults():
    in_effect = InEffect.of({"k": 64, "cache_reset": "document"}, TUNED)
    expected = Settings(k=64, knn_lambda=0.3, temperature=5.0, nprobe=8, cache_reset="document")
    assert in_effect.settings == expected
    assert in_effect.sources["k"] == in_effect.sources["nprobe"] == "tuned"
    assert in_effect.sources["cache_reset"] == "given"
    assert in_effect.sources["distances"] == "default"


def test_a_line_names_every_setting_that_means_something():
    in_effect = InEffect.of({"knn_lambda": 0.1})
    in_effect = in_effect.with_auto(in_effect.settings._replace(temperature=31.4))
    assert in_effect.line() == (
        "settings: k 1024 (default), lambda 0.1 (given), temperature 31.4 (auto, of the "
        "datastore), nprobe 32 (default), distances exact (default)"
    )
    assert in_effect.line(["k", "cache_size"]) == "settings: k 1024 (default)"


def test_what_is_not_used_is_not_named():
    exhaustive = InEffect.of({"distances": "exhaustive"})
    assert "nprobe" not in exhaustive.line()
    cache = InEffect.of({"cache_size": 50, "knn_lambda": 0.5}, searched=False)
    assert cache.line() == (
        "settings: cache size 50 (given), cache lambda 0.1 (default), cache theta 1 / "
        "sqrt(dimension) (default), cache metric ip (default), cache reset none (default)"
    )
    assert InEffect.of({}, searched=False).line() == "settings: none, the language model alone"


def test_a_temperature_that_was_given_is_not_of_the_datastore():
    given = InEffect.of({"temperature": 2.0})
    assert given.with_auto(given.settings) is given


def test_as_json():
    result = InEffect.of({"k": 8}, {"nprobe": 5}).to_dict()
    assert result["k"] == {"value": 8, "source": "given"}
    assert result["nprobe"] == {"value": 5, "source": "tuned"}
    assert not [name for name in result if name.startswith("cache_")]


def test_without_a_cache():
    both = InEffect.of({}, {**TUNED, "cache_size": 50, "cache_lambda": 0.2})
    alone = both.without_cache({"knn_lambda": 0.4})
    assert alone.settings == Settings(k=64, knn_lambda=0.4, temperature=5.0, nprobe=8)
    assert alone.sources["knn_lambda"] == "tuned"
    assert alone.names() == ["k", "knn_lambda", "temperature", "nprobe", "distances"]


def test_other_settings_in_the_same_form():
    line = settings_line([("key_layer", -1, "default"), ("metric", "ip", "given")])
    assert line == "settings: key layer -1 (default), metric ip (given)"
