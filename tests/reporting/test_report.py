"""The files of a report, its page, and the command that writes it."""

import csv
import io
import json
import math
import re
import shlex
import shutil
import sys
import types

import pytest
from helpers.commands import call
from helpers.page import Page
from helpers.small import make_dictionary
from helpers.study import CACHE_GRID, ENTRIES, ROWS, TYPES, VALUES

from fairseq_knnlm.cli import split_data, tune
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability.bootstrap import MIN_UNITS
from fairseq_knnlm.reporting import report
from fairseq_knnlm.reporting.sizes import tune_sizes
from fairseq_knnlm.tuning.grid import KNNGridPoint

FIGURES = ("k", "found", "lambda", "temperature", "cache", "size", "frequency", "log_ratio")
BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
LATEX = ("headline", "k", "size", "frequency", "gained", "lost")
NASTY = """<script>alert("1")</script>'&amp;"""


def summary(study, *splits, units=15):
    low, high = (-0.3, -0.2) if units >= MIN_UNITS else (None, None)
    change = {"value": -0.25, "low": low, "high": high, "units": units, "unit": "documents"}
    result = {
        "tokens": ROWS,
        "counted": ROWS,
        "bytes": None,
        "base_perplexity": 12.0,
        "cache_perplexity": 10.0,
        "cache_change": change,
        "knn_perplexity": 9.0,
        "relative_change": change,
        "knn_cache_perplexity": 8.0,
        "knn_cache_change": change,
        "knn_cache_change_from_knn": {**change, "value": -0.125},
    }
    roles = zip(("tuned_on", "reported_on"), splits)
    return {
        **{role: {"split": split, **result} for role, split in roles},
        "best": study.best._asdict(),
        "best_knn_cache": CACHE_GRID[1]._asdict(),
        "command": "fairseq-eval-lm '<b>' --knn-k 8",
        "date": f"2020-02-02 {NASTY}",
        "model": {"checkpoint": f"c {NASTY}", "parameters": 1234567},
        "context": {"tokens_per_sample": 32, "sample_break_mode": f"s {NASTY}"},
        "versions": {"fairseq": f"v {NASTY}"},
    }


def write(study, directory, splits=("valid", "<i>test</i>"), **changed):
    """Write a report of a datastore and a dictionary with names that HTML must not see."""
    manifest = {
        "count": ENTRIES, "dimension": 6, "key": {"type": "ffn-input", "layer": 1},
        "metric": "l2", "index": {"factory": "Flat"},
    }  # fmt: skip
    datastore = types.SimpleNamespace(values=VALUES, manifest=manifest, path=f"d {NASTY}")
    dictionary = make_dictionary(TYPES - 4)
    dictionary.symbols[:2] = [f"a {NASTY}", f"b {NASTY}"]
    parts = {
        "knn_grid": study.grid, "cache_grid": CACHE_GRID, "data": study.reported_on,
        "sizes": study.sizes,
        "summary": summary(study, *splits),
        "retriever": types.SimpleNamespace(datastores=[datastore], nprobe=32, distances="exact"),
        "dictionary": dictionary, **changed,
    }  # fmt: skip
    return report.write(str(directory), **parts)


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def names(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_every_file_is_there_and_says_the_same(study, tmp_path):
    directory = tmp_path / "new"
    assert write(study, directory) == str(directory / "report.html")
    data = strict_json((directory / "report.json").read_text())
    assert names(directory) == {
        "report.html", "report.json",
        *(f"figures/{name}.{kind}" for name in FIGURES for kind in BEGINNINGS),
        *(f"tables/{name}.csv" for name in data["tables"]),
        *(f"tables/{name}.tex" for name in LATEX),
    }  # fmt: skip
    for name in FIGURES:
        for kind, beginning in BEGINNINGS.items():
            assert (directory / "figures" / f"{name}.{kind}").read_bytes().startswith(beginning)
    for name, rows in data["tables"].items():
        text = (directory / "tables" / f"{name}.csv").read_bytes().decode()
        read = list(csv.DictReader(io.StringIO(text, newline="")))
        assert [list(row.values()) for row in read] == [
            ["" if value is None else str(value) for value in row.values()] for row in rows
        ]


def test_the_same_report_has_the_same_bytes(study, tmp_path):
    for name in ("one", "two"):
        write(study, tmp_path / name)
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_page_needs_nothing_else_and_escapes_what_is_data(study, tmp_path):
    text = open(write(study, tmp_path), encoding="utf-8").read()
    page = Page(text)
    assert page.tags.count("img") == len(FIGURES)
    assert all(reference.startswith("data:") for reference in page.references)
    assert "default-src 'none'" in text and not re.search(r"url\(|@import", text)
    assert not {"script", "i", "object", "iframe"} & set(page.tags)
    for start in "abcdsv":  # of tokens, checkpoint, datastore, context and version
        assert f"{start} {NASTY}" in page.text
    assert f"2020-02-02 {NASTY}" in page.text and "<i>test</i>" in page.text
    assert "fairseq-eval-lm '<b>' --knn-k 8" in page.text
    assert "settings tuned on valid, change and figures of <i>test</i>" in page.text


def test_the_page_says_what_was_run(study, tmp_path):
    text = Page(open(write(study, tmp_path), encoding="utf-8").read()).text
    for shown in ("1,234,567", "tokens per sample", "cache size", "theta", "2,000"):
        assert shown in text


def rows_of(table):
    """The cells of a table in LaTeX."""
    lines = [line[: -len(r" \\")].split(" & ") for line in table.splitlines() if " & " in line]
    return {words[0]: words[1:] for words in lines}


def test_the_headline_has_every_method_and_its_interval(study, tmp_path):
    text = open(write(study, tmp_path), encoding="utf-8").read()
    rows = rows_of((tmp_path / "tables" / "headline.tex").read_text())
    interval = [r"$-$30.0\% to $-$20.0\%"]
    assert rows["the model alone"] == ["12.00", "12.00", "", ""]
    assert rows["with neighbours"] == ["9.00", "9.00", r"$-$25.0\%", *interval]
    assert rows["with neighbours and a cache"] == ["8.00", "8.00", r"$-$25.0\%", *interval]
    assert rows["the cache, besides neighbours"] == ["", "", r"$-$12.5\%", *interval]
    assert "paired bootstrap over the 15 documents of" in Page(text).text


def test_nine_documents_have_no_interval_but_are_named(study, tmp_path):
    splits = summary(study, "valid", "test", units=9)
    text = Page(open(write(study, tmp_path, summary=splits), encoding="utf-8").read()).text
    assert "No interval is shown: test has 9 documents, and fewer than 10 say nothing" in text
    assert "-30.0%" not in text


@pytest.mark.parametrize("splits", [("valid",), ("valid", "valid")])
def test_one_split_for_both_is_named_as_such(study, tmp_path, splits):
    text = open(write(study, tmp_path, splits, data=study.tuned_on), encoding="utf-8").read()
    assert "figures of the same split: better than they will be on another text" in text


@pytest.mark.parametrize("knn_lambda, result", [(0.0, 12.0), (1.0, math.inf)])
def test_neighbours_that_never_help_and_a_lambda_that_is_impossible(
    study, tmp_path, knn_lambda, result
):
    grid = [KNNGridPoint(8, 1.0, knn_lambda, result)]
    write(study, tmp_path, knn_grid=grid, sizes=tune_sizes(study.tuned_on, 1.0))
    (row,) = strict_json((tmp_path / "report.json").read_text())["tables"]["helped_or_hurt"]
    assert knn_lambda > 0 or row["helped"] == row["hurt"] == 0


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def tune_copy(data, checkpoints, datastores, tmp_path):
    """Run ``fairseq-knnlm-tune`` in this process, on a copy of a datastore."""

    def run(*flags):
        shutil.copytree(datastores["plain"], tmp_path / "d", dirs_exist_ok=True)
        call(
            tune.main, data, "--path", checkpoints["plain"], "--knn-datastore", tmp_path / "d",
            "--knn-k", 64, "--tokens-per-sample", 32, "--cpu", "--log-format", "none",
            "--num-workers", 0, *flags,
        )  # fmt: skip

    return run


def test_the_command_writes_a_report_without_a_second_search(tune_copy, tmp_path, monkeypatch):
    searches = []
    collect = split_data.collect
    monkeypatch.setattr(
        split_data, "collect", lambda *args, **named: searches.append(1) or collect(*args, **named)
    )
    flags = ["--report-subset", "test", "--knn-output", tmp_path / "o.json"]
    tune_copy(*flags)
    alone, output = len(searches), json.loads((tmp_path / "o.json").read_text())
    tune_copy(*flags, "--report", tmp_path / "r")
    assert alone > 0 and len(searches) == 2 * alone
    data = strict_json((tmp_path / "r" / "report.json").read_text())
    for name in ("tuned_on", "reported_on", "best", "command"):
        assert data[name] == output[name]
    assert "--report" not in shlex.split(data["command"])
    assert data["split"] == "test" and data["tables"]["grid"] == output["grid"]
    last = data["tables"]["k"][-1]
    if last["k"] == data["best"]["k"]:
        assert last["perplexity"] == pytest.approx(data["reported_on"]["knn_perplexity"], rel=1e-6)
    tokens = sum(row["tokens"] for row in data["tables"]["frequency"])
    assert tokens == data["reported_on"]["tokens"]


@pytest.fixture
def refused(tune_copy, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(split_data, "collect", lambda *args, **named: pytest.fail("it ran"))
        with pytest.raises(UserError) as error:
            tune_copy(*flags)
        return str(error.value)

    return run


def test_a_directory_that_cannot_be_is_refused_before_any_work(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "r", "/nonesuch/r", ""):
        assert f"--report {directory} cannot be written" in refused("--report", directory)


def test_matplotlib_that_is_missing_is_refused_before_any_work(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused("--report", tmp_path / "r")
    assert "pip install 'fairseq_knnlm[plot]'" in message and "\n" not in message
    assert not (tmp_path / "r").exists()
