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
from helpers.study import ENTRIES, ROWS, TYPES, VALUES

from fairseq_knnlm.cli import split_data, tune
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.reporting import report
from fairseq_knnlm.reporting.sizes import tune_sizes
from fairseq_knnlm.tuning.grid import KNNGridPoint

FIGURES = ("k", "found", "lambda", "temperature", "size", "frequency", "log_ratio")


def summary(study, *splits):
    result = {
        "tokens": ROWS,
        "base_perplexity": 12.0,
        "knn_perplexity": 9.0,
        "relative_change": {
            "value": -0.25, "low": -0.3, "high": -0.2, "units": 15, "unit": "documents",
        },
    }  # fmt: skip
    roles = zip(("tuned_on", "reported_on"), splits)
    return {
        **{role: {"split": split, **result} for role, split in roles},
        "best": study.best._asdict(),
        "command": "fairseq-eval-lm '<b>' --knn-k 8",
    }


def write(study, directory, splits=("valid", "<i>test</i>"), **changed):
    """Write a report of a datastore and a dictionary with names that HTML must not see."""
    manifest = {
        "count": ENTRIES, "dimension": 6, "key": {"type": "ffn-input", "layer": 1},
        "metric": "l2", "index": {"factory": "Flat"},
    }  # fmt: skip
    datastore = types.SimpleNamespace(values=VALUES, manifest=manifest, path="a&<script>b</script>")
    dictionary = make_dictionary(TYPES - 4)
    dictionary.symbols[:2] = ['<script>alert("1")</script>', "&amp;"]
    parts = {
        "grid": study.grid, "data": study.reported_on, "sizes": study.sizes,
        "summary": summary(study, *splits),
        "retriever": types.SimpleNamespace(datastores=[datastore], nprobe=32, distances="exact"),
        "dictionary": dictionary, **changed,
    }  # fmt: skip
    return report.write(str(directory), **parts)


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_every_file_is_there_and_says_the_same(study, tmp_path):
    page = write(study, tmp_path / "new")
    assert page == str(tmp_path / "new" / "report.html")
    data = strict_json((tmp_path / "new" / "report.json").read_text())
    names = {f"{name}.png" for name in FIGURES} | {f"{name}.csv" for name in data["tables"]}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "report.html", "report.json", *names,
    }  # fmt: skip
    for name in FIGURES:
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name, rows in data["tables"].items():
        text = (tmp_path / "new" / f"{name}.csv").read_bytes().decode()
        read = list(csv.DictReader(io.StringIO(text, newline="")))
        assert [list(row.values()) for row in read] == [
            ["" if value is None else str(value) for value in row.values()] for row in rows
        ]
    first = (tmp_path / "new" / "report.html").read_bytes()
    write(study, tmp_path / "new")
    assert (tmp_path / "new" / "report.html").read_bytes() == first


def test_the_page_needs_nothing_else_and_escapes_what_is_data(study, tmp_path):
    text = open(write(study, tmp_path), encoding="utf-8").read()
    page = Page(text)
    assert page.tags.count("img") == len(FIGURES)
    assert all(reference.startswith("data:") for reference in page.references)
    assert "default-src 'none'" in text and not re.search(r"url\(|@import", text)
    assert not {"script", "i", "object", "iframe"} & set(page.tags)
    for shown in ("a&<script>b</script>", '<script>alert("1")</script>', "&amp;", "<i>test</i>"):
        assert shown in page.text
    assert "fairseq-eval-lm '<b>' --knn-k 8" in page.text
    assert "settings tuned on valid, figures of <i>test</i>" in page.text
    assert "-25.0%" in page.text and "-30.0% to -20.0% (15 documents)" in page.text


@pytest.mark.parametrize("splits", [("valid",), ("valid", "valid")])
def test_one_split_for_both_is_named_as_such(study, tmp_path, splits):
    text = open(write(study, tmp_path, splits, data=study.tuned_on), encoding="utf-8").read()
    assert "figures of the same split: better than they will be on another text" in text


@pytest.mark.parametrize("knn_lambda, result", [(0.0, 12.0), (1.0, math.inf)])
def test_neighbours_that_never_help_and_a_lambda_that_is_impossible(
    study, tmp_path, knn_lambda, result
):
    grid = [KNNGridPoint(8, 1.0, knn_lambda, result)]
    write(study, tmp_path, grid=grid, sizes=tune_sizes(study.tuned_on, 1.0))
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
