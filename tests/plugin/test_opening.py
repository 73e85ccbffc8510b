"""What the flags open: the settings that each command logs, and those of what was tuned."""

import json
import logging
import shutil

import numpy as np
import pytest
from helpers.commands import build, call, evaluate

from fairseq_knnlm.cli import inspect, tune
from fairseq_knnlm.datastore import read_manifest, read_tuned
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.hub import from_pretrained


@pytest.fixture(scope="module")
def tuned(data, checkpoints, datastores, tmp_path_factory):
    """Datastores after tuning, without and with a cache."""
    folder = tmp_path_factory.mktemp("tuned")
    for name, flags in (("alone", []), ("cache", ["--knn-cache-size", 40])):
        shutil.copytree(datastores["plain"], folder / name)
        (folder / name / "tuned.json").unlink(missing_ok=True)
        call(
            tune.main, data, "--path", checkpoints["plain"], "--knn-datastore", folder / name,
            "--knn-k", 16, "--tokens-per-sample", 32, "--cpu", "--log-format", "none", *flags,
        )  # fmt: skip
    return {name: folder / name for name in ("alone", "cache")}


def lines_of(log):
    """The log's lines of settings, and those of settings that are not used."""
    text = [line.split(" | ")[-1] for line in log.splitlines()]
    return [line for line in text if line.startswith(("settings:", "tuned "))]


class Lines(logging.Handler):
    """Keeps what is logged. Commands of ours take pytest's own handler away."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def logged(function, *arguments):
    """Run a function; gives what it logs of settings."""
    handler, logger = Lines(), logging.getLogger("fairseq_knnlm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        function(*arguments)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines_of("\n".join(handler.lines))


def test_an_evaluation_says_where_its_settings_come_from(data, checkpoints, datastores):
    auto = read_manifest(str(datastores["plain"]))["temperature"]["value"]
    flags = ["--knn-datastore", datastores["plain"], "--knn-k", 8]
    (line,) = logged(evaluate, data, checkpoints["plain"], *flags)[:1]
    assert line == (
        f"settings: k 8 (given), lambda 0.25 (default), temperature {auto:g} (auto, of the "
        "datastore), nprobe 32 (default), distances exact (default)"
    )
    (line,) = logged(evaluate, data, checkpoints["plain"])
    assert line == "settings: none, the language model alone"


def test_by_default_the_temperature_is_that_of_the_datastore(data, checkpoints, datastores):
    auto = read_manifest(str(datastores["plain"]))["temperature"]["value"]
    flags = ["--knn-datastore", datastores["plain"], "--knn-k", 8]
    default, typed, one = (
        evaluate(data, checkpoints["plain"], *flags, *more)
        for more in ([], ["--knn-temperature", auto], ["--knn-temperature", 1])
    )
    assert default == typed < one


def test_tuned_settings_that_are_not_used_are_named(data, checkpoints, tuned):
    flags = ["--knn-datastore", tuned["alone"]]
    stored = read_tuned(str(tuned["alone"]))
    _, unused = logged(evaluate, data, checkpoints["plain"], *flags, "--knn-k", 16)
    assert unused.startswith(f"tuned settings lie in {tuned['alone']} (k {stored['k']}, lambda ")
    assert unused.endswith("--knn-tuned uses them")
    (line,) = logged(evaluate, data, checkpoints["plain"], *flags, "--knn-tuned")
    assert f"lambda {stored['knn_lambda']:g} (tuned)" in line
    same = ["--knn-k", stored["k"], "--knn-lambda", stored["knn_lambda"]]
    same += ["--knn-temperature", stored["temperature"]]
    assert len(logged(evaluate, data, checkpoints["plain"], *flags, *same)) == 1


def test_what_was_tuned_with_other_datastores_is_not_named(
    data, checkpoints, datastores, tuned, tmp_path
):
    build(data, checkpoints["plain"], tmp_path / "other", "--knn-index", "IVF4,Flat")
    shutil.copy(tuned["alone"] / "tuned.json", tmp_path / "other")
    flags = ["--knn-datastore", tmp_path / "other", "--knn-k", 8]
    assert len(logged(evaluate, data, checkpoints["plain"], *flags)) == 1


def test_a_build_and_a_tuning_say_theirs(data, checkpoints, tuned, tmp_path, capsys):
    build(data, checkpoints["plain"], tmp_path / "d", "--knn-index", "Flat")
    assert lines_of(capsys.readouterr().out) == [
        "settings: key ffn-input (default), key layer -1 (default), metric l2 (default), index "
        "Flat (given)"
    ]
    call(
        tune.main, data, "--path", checkpoints["plain"], "--knn-datastore", tmp_path / "d",
        "--knn-k", 16, "--tokens-per-sample", 32, "--cpu", "--log-format", "none",
    )  # fmt: skip
    assert lines_of(capsys.readouterr().out) == [
        "settings: k 16 (given), nprobe 32 (default), distances exact (default); the others are "
        "tuned"
    ]


# -- a cache that was tuned, where there is none -----------------------------------------------


def test_the_best_without_a_cache_is_stored_as_well(tuned):
    alone, cache = (read_tuned(str(path)) for path in tuned.values())
    assert cache["cache_size"] and "without_cache" not in alone
    names = ("k", "knn_lambda", "temperature")
    assert cache["without_cache"] == {name: alone[name] for name in names}
    assert cache["knn_lambda"] != alone["knn_lambda"]


def test_generation_takes_it(data, checkpoints, tuned):
    given = []

    def scores(name):
        lm = from_pretrained(
            checkpoints["plain"].parent, checkpoints["plain"].name, data,
            knn_datastore=tuned[name], knn_tuned=True,
        )  # fmt: skip
        given.append(lm.score("w1 w7 w49")["positional_scores"].tolist())
        lm.score("w1 w7 w49")

    alone, cache = logged(scores, "alone"), logged(scores, "cache")
    assert cache == [
        *alone, "tuned with a continuous cache, which is not used here: the best without it",
    ]  # fmt: skip
    assert given[0] == given[1]


def test_an_inspection_takes_the_cache_as_well(data, checkpoints, tuned, tmp_path, capsys):
    file, tokens = tmp_path / "inspected.json", tmp_path / "tokens.npz"
    flags = ["--knn-datastore", tuned["cache"], "--knn-tuned", "--gen-subset", "valid"]
    evaluated = logged(evaluate, data, checkpoints["plain"], *flags, "--knn-output-tokens", tokens)
    capsys.readouterr()
    call(
        inspect.main, data, "--path", checkpoints["plain"], *flags, "--tokens-per-sample", 32,
        "--cpu", "--positions", "90:110", "--json", file,
    )  # fmt: skip
    assert lines_of(capsys.readouterr().out) == evaluated
    found = [token["p_mixture"] for token in json.loads(file.read_text())["tokens"]]
    np.testing.assert_allclose(found, np.exp(np.load(tokens)["log_p"][90:110]), rtol=1e-4)


def test_a_setting_with_a_cache_alone_or_a_flag_for_one_is_refused(
    data, checkpoints, tuned, tmp_path
):
    def load(**settings):
        lm = from_pretrained(
            checkpoints["plain"].parent, checkpoints["plain"].name, data, **settings
        )
        lm.score("w1 w7 w49")

    shutil.copytree(tuned["cache"], tmp_path / "d")
    stored = read_tuned(str(tmp_path / "d"))
    with pytest.raises(UserError, match="knows no continuous cache"):
        load(knn_datastore=tmp_path / "d", knn_tuned=True, knn_cache_size=stored["cache_size"])
    with pytest.raises(UserError, match="knows no continuous cache"):
        load(knn_datastore=tmp_path / "d", knn_k=8, knn_cache_size=10)
