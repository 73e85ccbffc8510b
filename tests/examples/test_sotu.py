"""What the demonstration ends with: its table, its plot and the pages that it links."""

import importlib.util
import json

import pytest
from helpers.commands import REPOSITORY
from matplotlib.figure import Figure

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("sotu_report", EXAMPLES / "sotu" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def change(value, units=13, unit="documents", half_width=0.05):
    """A change as ``fairseq-knnlm-tune`` writes it; without bounds where *half_width* is None."""
    low, high = (None, None) if half_width is None else (value - half_width, value + half_width)
    return {"value": value, "low": low, "high": high, "units": units, "unit": unit}


def tuned(**changed):
    """What ``fairseq-knnlm-tune`` writes."""
    result = {
        "tokens": 1000, "counted": 1000, "bytes": None, "base_perplexity": 100.0,
        "cache_perplexity": 90.0, "cache_change": change(-0.1),
        "knn_perplexity": 80.0, "relative_change": change(-0.2),
        "knn_cache_perplexity": 70.0, "knn_cache_change": change(-0.3),
        "knn_cache_change_from_knn": change(-0.125), **changed,
    }  # fmt: skip
    best = {"k": 8, "temperature": 4.0, "knn_lambda": 0.25, "perplexity": 80.0}
    grid = [{**best, "k": k, "perplexity": 100.0 - k} for k in (1, 2, 4)] + [best]
    cache = {"cache_size": 500, "cache_theta": 0.1, "cache_lambda": 0.1, "knn_lambda": 0.2}
    return {
        "tuned_on": {"split": "valid", **result}, "reported_on": {"split": "test", **result},
        "best": best, "best_knn_cache": cache, "grid": grid,
    }  # fmt: skip


EVALUATED = {"base": (1000, 100.0), "knn": (1000, 80.0), "knn_cache": (1000, 70.0)}


def test_the_end_names_every_file(report, tmp_path, capsys):
    pages = {"report": tmp_path / "r" / "report.html", "a passage": tmp_path / "p.html"}
    report.write_report(tmp_path, tuned(), EVALUATED, {"train": 1.0}, pages)
    printed = capsys.readouterr().out
    for page in pages.values():
        assert page.as_uri() in printed  # a terminal makes links of these
    assert "results.json" in printed and "perplexity.png" in printed
    assert json.loads((tmp_path / "results.json").read_text())["test"]["tokens"] == 1000
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_no_interval_of_few_units(report):
    changes = ("cache_change", "relative_change", "knn_cache_change", "knn_cache_change_from_knn")
    few = dict.fromkeys(changes, change(-0.3, 6, "blocks", half_width=None))
    lines = list(report.table(report.collect(tuned(**few), EVALUATED, {})))
    rows = [line for line in lines if "%" in line and "95%" not in line]
    assert len(rows) == 4 and all(row.endswith("-30.0%  none") for row in rows)
    assert "intervals: none, too few: 6 blocks of test" in lines
    lines = list(report.table(report.collect(tuned(), EVALUATED, {})))
    (row,) = (line for line in lines if "+ nearest neighbours  " in line)
    assert row.endswith("-20.0%  -25.0% to -15.0%")
    assert "intervals: paired bootstrap over 13 documents of test" in lines


def test_perplexities_of_words_stand_beside_those_of_pieces(report):
    """Two pieces a word: the perplexity of pieces is the root of that of words."""
    bits = {"base": 2.0, "cache": 1.9, "knn": 1.75, "knn_cache": 1.625}
    bits = {f"{name}_bits_per_byte": value for name, value in bits.items()}
    results = tuned(counted=500, bytes=1600, **bits)
    with pytest.raises(ValueError, match="fairseq-eval-lm gave 100.0 over 1000 tokens with base"):
        report.collect(results, EVALUATED, {})  # the stock command's is of pieces
    evaluated = {**EVALUATED, "base": (1000, 10.0)}
    lines = list(report.table(report.collect(results, evaluated, {})))
    pieces = lines.index("the same of tokens, pieces of words")
    assert lines[pieces + 1].split() == ["language", "model", "10.00", "10.00"]
    assert lines[pieces + 3].split()[-1] == f"{80**0.5:.2f}"
    of_bytes = lines.index("bits per byte of the text")
    assert lines[of_bytes + 4].split()[-2:] == ["1.625", "1.625"]
    assert ["words", "500", "500"] in [line.split() for line in lines]
    unknown = tuned(counted=500)  # no number of bytes
    lines = list(report.table(report.collect(unknown, evaluated, {})))
    assert "bits per byte of the text" not in lines


@pytest.mark.parametrize("half_width, intervals", [(0.05, 3), (None, 2)])
def test_the_plot_has_every_method_and_its_interval(report, half_width, intervals):
    results = tuned(knn_cache_change=change(-0.3, half_width=half_width))
    axes = Figure().add_subplot()
    report.plot_methods(axes, results["reported_on"])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(report.METHODS.values())
    lines = [line.get_xdata() for line in axes.get_lines()]
    points = [float(x[0]) for x in lines if len(x) == 1]
    spans = [list(x) for x in lines if len(x) == 2 and x[0] != x[1]]
    assert points == [100.0, 90.0, 80.0, 70.0]
    assert len(spans) == intervals and spans[1] == pytest.approx([75.0, 85.0])
    assert axes.get_legend() is None  # methods are named beside the axis
