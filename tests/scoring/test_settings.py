"""What the flags mean: their spelling, their ranges and their defaults."""

import math

import pytest

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin.config import KNNLMConfig
from fairseq_knnlm.scoring.settings import (
    Settings,
    flag_of,
    range_faults,
    weight_fault,
    with_temperature,
)


def test_a_flag_is_spelt_from_its_field():
    assert flag_of("k") == flag_of("knn_k") == "--knn-k"
    assert flag_of("knn_lambda") == "--knn-lambda"
    assert flag_of("cache_size") == flag_of("knn_cache_size") == "--knn-cache-size"


def test_every_setting_has_a_flag():
    flags = {
        flag_of(name)
        for name in KNNLMConfig.__dataclass_fields__
        if name.startswith(("knn_", "trime_"))
    }
    assert {flag_of(name) for name in Settings._fields} <= flags


def test_defaults_are_in_range():
    assert range_faults(Settings()._asdict()) == []
    assert weight_fault(Settings()) is None


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("k", 0, ">= 1"),
        ("knn_lambda", 1.1, r"in \[0, 1\]"),
        ("knn_lambda", math.nan, r"in \[0, 1\]"),
        ("temperature", 0.0, "a finite number > 0, or auto"),
        ("temperature", math.inf, "a finite number > 0, or auto"),
        ("temperature", "warm", "a finite number > 0, or auto"),
        ("nprobe", 0, ">= 1"),
        ("cache_size", -1, ">= 0"),
        ("cache_lambda", -0.1, r"in \[0, 1\]"),
        ("cache_theta", math.inf, "a finite number >= 0"),
    ],
)
def test_what_is_out_of_range_is_named(name, value, expected):
    (fault,) = range_faults({"k": 5, name: value})
    assert fault.startswith(f"{flag_of(name)} must be ")
    assert expected.replace("\\", "") in fault and fault.endswith(f"got {value!r}")


def test_a_temperature_may_be_left_to_the_datastore():
    assert range_faults({"temperature": "auto"}) == []


def test_weights_may_not_sum_to_more_than_one():
    assert weight_fault(Settings(knn_lambda=0.9, cache_lambda=0.1)) is None
    assert "at most 1 together" in weight_fault(Settings(knn_lambda=0.9, cache_lambda=0.11))


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        Settings().k = 3


class _Datastore:
    path = "DIR"

    def __init__(self, manifest):
        self.manifest = manifest


def test_a_temperature_left_to_the_datastore_is_what_it_records():
    datastore = _Datastore({"temperature": {"value": 5.7}})
    assert with_temperature(Settings(k=3), datastore) == Settings(k=3, temperature=5.7)
    assert with_temperature(Settings(temperature=2.0), datastore).temperature == 2.0
    assert with_temperature(Settings(temperature=2.0), _Datastore({})).temperature == 2.0
    with pytest.raises(UserError, match="DIR records no temperature .* give --knn-temperature a"):
        with_temperature(Settings(), _Datastore({}))
