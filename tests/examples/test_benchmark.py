"""The benchmark, as a user starts it, on a model that is too small to be fast or slow."""

import json
import math
import sys
from pathlib import Path

import pytest
from fairseq.data.indexed_dataset import make_dataset
from helpers.commands import REPOSITORY, evaluate, run

SCRIPT = REPOSITORY / "examples" / "benchmark" / "benchmark.py"
KS, SHARES, CACHES = (2, 16), (1.0, 0.25), (20, 1000)
TYPES = ["Flat", "IVF8,Flat", "IVF8,PQ16x4fs"]


@pytest.fixture(scope="module")
def measured(data, checkpoints, datastores, tmp_path_factory):
    """The folder of a benchmark's results and what it printed; the whole datastore is there."""
    folder = tmp_path_factory.mktemp("benchmark")
    done = run(
        sys.executable, SCRIPT, data, "--path", checkpoints["adaptive"], "--cpu",
        "--tokens-per-sample", 32, "--max-tokens", 128, "--num-workers", 0,
        "--knn-index", "IVF8,PQ16x4fs", "--knn-nprobe", 4, "--k", *KS, "--shares", *SHARES,
        "--knn-datastore", datastores["adaptive"],
        "--cache-sizes", *CACHES,
        "--tokens", 300, "--queries", 200, "--straightforward-tokens", 150, "--repeats", 1,
        "--generated", 6, "--floor-tokens", 1,
        "--kinds", "as it is", "--index-types", *TYPES, "--index-queries", 100,
        "--work", folder / "work", "--json", folder / "results.json",
        "--plot", folder / "results.png",
    )  # fmt: skip
    return folder, done.stdout


@pytest.fixture(scope="module")
def results(measured):
    folder, _ = measured
    return json.loads((folder / "results.json").read_text())


def rows_of(results, method):
    return [row for row in results["methods"] if row["method"] == method]


def test_every_row_is_there(results):
    assert [row["name"] for row in results["floor"]] == ["stock", "bare forward", "dump"]
    assert [row["share"] for row in results["datastores"]] == list(SHARES)
    settings = {(k, distances) for k in KS for distances in ("index", "exact")}
    for share in SHARES:
        ours = [row for row in rows_of(results, "fairseq_knnlm") if row["share"] == share]
        assert {(row["k"], row["distances"]) for row in ours} == settings
        assert len(ours) == len(settings)
    assert len(rows_of(results, "straightforward")) == len(SHARES)
    for size in CACHES:
        of_cache = rows_of(results, f"cache of {size:,}")
        assert [row["share"] for row in of_cache] == list(SHARES)
        assert all(row["tokens_per_s"] > 0 for row in of_cache)
    assert len(rows_of(results, "exhaustive")) == len(SHARES) * len(KS)
    types = [(row["factory"], row["k"], row["distances"]) for row in results["index_types"]]
    assert sorted(types) == sorted((name, *setting) for name in TYPES for setting in settings)


def test_whole_commands_are_first_and_compared_with_stock(results, measured):
    rows = results["commands"]
    names = [f"k={k}, exact" for k in KS] + [f"k={KS[-1]}, index"]
    assert [row["name"] for row in rows] == ["stock", *names]
    for row in rows:
        # what the command prints is a part of the whole
        assert row["seconds"] > row["tokens"] / row["tokens_per_s"] > 0
        assert row["of_stock"] == pytest.approx(row["tokens_per_s"] / rows[0]["tokens_per_s"])
    _, printed = measured
    assert 0 < printed.find("\nfairseq-eval-lm ") < printed.find("\nmodel alone ")


def test_every_type_of_products_is_measured(results):
    (row,) = results["kinds"]
    assert (row["kind"], row["k"]) == ("as it is", KS[-1])
    assert row["float32_cpu_s"] > 0 and row["bfloat16_cpu_s"] > 0
    assert row["chosen"] is None  # the given datastore has no lists


def test_tables_and_plot_are_made(measured):
    folder, printed = measured
    for heading in ("model alone", "datastore", "method", "generation", "growth", "ratio", "index"):
        assert any(line.startswith(heading) for line in printed.splitlines()), heading
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_generation_takes_as_many_steps_with_neighbours(results):
    rows = results["generation"]
    assert [row["k"] for row in rows] == [None, *KS] * 2
    # two prompts of 8 tokens, 6 behind them, and </s>
    assert {row["tokens"] for row in rows} == {2 * 15}
    for row in rows:
        assert row["runs_s"] == [pytest.approx(row["tokens"] / row["tokens_per_s"])]
    for alone, row in [(rows[3 * (number // 3)], row) for number, row in enumerate(rows)]:
        assert row["of_alone"] == pytest.approx(row["tokens_per_s"] / alone["tokens_per_s"])


def test_ratios_are_those_of_the_rows(results):
    speed = {row["name"]: row["tokens_per_s"] for row in results["floor"]}
    ratios = {row["name"]: row["value"] for row in results["ratios"]}
    assert ratios["dump / bare forward"] == pytest.approx(speed["dump"] / speed["bare forward"])
    assert ratios["dump / stock fairseq-eval-lm"] == pytest.approx(speed["dump"] / speed["stock"])
    for row in rows_of(results, "fairseq_knnlm"):
        assert row["of_stock"] == pytest.approx(row["tokens_per_s"] / speed["stock"])
        assert row["runs_s"] == [pytest.approx(row["tokens"] / row["tokens_per_s"])]
        (model,) = (r for r in rows_of(results, "language model") if r["share"] == row["share"])
        beyond = 1 / row["tokens_per_s"] - 1 / model["tokens_per_s"]
        assert row["knn_us_per_token"] == pytest.approx(1e6 * beyond)
    large, small = rows_of(results, "straightforward")
    growth = {row["method"]: row for row in results["growth"]}["straightforward"]
    assert growth["time"] == pytest.approx(small["tokens_per_s"] / large["tokens_per_s"])
    assert growth["entries"] == pytest.approx(large["entries"] / small["entries"])


def test_exhaustive_search_finds_everything(results):
    flat = [row for row in results["index_types"] if row["factory"] == "Flat"]
    # the given datastore has a flat index
    ours = [row for row in rows_of(results, "fairseq_knnlm") if row["share"] == 1]
    for row in rows_of(results, "exhaustive") + flat + ours:
        assert row["recall"] == 1
        assert row["mass_recall"] == pytest.approx(1, abs=1e-5)
        # of equally near entries any is right, and their values differ
        assert abs(row["perplexity_gap"]) <= (0 if row.get("method") == "exhaustive" else 0.01)


def test_quality_is_in_range_and_consistent(results):
    of_neighbors = [row for row in results["methods"] if row["k"]] + results["index_types"]
    for row in of_neighbors:
        assert 0 <= row["recall"] <= 1 and 0 <= row["mass_recall"] <= 1
        assert 1 < row["perplexity"] < math.inf
    by_type = {(r["factory"], r["k"], r["distances"]): r for r in results["index_types"]}
    for k in KS:
        # keys, not codes: either kind of distances finds the same
        first, second = (by_type["IVF8,Flat", k, distances] for distances in ("index", "exact"))
        assert 0.5 < first["recall"] == pytest.approx(second["recall"], abs=1e-3)
        assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-3)
    # the whole command and the rows see the same text: its first tokens, and a little more
    whole = {row["name"]: row for row in results["commands"]}
    for row in rows_of(results, "fairseq_knnlm"):
        if row["k"] == max(KS) and row["share"] == 1:
            command = whole[f"k={row['k']}, {row['distances']}"]
            assert command["tokens"] == row["tokens"]
            assert command["perplexity"] == pytest.approx(row["perplexity"], rel=0.2)


def test_stock_is_stock(results, data, checkpoints):
    expected = evaluate(
        data, checkpoints["adaptive"], "--gen-subset", "valid", "--max-tokens", 128,
        task="language_modeling",
    )  # fmt: skip
    (stock,) = (row for row in results["floor"] if row["name"] == "stock")
    assert stock["perplexity"] == pytest.approx(expected, abs=0.01)


def test_a_short_text_is_repeated(data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from parts import write_part

    write_part(Path(data), tmp_path / "once", split="valid")
    write_part(Path(data), tmp_path / "long", split="valid", at_least=2000)
    once, long = (
        [line.tolist() for line in make_dataset(str(tmp_path / name / "valid"), impl="mmap")]
        for name in ("once", "long")
    )
    copies = len(long) // len(once)
    assert long == copies * once
    assert sum(map(len, long)) >= 2000 > sum(map(len, long)) - sum(map(len, once))


def test_measurements_take_turns(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from timing import interleaved, median, was_held_up

    turns, durations = [], iter([3.0, 50.0, 1.0, 2.0])

    def measure(name):
        turns.append(name)
        return {"seconds": next(durations)}

    runs = interleaved({name: lambda name=name: measure(name) for name in "ab"}, 3, long_s=10.0)
    assert turns == ["a", "b", "a", "a"]
    assert median(runs["a"], "seconds") == 2.0
    assert was_held_up([{"seconds": 10.0, "cpu_s": 1.0}])
    assert not was_held_up([{"seconds": 10.0, "cpu_s": 9.5}])


def test_memory_and_sizes_are_told(results, measured, datastores):
    folder, _ = measured
    given, built = results["datastores"]
    assert given["index_s"] is None and built["index_s"] > 0
    assert built["build_peak_bytes"] > 1 << 20
    for row, directory in (
        (given, datastores["adaptive"]),
        (built, folder / "work" / "datastore-0.25"),
    ):
        size = sum(path.stat().st_size for path in directory.iterdir())
        assert row["bytes_per_entry"] * row["entries"] == pytest.approx(size)
    assert all(row["peak_bytes"] > 1 << 20 for row in results["commands"])
    assert results["machine"]["torch_threads"] >= 1
    assert results["versions"]["faiss"]
