"""Tuning: the grid against one evaluation at a time, what it leaves, and what is refused."""

import itertools
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
from fairseq.logging import progress_bar
from helpers import oracle
from helpers.commands import build, call, command, evaluate, knnlm, run

from fairseq_knnlm.cli import split_data, tune
from fairseq_knnlm.datastore.manifest import MANIFEST, read_manifest
from fairseq_knnlm.datastore.tuned import read_tuned
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.files import render

GRID = {"k": [1, 8, 64], "temperature": [0.05, 5.0], "lambda": [0.2, 0.999]}
INDEXES = {"flat": "Flat", "ivf": "IVF16,PQ32x4fs"}


@pytest.fixture(scope="module")
def built(data, checkpoints, tmp_path_factory):
    """Datastores of the plain model, one an index."""
    folder = tmp_path_factory.mktemp("tuned")
    for name, factory in INDEXES.items():
        build(data, checkpoints["plain"], folder / name, "--knn-index", factory)
    return {name: folder / name for name in INDEXES}


@pytest.fixture
def tuned(data, checkpoints, built, tmp_path, capsys):
    """Run the command in this process; gives what it writes as JSON, and the log."""

    def tuned_with(*flags, name="plain", datastore=built["flat"], data=data):
        output = tmp_path / "output.json"
        capsys.readouterr()
        call(
            tune.main, data, "--path", checkpoints[name], "--knn-datastore", datastore,
            "--knn-k", 64, "--tokens-per-sample", 32, "--cpu", "--log-format", "none",
            "--num-workers", 0, "--knn-output", output, *flags,
        )  # fmt: skip
        return {**json.loads(output.read_text()), "log": capsys.readouterr().out}

    return tuned_with


@pytest.fixture
def refused(tuned):
    """The message with which flags are refused, before any forward pass."""

    def message(*flags, **others):
        with pytest.MonkeyPatch.context() as patch:
            without_model(patch)
            with pytest.raises(UserError) as error:
                tuned(*flags, **others)
        return str(error.value)

    return message


def without_model(monkeypatch):
    monkeypatch.setattr(split_data, "collect", lambda *args, **named: pytest.fail("it ran"))


def grid_flags(grid):
    return [
        word
        for name, values in grid.items()
        for word in (f"--knn-grid-{name}", ",".join(map(str, values)))
    ]


def knn_flags(setting):
    return [
        "--knn-k", setting["k"], "--knn-lambda", setting["knn_lambda"],
        "--knn-temperature", setting["temperature"],
    ]  # fmt: skip


# -- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index, context",
    [("flat", []), ("ivf", []), ("ivf", ["--context-window", "8", "--knn-nprobe", "3"])],
    ids=str,
)
def test_every_setting_equals_an_evaluation(data, checkpoints, built, tuned, index, context):
    result = tuned(*grid_flags(GRID), *context, datastore=built[index])["grid"]
    assert [(s["k"], s["temperature"], s["knn_lambda"]) for s in result] == [
        (k, t, x) for t, k, x in itertools.product(GRID["temperature"], GRID["k"], GRID["lambda"])
    ]
    for setting in result:
        alone = evaluate(
            data, checkpoints["plain"], "--gen-subset", "valid", "--knn-datastore", built[index],
            *knn_flags(setting), *context,
        )  # fmt: skip
        assert setting["perplexity"] == pytest.approx(alone, rel=1e-5), setting


def test_the_grid_equals_brute_force(data, checkpoints, tuned):
    task, model = oracle.load(data, checkpoints["plain"], 32)
    keys, values, _ = oracle.score(task, model, "train")
    queries, targets, log_p_lm = oracle.score(task, model, "valid")
    for setting in tuned("--knn-grid-k", "5,64", "--knn-grid-temperature", "1,20")["grid"]:
        log_p_knn = oracle.knn_log_probs(
            keys, values, queries, targets, setting["k"], setting["temperature"]
        )
        expected = oracle.perplexity(log_p_lm, log_p_knn, setting["knn_lambda"])
        assert setting["perplexity"] == pytest.approx(expected, rel=1e-4)
        for knn_lambda in (setting["knn_lambda"] - 0.01, setting["knn_lambda"] + 0.01):
            assert oracle.perplexity(log_p_lm, log_p_knn, knn_lambda) > expected


def test_by_itself_it_tries_powers_of_two_and_never_loses(tuned):
    result = tuned("--knn-k", 48)
    assert {setting["k"] for setting in result["grid"]} == {1, 2, 4, 8, 16, 32, 48}
    assert result["best"] == min(result["grid"], key=lambda setting: setting["perplexity"])
    assert result["best"]["perplexity"] < result["tuned_on"]["base_perplexity"]


def test_a_lambda_of_1_that_is_impossible_is_null(tuned):
    result = tuned(*grid_flags({"k": [1], "temperature": [1.0], "lambda": [0.5, 1]}))
    assert result["grid"][1]["perplexity"] is None
    assert result["best"] == result["grid"][0]


# -- the report ------------------------------------------------------------------------------------


def test_it_reports_on_another_split_with_an_interval(data, checkpoints, tuned, built):
    result = tuned("--report-subset", "test")
    report = result["reported_on"]
    alone = evaluate(
        data, checkpoints["plain"], "--gen-subset", "test", "--knn-datastore", built["flat"],
        *knn_flags(result["best"]),
    )  # fmt: skip
    base = evaluate(data, checkpoints["plain"], "--gen-subset", "test")
    assert [report["base_perplexity"], report["knn_perplexity"]] == pytest.approx(
        [base, alone], rel=1e-5
    )
    change = report["relative_change"]
    assert change["value"] == pytest.approx(alone / base - 1, rel=1e-3)
    assert change["low"] < change["value"] < change["high"] < 0
    # the empty lines between the documents of the corpus
    assert (change["units"], change["unit"]) == (12, "documents")
    assert f"[{change['low']:+.2%}, {change['high']:+.2%}] (12 documents)" in result["log"]


def test_documents_of_a_break_mode_that_drops_what_separates_them(tuned):
    change = tuned("--sample-break-mode", "complete_doc")["tuned_on"]["relative_change"]
    assert (change["units"], change["unit"]) == (12, "documents")


def test_one_split_for_both_must_be_asked_for(data, refused, tuned, tmp_path):
    assert "--report-on-tuned" in refused("--report-subset", "valid")
    shutil.copytree(data, tmp_path / "bin")
    for kind in ("bin", "idx"):
        shutil.copy(data / f"valid.{kind}", tmp_path / "bin" / f"again.{kind}")
    message = refused("--report-subset", "again", data=tmp_path / "bin")
    assert "valid and --report-subset again are the same text" in message
    result = tuned("--report-subset", "valid", "--report-on-tuned")
    assert result["reported_on"] == result["tuned_on"]
    assert "too good" in result["log"]


def test_it_ends_with_a_command_and_one_line_of_json(data, checkpoints, datastores, tmp_path):
    shutil.copytree(datastores["adaptive"], tmp_path / "a store")
    tuned = knnlm(
        "fairseq-knnlm-tune", data, "--path", checkpoints["adaptive"], "--cpu",
        "--knn-datastore", tmp_path / "a store", "--knn-k", 64, "--tokens-per-sample", 32,
        "--context-window", 4, "--sample-break-mode", "complete", "--max-tokens", 200,
        "--knn-distances", "index", "--report-subset", "test", "--log-format", "json",
        "--knn-grid-k=16,64", "--knn-neighbors", tmp_path / "n.npz",
    ).stdout.splitlines()  # fmt: skip
    summary = json.loads(tuned[-1].split(" | ")[-1])
    assert tuned[-2].endswith(f"evaluate with: {summary['command']}")
    words = shlex.split(summary["command"])
    assert words[0] == "fairseq-eval-lm" and "--gen-subset" in words
    given = ["--context-window", "4", "--sample-break-mode", "complete", "--max-tokens", "200"]
    assert " ".join([*given, "--knn-distances", "index"]) in " ".join(words)
    assert not {"--report-subset", "--knn-neighbors", "--knn-grid-k"} & set(words)
    for flags in ([], ["--knn-tuned"]):
        evaluated = run(command(words[0]), *words[1:], *flags).stdout
        result = float(re.search(r"Perplexity: ([\d.]+)", evaluated).group(1))
        assert result == pytest.approx(summary["reported_on"]["knn_perplexity"], abs=0.006)


class Scalars:
    """In place of TensorBoard's writer: keeps what it is given."""

    written = {}

    def __init__(self, folder):
        self._written = self.written.setdefault(folder.rsplit("/")[-1], [])

    def add_text(self, name, text):
        pass

    def add_scalar(self, name, value, step):
        self._written.append((name, step, value))

    def flush(self):
        pass

    close = flush


def test_scalars_for_tensorboard(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(progress_bar, "SummaryWriter", Scalars)
    monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})
    result = tuned("--tensorboard-logdir", tmp_path / "board", "--knn-grid-k", "4,64")
    curve = {
        step: value for name, step, value in Scalars.written["tune_valid"] if name == "perplexity"
    }
    assert curve == {
        k: min(s["perplexity"] for s in result["grid"] if s["k"] == k) for k in (4, 64)
    }
    assert ("tokens", 1, result["tuned_on"]["tokens"]) in Scalars.written["retrieve_valid"]


@pytest.mark.parametrize("form", ["none", "simple", "json", "tqdm"])
def test_the_curve_is_logged_in_fairseqs_form(tuned, form):
    log = tuned("--log-format", form, "--log-interval", 1, "--knn-grid-k", "4,64")["log"]
    lines = [line.split(" | ", 3)[-1] for line in log.splitlines() if "| tune_valid |" in line]
    assert len(lines) == (0 if form == "none" else 2)
    if form == "json":
        assert [json.loads(line)["tune_valid_k"] for line in lines] == ["4", "64"]
    elif lines:
        assert [re.search(r"\| k (\d+) \|", line).group(1) for line in lines] == ["4", "64"]


# -- words of several tokens -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(data, checkpoints, tmp_path_factory):
    """The data with a third of its words marked as going on, and a datastore of it."""
    folder = tmp_path_factory.mktemp("pieces")
    shutil.copytree(data, folder / "bin")
    lines = (data / "dict.txt").read_text().splitlines()
    marked = [line.replace(" ", "@@ ", 1) if i % 3 == 0 else line for i, line in enumerate(lines)]
    (folder / "bin" / "dict.txt").write_text("\n".join(marked) + "\n")
    build(folder / "bin", checkpoints["plain"], folder / "d", "--knn-index", "Flat")
    return folder / "bin", folder / "d"


def test_perplexity_of_words_is_that_of_an_evaluation(checkpoints, tuned, pieces):
    texts, datastore = pieces
    flags = ["--remove-bpe", "@@ ", "--sample-break-mode", "complete"]
    result = tuned(
        *flags, "--report-subset", "test", "--knn-cache-size", 30, data=texts, datastore=datastore
    )
    of_tokens = tuned(*flags[2:], "--knn-cache-size", 30, data=texts, datastore=datastore)
    assert knn_flags(result["best"]) == knn_flags(of_tokens["best"])
    reported = result["reported_on"]
    assert reported["counted"] < 0.9 * reported["tokens"]
    for name in ("base", "cache", "knn", "knn_cache"):  # the same bits, divided by something else
        bits = np.log2(reported[f"{name}_perplexity"]) * reported["counted"]
        assert reported[f"{name}_bits_per_byte"] * reported["bytes"] == pytest.approx(bits)

    def evaluated(*more, split="test"):
        return evaluate(texts, checkpoints["plain"], "--gen-subset", split, *flags, *more)

    knn = ["--knn-datastore", datastore, *knn_flags(result["best"])]
    base, alone = evaluated(), evaluated(*knn)
    assert reported["base_perplexity"] == pytest.approx(base, rel=1e-5)
    assert reported["knn_perplexity"] == pytest.approx(alone, rel=1e-5)
    change = reported["relative_change"]
    assert change["value"] == pytest.approx(alone / base - 1, rel=1e-3)
    assert (change["units"], change["unit"]) == (12, "documents")
    on_valid = evaluated(*knn, split="valid")
    assert result["best"]["perplexity"] == pytest.approx(on_valid, rel=1e-5)
    both = result["best_knn_cache"]["perplexity"]
    assert both == pytest.approx(result["tuned_on"]["knn_cache_perplexity"], rel=1e-6)
    assert "--remove-bpe '@@ '" in result["command"]


def test_a_report_of_words(tuned, pieces, tmp_path):
    """Its curves are of words, as its headline is."""
    texts, datastore = pieces
    folder = tmp_path / "report"
    result = tuned(
        "--remove-bpe", "@@ ", "--report-subset", "test", "--report", folder, data=texts,
        datastore=datastore,
    )  # fmt: skip
    reported, best = result["reported_on"], result["best"]
    report = json.loads((folder / "report.json").read_text())
    tables = report["tables"]
    (at_best,) = (row for row in tables["k"] if row["k"] == best["k"])
    assert at_best["perplexity"] == pytest.approx(reported["knn_perplexity"], rel=1e-6)
    assert at_best["tuned_perplexity"] == best["perplexity"]
    assert tables["lambda"][0]["perplexity"] == pytest.approx(reported["base_perplexity"], rel=1e-6)
    whole = [row for row in tables["size"] if row["share"] == 1 and row["k"] is None]
    assert whole[0]["perplexity"] > 1.5 * reported["knn_perplexity"] ** (
        reported["counted"] / reported["tokens"]
    )
    assert sum(row["tokens"] for row in tables["log_ratio"]) == reported["tokens"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = " ".join(page.split())
    assert "Perplexity of words" in text
    assert f"{reported['counted']:,} words of test are {reported['tokens']:,} tokens" in text
    assert (
        f"{reported['base_bits_per_byte']:.3f} and {reported['knn_bits_per_byte']:.3f} bits" in text
    )


def test_words_that_cannot_be_counted_are_refused(refused, pieces):
    texts, datastore = pieces
    message = refused("--post-process", "letter", data=texts, datastore=datastore)
    assert "got 'letter'" in message


# -- the file of neighbours ------------------------------------------------------------------------


def test_saved_neighbours_replace_model_and_search(tuned, tmp_path, monkeypatch):
    flags = ["--report-subset", "test", "--knn-neighbors", tmp_path / "n.npz"]
    first = tuned(*flags)
    assert (tmp_path / "n.npz").exists() and (tmp_path / "n.test.npz").exists()
    without_model(monkeypatch)
    second = tuned(*flags)
    for name in ("grid", "tuned_on", "reported_on", "best"):
        assert second[name] == first[name]
    fewer = tuned(*flags, "--knn-k", 16)["grid"]
    of_first = {(s["k"], s["temperature"]): s["perplexity"] for s in first["grid"]}
    for setting in fewer:
        known = of_first.get((setting["k"], setting["temperature"]), setting["perplexity"])
        assert setting["perplexity"] == pytest.approx(known, rel=1e-6)


def test_what_is_saved(data, checkpoints, tuned, tmp_path):
    tuned("--knn-neighbors", tmp_path / "n.npz")
    task, model = oracle.load(data, checkpoints["plain"], 32)
    keys, values, _ = oracle.score(task, model, "train")
    queries, targets, log_p_lm = oracle.score(task, model, "valid")
    with np.load(tmp_path / "n.npz") as file:
        assert np.array_equal(file["targets"], targets)
        np.testing.assert_allclose(file["log_p_lm"], log_p_lm, rtol=1e-4, atol=1e-5)
        exact = ((queries[:, None] - keys.astype(np.float16).astype(np.float32)) ** 2).sum(axis=2)
        nearest = np.sort(exact, axis=1)[:, :64]
        np.testing.assert_allclose(file["distances"], nearest, rtol=1e-3, atol=1e-3)
        matches = np.unpackbits(file["matches"], axis=1, count=64).sum()
        order = np.argsort(exact, axis=1)[:, :64]
        # neighbours of equal distance at the end may be others
        assert matches == pytest.approx((values[order] == targets[:, None]).sum(), rel=0.01)
        settings = json.loads(str(file["settings"]))
    assert settings["data"]["split"] == "valid" and settings["k"] == 64


def test_neighbours_of_something_else_are_refused(
    data, tuned, refused, built, datastores, tmp_path
):
    flags = ["--knn-neighbors", tmp_path / "n.npz"]
    tuned(*flags)
    cases = [
        (["--gen-subset", "test"], {}, 'data was {"sha256"'),
        ([], {"name": "adaptive", "datastore": datastores["adaptive"]}, "model was "),
        ([], {"datastore": built["ivf"]}, "datastores was "),
        (["--knn-k", 65], {}, "k was 64, is 65"),
        (["--knn-nprobe", 4], {}, "nprobe was 32, is 4"),
        (["--knn-distances", "index"], {}, 'distances was "exact", is "index"'),
        (["--context-window", 8], {}, "context was "),
    ]
    for more, others, message in cases:
        assert message in refused(*flags, *more, **others)
    (tmp_path / "n.npz").write_text("text")
    assert "n.npz is not, or no longer, what" in refused(*flags)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--knn-grid-k", ""], ["--knn-grid-k", "[1, 64]", "''"]),
        (["--knn-grid-k", "8,65"], ["--knn-grid-k", "[1, 64]", "'8,65'"]),
        (["--knn-grid-k", "8,x"], ["--knn-grid-k", "separated by commas", "'8,x'"]),
        (["--knn-grid-temperature", "0,1"], ["--knn-grid-temperature", "> 0", "'0,1'"]),
        (["--knn-grid-temperature", "inf"], ["--knn-grid-temperature", "finite"]),
        (["--knn-grid-lambda", "0.5,1.5"], ["--knn-grid-lambda", "[0, 1]", "'0.5,1.5'"]),
        (["--knn-grid-lambda", ","], ["--knn-grid-lambda", "','"]),
        (["--knn-neighbors", "/nonesuch/n.npz"], ["--knn-neighbors /nonesuch/n.npz"]),
        (["--gen-subset", "nonesuch"], ["no split 'nonesuch'"]),
        (["--report-subset", "nonesuch"], ["no split 'nonesuch'"]),
        (["--knn-tuned"], ["--knn-tuned"]),
    ],
    ids=str,
)
def test_faults_are_found_before_any_work(refused, flags, parts):
    message = refused(*flags)
    assert all(part in message for part in parts), message


def test_a_text_of_unknown_words_is_refused(data, checkpoints, refused, tmp_path):
    (tmp_path / "unknown.txt").write_text("neither of these\nis known\n\nnor these\n")
    run(
        command("fairseq-preprocess"), "--only-source", "--srcdict", data / "dict.txt",
        "--validpref", tmp_path / "unknown.txt", "--destdir", tmp_path / "bin",
    )  # fmt: skip
    message = refused(data=tmp_path / "bin")
    assert "every word of the split 'valid' is unknown (<unk>)" in message


# -- the stored setting ----------------------------------------------------------------------------


@pytest.fixture
def stored(built, tuned, tmp_path):
    """A copy of a datastore after tuning with it, and what was result."""
    shutil.copytree(built["flat"], tmp_path / "d")
    return tmp_path / "d", tuned("--knn-nprobe", 5, datastore=tmp_path / "d")


def test_the_tuned_setting_evaluates_as_its_flags_do(data, checkpoints, stored):
    datastore, result = stored
    flags = ["--gen-subset", "valid", "--knn-datastore", datastore]
    alone = evaluate(data, checkpoints["plain"], *flags, "--knn-tuned")
    assert alone == pytest.approx(result["best"]["perplexity"], rel=1e-5)
    same = [*knn_flags(result["best"]), "--knn-nprobe", 5, "--knn-distances", "exact"]
    assert evaluate(data, checkpoints["plain"], *flags, "--knn-tuned", *same) == alone
    shown = knnlm("fairseq-knnlm-info", datastore).stdout
    assert f"tuned        k {result['best']['k']}, lambda {result['best']['knn_lambda']:g}" in shown


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--knn-k", 8], "--knn-k is 8, 64 was tuned"),
        (["--knn-nprobe", 6], "--knn-nprobe is 6, 5 was tuned"),
        (["--knn-distances", "index"], "--knn-distances is index, exact was tuned"),
        (["--knn-lambda", 0.9], "--knn-lambda is 0.9"),
        (["--knn-temperature", "auto"], "--knn-temperature is auto"),
        (["--knn-index", "IVF4,Flat"], "--knn-index IVF4,Flat"),
    ],
    ids=str,
)
def test_other_flags_than_tuned_are_refused(data, checkpoints, stored, flags, part):
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoints["plain"], "--knn-datastore", stored[0], "--knn-tuned", *flags)
    assert part in str(error.value)


def test_what_was_not_tuned_is_refused(data, checkpoints, built, stored, tmp_path):
    datastore, _ = stored

    def message(path):
        with pytest.raises(UserError) as error:
            evaluate(data, checkpoints["plain"], "--knn-datastore", path, "--knn-tuned")
        return str(error.value)

    shutil.copytree(built["ivf"], tmp_path / "other")
    (tmp_path / "other" / "tuned.json").unlink(missing_ok=True)
    assert "has no tuned.json: run fairseq-knnlm-tune" in message(tmp_path / "other")
    assert "was tuned with 1 datastores" in message(f"{datastore}:{built['flat']}")
    shutil.copy(datastore / "tuned.json", tmp_path / "other")
    assert "is not what was tuned with" in message(tmp_path / "other")
    shown = knnlm("fairseq-knnlm-info", tmp_path / "other").stdout
    assert "built again" in shown
    text = (datastore / "tuned.json").read_text()
    for edited in (text.replace('"k": 64', '"k": 32'), text[:-9], "[]", "7"):
        (datastore / "tuned.json").write_text(edited)
        assert "tuned.json is damaged" in message(datastore)


def test_tuned_without_a_datastore_is_refused(data, checkpoints):
    with pytest.raises(UserError, match="--knn-tuned needs the --knn-datastore"):
        evaluate(data, checkpoints["plain"], "--knn-tuned")


def test_several_datastores_are_tuned_as_one(data, checkpoints, built, tuned, tmp_path):
    shutil.copytree(built["flat"], tmp_path / "one")
    both = f"{tmp_path / 'one'}:{built['ivf']}"
    result = tuned("--knn-k", 8, datastore=both)
    flags = ["--gen-subset", "valid", "--knn-tuned", "--knn-datastore"]
    alone = evaluate(data, checkpoints["plain"], *flags, both)
    assert alone == pytest.approx(result["best"]["perplexity"], rel=1e-5)
    with pytest.raises(UserError, match="was tuned with 2 datastores"):
        evaluate(data, checkpoints["plain"], *flags, tmp_path / "one")
    with pytest.raises(UserError, match="is not what was tuned with"):
        evaluate(data, checkpoints["plain"], *flags, f"{tmp_path / 'one'}:{built['flat']}")


def test_a_datastore_that_cannot_be_written_to_is_tuned_all_the_same(tuned, monkeypatch):
    def fail(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr("fairseq_knnlm.tuning.choice.save_tuned", fail)
    assert "cannot be stored in the datastore" in tuned()["log"]


def test_building_anew_removes_what_was_tuned(data, checkpoints, stored):
    datastore, _ = stored
    assert read_tuned(str(datastore)) is not None
    build(data, checkpoints["plain"], datastore, "--knn-index", "Flat", "--overwrite")
    assert read_tuned(str(datastore)) is None


def test_what_it_replaces_is_printed(stored, tuned):
    datastore, _ = stored
    before = read_tuned(str(datastore))
    log = tuned("--knn-k", 8, datastore=datastore)["log"]
    after = read_tuned(str(datastore))
    assert re.search(rf"stored in .*: k {after['k']}, lambda {after['knn_lambda']:g}, ", log)
    assert re.search(rf"in place of: k {before['k']}, lambda {before['knn_lambda']:g}, ", log)


def test_a_setting_of_more_text_is_replaced_only_if_asked_for(data, stored, refused, tuned):
    datastore, _ = stored
    on_train = tuned("--gen-subset", "train", datastore=datastore)
    assert "in place of" in on_train["log"]  # more text replaces less
    kept = read_tuned(str(datastore))
    message = refused(datastore=datastore)
    assert "tuned on more text" in message and "--overwrite" in message and "--no-store" in message
    assert f"{on_train['tuned_on']['tokens']:,} tokens" in message
    assert "in place of" not in tuned("--no-store", datastore=datastore)["log"]
    assert read_tuned(str(datastore)) == kept
    tuned("--overwrite", datastore=datastore)
    assert read_tuned(str(datastore))["tuned_on"]["split"] == "valid"


# -- the temperature to start with -----------------------------------------------------------------


def test_auto_is_what_the_build_recorded(data, checkpoints, built, tuned):
    recorded = read_manifest(str(built["flat"]))["temperature"]
    flags = ["--gen-subset", "valid", "--knn-datastore", built["flat"], "--knn-k", 64]
    auto, typed = (
        evaluate(data, checkpoints["plain"], *flags, "--knn-temperature", temperature)
        for temperature in ("auto", recorded["value"])
    )
    assert auto == typed
    best = tuned(*grid_flags({"k": [64], "lambda": [0.25]}))["best"]["perplexity"]
    assert best <= auto * (1 + 1e-6) <= 1.03 * best


def test_a_datastore_that_records_none_needs_a_number_or_tuning(
    data, checkpoints, built, tuned, tmp_path
):
    shutil.copytree(built["flat"], tmp_path / "old")
    manifest = read_manifest(str(tmp_path / "old"))
    del manifest["temperature"]
    (tmp_path / "old" / MANIFEST).write_bytes(render(manifest))
    flags = ["--knn-datastore", tmp_path / "old", "--knn-k", 8]
    for more in ([], ["--knn-temperature", "auto"]):
        with pytest.raises(UserError, match="records no temperature.*--knn-temperature a number"):
            evaluate(data, checkpoints["plain"], *flags, *more)
    assert evaluate(data, checkpoints["plain"], *flags, "--knn-temperature", 3) < math.inf
    tuned(datastore=tmp_path / "old")
    tuned_flags = ["--knn-datastore", tmp_path / "old", "--knn-tuned"]
    assert evaluate(data, checkpoints["plain"], *tuned_flags) < math.inf
