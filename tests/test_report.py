"""The report: its numbers against plain numpy, its files, and the page."""

import csv
import html.parser
import io
import json
import math
import re
import shlex
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from helpers import all_distances, make_dictionary, random_keys
from oracle import knn_log_probs, perplexity

from fairseq_knnlm import analysis, report
from fairseq_knnlm.bootstrap import paired_interval
from fairseq_knnlm.cli import retrieval, tune
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.neighbors_file import PARTS, Retrieved, parts_of
from fairseq_knnlm.sweep import Setting, best, sweep

ENTRIES, ROWS, K, TYPES = 2000, 300, 64, 24
KEYS = random_keys(1, ENTRIES, 6)
# one for each cluster of keys, two rarer ones, and two that never occur
VALUES = np.random.default_rng(1).integers(20, size=ENTRIES)
VALUES[:5], VALUES[5:35] = 20, 21
FIGURES = ("k", "found", "lambda", "temperature", "size", "frequency", "log_ratio")


def queries(seed):
    return random_keys(seed, ROWS, 6).astype(np.float32)


def targets(seed):
    """Those of the cluster of the query, and others."""
    chance = np.random.default_rng(seed)
    clusters = chance.integers(20, size=ROWS)
    return np.where(chance.random(ROWS) < 0.7, clusters, chance.integers(TYPES, size=ROWS))


def retrieve(seed):
    """The nearest neighbours of random queries, by brute force."""
    exact = all_distances(queries(seed), KEYS)
    ids = np.argsort(exact, axis=1, kind="stable")[:, :K]
    log_p_lm = np.log(np.random.default_rng(seed).random(ROWS)).astype(np.float32)
    return Retrieved(
        torch.from_numpy(log_p_lm),
        torch.from_numpy(np.take_along_axis(exact, ids, axis=1).astype(np.float32)),
        torch.from_numpy(VALUES[ids] == targets(seed)[:, None]),
        torch.from_numpy(targets(seed)),
        np.arange(0, ROWS, 20),
        parts_of(torch.from_numpy(ids)),
    )


@pytest.fixture(scope="module")
def found():
    """Retrieved for the split that is tuned on, its grid, retrieved for another, and tables."""
    tuned_on, reported_on = retrieve(3), retrieve(4)
    settings = sweep(tuned_on, [1, 8, K], [0.5, 2.0, 8.0])
    sizes = analysis.tune_sizes(tuned_on, best(settings).temperature)
    counts = np.bincount(VALUES, minlength=TYPES)
    symbols = [f"w{token}" for token in range(TYPES)]
    tables = analysis.tables(settings, reported_on, True, sizes, counts, symbols)
    return types.SimpleNamespace(
        tuned_on=tuned_on, reported_on=reported_on, settings=settings, best=best(settings),
        sizes=sizes, tables=tables,
    )  # fmt: skip


def log_p_knn(seed, k, temperature, keys=KEYS, values=VALUES):
    return knn_log_probs(keys, values, queries(seed), targets(seed), k, temperature)


def expected(seed, setting):
    log_p_lm = np.log(np.random.default_rng(seed).random(ROWS)).astype(np.float32)
    scores = log_p_knn(seed, setting["k"], setting["temperature"])
    return perplexity(log_p_lm, scores, setting["knn_lambda"])


def log_ratios(found):
    """ln(p_mixture / p_lm) of the split that is reported on."""
    scores = log_p_knn(4, found.best.k, found.best.temperature)
    log_p_lm = found.reported_on.log_p_lm.double().numpy()
    weight = found.best.knn_lambda
    return np.logaddexp(log_p_lm + np.log1p(-weight), scores + np.log(weight)) - log_p_lm


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k", "k_at_temperature", "temperature"])
def test_curves_are_chosen_on_one_split_and_told_of_another(found, name):
    rows = found.tables[name]
    assert len(rows) == 3
    for row in rows:
        assert row["perplexity"] == pytest.approx(expected(4, row), rel=1e-4)
        assert row["tuned_perplexity"] == pytest.approx(expected(3, row), rel=1e-4)
        if name != "temperature":
            same_k = [each.perplexity for each in found.settings if each.k == row["k"]]
            assert row["tuned_perplexity"] == min(same_k) or name == "k_at_temperature"
    if name == "k_at_temperature":
        assert {row["temperature"] for row in rows} == {found.best.temperature}


def test_one_split_for_both_takes_the_grid_as_it_is(found):
    counts = np.bincount(VALUES, minlength=TYPES)
    tables = analysis.tables(
        found.settings, found.tuned_on, False, found.sizes, counts, ["w"] * TYPES
    )
    assert all(row["perplexity"] == row["tuned_perplexity"] for row in tables["k"])


def test_the_curve_over_lambda(found):
    rows = found.tables["lambda"]
    assert rows[0]["knn_lambda"] == 0 and rows[-1]["knn_lambda"] < 1
    assert found.best.knn_lambda in [row["knn_lambda"] for row in rows]
    for row in rows:
        setting = {**found.best._asdict(), **row}
        assert row["perplexity"] == pytest.approx(expected(4, setting), rel=1e-4)


def test_a_part_of_the_datastore_has_the_neighbours_of_a_smaller_one(found):
    parts = parts_of(torch.arange(ENTRIES)).numpy()
    rows = found.tables["size"]
    assert [row["entries"] for row in rows] == [125, 250, 500, 1000, 2000] * 2
    for row in rows:
        if row["k"] is None:
            continue
        within = parts < row["share"] * PARTS
        assert within.sum() == pytest.approx(row["entries"], rel=0.1)
        scores = log_p_knn(4, row["k"], found.best.temperature, KEYS[within], VALUES[within])
        # these are exact where as many were known, and only there
        log_p_lm = found.reported_on.log_p_lm.numpy()
        got = analysis.log_p_knn_of_part(
            found.reported_on, round(row["share"] * PARTS), row["k"], found.best.temperature
        )
        known = (found.reported_on.parts.numpy() < row["share"] * PARTS).sum(axis=1)
        enough = known >= row["k"]
        assert row["queries_with_fewer"] == pytest.approx(1 - enough.mean())
        np.testing.assert_allclose(got.numpy()[enough], scores[enough], rtol=1e-3, atol=1e-4)
        if enough.all():
            assert row["perplexity"] == pytest.approx(
                perplexity(log_p_lm, scores, row["knn_lambda"]), rel=1e-4
            )


def test_the_whole_datastore_is_the_part_that_has_all(found):
    (row,) = (row for row in found.tables["size"] if row["share"] == 1 and row["k"] is None)
    assert row["mean_neighbors"] == K
    setting = {"k": K, "temperature": found.best.temperature, "knn_lambda": row["knn_lambda"]}
    assert row["perplexity"] == pytest.approx(expected(4, setting), rel=1e-4)


def test_missing_neighbours_are_in_no_part(found):
    distances = found.reported_on.distances.clone()
    distances[:, 5:] = math.inf
    fewer = found.reported_on._replace(distances=distances)
    (row,) = analysis._size_curve(fewer, [analysis.SizeSetting(PARTS, None, 0.1)], 1.0, ENTRIES)
    assert row["mean_neighbors"] == 5


def test_targets_found(found):
    matches = found.reported_on.matches.numpy()
    assert found.tables["found"] == [
        {"k": k, "targets_found": pytest.approx(matches[:, :k].any(axis=1).mean())}
        for k in (1, 8, K)
    ]


def test_buckets_of_frequency(found):
    counts = np.bincount(VALUES, minlength=TYPES)[targets(4)]
    log_p_lm = found.reported_on.log_p_lm.double().numpy()
    mixed = log_p_lm + log_ratios(found)
    rows = found.tables["frequency"]
    assert [(row["lowest"], row["highest"]) for row in rows] == [
        (0, 0), (1, 9), (10, 99), (100, 999),
    ]  # fmt: skip
    assert sum(row["tokens"] for row in rows) == ROWS
    for row in rows:
        within = (counts >= row["lowest"]) & (counts <= row["highest"])
        assert row["tokens"] == within.sum() and row["share"] == within.mean()
        base, knn = np.exp(-log_p_lm[within].mean()), np.exp(-mixed[within].mean())
        assert [row["base_perplexity"], row["knn_perplexity"]] == pytest.approx(
            [base, knn], rel=1e-4
        )
        assert row["relative_change"] == pytest.approx(knn / base - 1, rel=1e-3, abs=1e-6)
        if row["low"] is not None:
            assert row["low"] <= row["relative_change"] <= row["high"]
    # never in the datastore: neighbours take lambda away and give nothing
    assert rows[0]["relative_change"] == pytest.approx(1 / (1 - found.best.knn_lambda) - 1)


def test_a_bucket_of_all_tokens_has_the_interval_of_the_whole():
    chance = np.random.default_rng(1)
    log_p_lm, mixed = -chance.random((2, 500))
    starts = np.arange(0, 500, 25)
    (row,) = analysis._by_frequency(np.full(500, 12), log_p_lm, mixed, starts)
    whole = paired_interval(log_p_lm, mixed, starts)
    assert (row["low"], row["high"]) == (whole.low, whole.high)
    (row,) = analysis._by_frequency(np.full(500, 12), log_p_lm, mixed, starts[:3])
    assert row["low"] is None  # one block


def test_helped_and_hurt(found):
    ratios = log_ratios(found)
    (row,) = found.tables["helped_or_hurt"]
    assert row["helped"] == (ratios > 0).mean() and row["hurt"] == (ratios < 0).mean()
    assert row["nats_gained"] == pytest.approx(ratios[ratios > 0].sum(), rel=1e-4)
    assert row["nats_lost"] == pytest.approx(ratios[ratios < 0].sum(), rel=1e-4)
    assert row["median"] == pytest.approx(np.median(ratios), abs=1e-4)
    assert row["doubled"] == (ratios >= np.log(2)).mean()


def test_the_histogram_holds_every_token_where_it_belongs(found):
    rows = found.tables["log_ratio"]
    assert sum(row["tokens"] for row in rows) == ROWS
    assert sum(row["nats"] for row in rows) == pytest.approx(log_ratios(found).sum(), rel=1e-3)
    rows = list(analysis._histogram(np.array([-9.0, -0.05, 0.0, 0.05, 0.1001, 50.0])))
    assert {(row["from"], row["to"]): row["tokens"] for row in rows if row["tokens"]} == {
        (None, -3.9): 1, (-0.1, 0.0): 1, (0.0, 0.1): 2, (0.1, 0.2): 1, (7.0, None): 1,
    }  # fmt: skip


def test_types_that_gain_and_lose_most(found):
    ratios, counts = log_ratios(found), np.bincount(VALUES, minlength=TYPES)
    nats = {token: ratios[targets(4) == token].sum() for token in set(targets(4).tolist())}
    rows = found.tables["types"]
    order = sorted(nats, key=nats.get)
    gained = [token for token in order[::-1] if nats[token] > 0][:15]
    lost = [token for token in order if nats[token] < 0][:15]
    # types that are never found lose the same: any of them will do
    assert lost and [row["nats"] for row in rows] == pytest.approx(
        [nats[token] for token in gained + lost], rel=1e-3, abs=1e-4
    )
    for row in rows:
        token = int(row["token"][1:])
        assert row["nats"] == pytest.approx(nats[token], rel=1e-3, abs=1e-4)
        assert row["occurrences"] == (targets(4) == token).sum()
        assert row["training_count"] == counts[token]
        assert row["mean_log_ratio"] == row["nats"] / row["occurrences"]


def test_training_counts_of_several_datastores(monkeypatch):
    monkeypatch.setattr(analysis, "_COUNTED", 7)
    stores = [types.SimpleNamespace(values=VALUES.astype(np.uint16)) for _ in range(2)]
    counts = analysis.training_counts(stores, TYPES)
    assert np.array_equal(counts, 2 * np.bincount(VALUES, minlength=TYPES))


# -- files and page --------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Everything that a page refers to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.references, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def summary(found, *splits):
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
        "best": found.best._asdict(),
        "command": "fairseq-eval-lm '<b>' --knn-k 8",
    }


def write(found, directory, splits=("valid", "<i>test</i>"), **changed):
    """Write a report of a datastore and a dictionary with names that HTML must not see."""
    manifest = {
        "count": ENTRIES, "dimension": 6, "key": {"type": "ffn-input", "layer": 1},
        "metric": "l2", "index": {"factory": "Flat"},
    }  # fmt: skip
    datastore = types.SimpleNamespace(values=VALUES, manifest=manifest, path="a&<script>b</script>")
    dictionary = make_dictionary(TYPES - 4)
    dictionary.symbols[:2] = ['<script>alert("1")</script>', "&amp;"]
    parts = {
        "settings": found.settings, "retrieved": found.reported_on, "sizes": found.sizes,
        "summary": summary(found, *splits),
        "retriever": types.SimpleNamespace(datastores=[datastore], nprobe=32, distances="exact"),
        "dictionary": dictionary, **changed,
    }  # fmt: skip
    return report.write(str(directory), **parts)


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_every_file_is_there_and_says_the_same(found, tmp_path):
    page = write(found, tmp_path / "new")
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
    write(found, tmp_path / "new")
    assert (tmp_path / "new" / "report.html").read_bytes() == first


def test_the_page_needs_nothing_else_and_escapes_what_is_data(found, tmp_path):
    text = open(write(found, tmp_path), encoding="utf-8").read()
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
def test_one_split_is_told_plainly(found, tmp_path, splits):
    text = open(write(found, tmp_path, splits, retrieved=found.tuned_on), encoding="utf-8").read()
    assert "figures of the same split: better than they will be on another text" in text


@pytest.mark.parametrize("knn_lambda, result", [(0.0, 12.0), (1.0, math.inf)])
def test_neighbours_that_never_help_and_a_lambda_that_is_impossible(
    found, tmp_path, knn_lambda, result
):
    settings = [Setting(8, 1.0, knn_lambda, result)]
    write(found, tmp_path, settings=settings, sizes=analysis.tune_sizes(found.tuned_on, 1.0))
    (row,) = strict_json((tmp_path / "report.json").read_text())["tables"]["helped_or_hurt"]
    assert knn_lambda > 0 or row["helped"] == row["hurt"] == 0


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def call(data, checkpoints, datastores, tmp_path):
    """Run ``fairseq-knnlm-tune`` in this process, on a copy of a datastore."""

    def run(*flags):
        shutil.copytree(datastores["plain"], tmp_path / "d", dirs_exist_ok=True)
        tune.main([str(word) for word in (
            data, "--path", checkpoints["plain"], "--knn-datastore", tmp_path / "d",
            "--knn-k", 64, "--tokens-per-sample", 32, "--cpu", "--log-format", "none",
            "--num-workers", 0, *flags,
        )])  # fmt: skip

    return run


def test_the_command_writes_a_report_without_a_second_search(call, tmp_path, monkeypatch):
    searches = []
    search = retrieval.encode_and_map
    monkeypatch.setattr(
        retrieval, "encode_and_map", lambda *args: searches.append(1) or search(*args)
    )
    flags = ["--report-subset", "test", "--knn-output", tmp_path / "o.json"]
    call(*flags)
    alone, output = len(searches), json.loads((tmp_path / "o.json").read_text())
    call(*flags, "--report", tmp_path / "r")
    assert len(searches) == 2 * alone
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
def refused(call, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(retrieval, "encode_and_map", lambda *args: pytest.fail("it ran"))
        with pytest.raises(UserError) as error:
            call(*flags)
        return str(error.value)

    return run


def test_a_directory_that_cannot_be_is_refused_before_any_work(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "r", "/nonesuch/r", ""):
        assert f"--report {directory} cannot be written" in refused("--report", directory)


def test_matplotlib_that_is_missing_is_told_before_any_work(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused("--report", tmp_path / "r")
    assert "pip install 'fairseq_knnlm[plot]'" in message and "\n" not in message
    assert not (tmp_path / "r").exists()
