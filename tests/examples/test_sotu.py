"""The table that the demonstration ends with."""

import importlib.util

import pytest
from helpers.commands import REPOSITORY


@pytest.fixture(scope="module")
def report():
    """The module of the demonstration's report, which is in no package."""
    path = REPOSITORY / "examples" / "sotu" / "report.py"
    spec = importlib.util.spec_from_file_location("sotu_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(report, low, high, units, unit):
    change = {"value": -0.1, "low": low, "high": high, "units": units, "unit": unit}
    measured = {
        **{f"{name}_perplexity": 100.0 for name, _, _ in report.METHODS},
        **{name: change for _, name, _ in report.METHODS if name},
        report.BESIDES: change,
        "tokens": 5000,
    }
    knn = {"k": 8, "temperature": 3.0, "knn_lambda": 0.3}
    both = {"cache_size": 20, "cache_theta": 0.1, "cache_lambda": 0.1, "knn_lambda": 0.3}
    results = {"valid": measured, "test": measured, "knn": knn, "knn_cache": both, "seconds": {}}
    return list(report.table(results))


def test_intervals_say_what_they_are_of(report):
    lines = lines_of(report, -0.12, -0.08, 13, "documents")
    assert sum(line.endswith("-10.0%  -12.0% to -8.0%") for line in lines) == 4
    assert "intervals: paired bootstrap over 13 documents of test" in lines


def test_too_few_units_have_no_interval(report):
    lines = lines_of(report, None, None, 6, "blocks")
    assert sum(line.endswith("-10.0%  none") for line in lines) == 4
    assert "intervals: none, 6 blocks of test are too few" in lines
