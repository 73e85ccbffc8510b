"""What the commands write for machines, and its common keys."""

import json
import math
import shutil

import numpy as np
import pytest
from fairseq.data import Dictionary
from fairseq.data.data_utils import post_process
from helpers import oracle
from helpers.commands import build, call, evaluate, knnlm

from fairseq_knnlm.cli import inspect, tune
from fairseq_knnlm.datastore import file_fingerprint, read_manifest
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin import results

COMMON = {"program", "tokens", "model", "data", "context", "datastores", "versions"}
BYTES = ["bytes", "bits_per_byte", "base_bits_per_byte"]
SCORED = {*COMMON, "settings", "gate", "perplexity", "base_perplexity"}


@pytest.fixture
def neighbors(datastores):
    flags = ["--knn-k", 8, "--knn-temperature", 3, "--knn-lambda", 0.3]
    return ["--knn-datastore", datastores["plain"], *flags]


def test_an_evaluation(data, checkpoints, datastores, neighbors, tmp_path):
    file = tmp_path / "result.json"
    printed = evaluate(data, checkpoints["plain"], *neighbors, "--knn-output", file)
    result = json.loads(file.read_text())
    assert set(result) == {*SCORED, "split", "counted", "impossible", *BYTES}
    assert [result[name] for name in BYTES] == [None] * 3  # it is not said what the text is
    assert result["perplexity"] == pytest.approx(printed, rel=1e-5)
    base = evaluate(data, checkpoints["plain"])
    assert result["base_perplexity"] == pytest.approx(base, rel=1e-5)
    manifest = read_manifest(str(datastores["plain"]))
    assert result["datastores"][0]["checksum"] == manifest["checksum"]
    assert result["model"] == {
        "path": str(checkpoints["plain"]), "sha256": manifest["model"]["sha256"],
    }  # fmt: skip
    fingerprint = file_fingerprint(*(str(data / f"test.{kind}") for kind in ("idx", "bin")))
    assert (result["split"], result["data"]["sha256"]) == ("test", fingerprint)
    assert result["settings"]["k"] == {"value": 8, "source": "given"}
    assert result["settings"]["nprobe"] == {"value": 32, "source": "default"}
    assert result["context"]["tokens_per_sample"] == 32
    assert {"fairseq_knnlm", "fairseq", "torch", "numpy", "faiss"} <= set(result["versions"])


def test_every_token(data, checkpoints, datastores, neighbors, tmp_path):
    file, summary = tmp_path / "tokens.npz", tmp_path / "result.json"
    flags = [*neighbors, "--knn-cache-size", 50, "--knn-cache-lambda", 0.2, "--max-tokens", 64]
    evaluate(
        data, checkpoints["plain"], *flags, "--knn-output-tokens", file, "--knn-output", summary
    )
    columns = dict(np.load(file))
    task, model = oracle.load(data, checkpoints["plain"], 32)
    keys, values, _ = oracle.score(task, model, "train")
    queries, targets, log_p_lm = oracle.score(task, model, "test")
    log_p_knn = oracle.knn_log_probs(keys, values, queries, targets, 8, 3.0)
    assert columns["targets"].tolist() == targets.tolist()
    np.testing.assert_allclose(columns["log_p_lm"], log_p_lm, rtol=1e-4, atol=1e-4)
    found = np.isfinite(log_p_knn)
    np.testing.assert_array_equal(np.isfinite(columns["log_p_knn"]), found)
    np.testing.assert_allclose(columns["log_p_knn"][found], log_p_knn[found], rtol=1e-3, atol=1e-2)
    p_lm, p_knn, p_cache, p = (
        np.exp(columns[name].astype(np.float64))
        for name in ("log_p_lm", "log_p_knn", "log_p_cache", "log_p")
    )
    # the first token has an empty cache
    np.testing.assert_allclose(p[1:], (0.5 * p_lm + 0.3 * p_knn + 0.2 * p_cache)[1:], rtol=1e-5)
    mean = float(np.exp(-columns["log_p"].astype(np.float64).mean()))
    assert json.loads(summary.read_text())["perplexity"] == pytest.approx(mean, rel=1e-12)
    assert all(column.dtype == np.float32 for name, column in columns.items() if name != "targets")


def test_a_model_alone(data, checkpoints, tmp_path):
    file, tokens = tmp_path / "result.json", tmp_path / "tokens.npz"
    flags = ["--knn-output", file, "--knn-output-tokens", tokens]
    printed = evaluate(data, checkpoints["plain"], *flags)
    result = json.loads(file.read_text())
    assert result["perplexity"] == result["base_perplexity"] == pytest.approx(printed, rel=1e-5)
    assert result["settings"] == {} and result["datastores"] == []
    assert len(result["model"]["sha256"]) == 64
    assert sorted(np.load(tokens)) == ["log_p", "log_p_lm", "targets"]


def in_pieces(data, folder, form):
    """The data with another dictionary: every third token goes on, in the way of *form*."""
    shutil.copytree(data, folder)
    lines = (data / "dict.txt").read_text().splitlines()
    marked = [
        (line if i % 3 == 0 else f"▁{line}")
        if form == "sentencepiece"
        else (line.replace(" ", "@@ ", 1) if i % 3 == 0 else line)
        for i, line in enumerate(lines)
    ]
    (folder / "dict.txt").write_text("\n".join(marked) + "\n")
    return folder


@pytest.mark.parametrize("form", ["@@ ", "sentencepiece"])
def test_words_of_several_tokens(data, checkpoints, tmp_path, caplog, form):
    file, tokens, pieces = (tmp_path / name for name in ("r.json", "t.npz", "bin"))
    in_pieces(data, pieces, form)
    flags = ["--remove-bpe", form, "--knn-output", file, "--knn-output-tokens", tokens]
    with caplog.at_level("INFO"):
        printed = evaluate(pieces, checkpoints["plain"], *flags)
    result, columns = json.loads(file.read_text()), np.load(tokens)
    bits = -columns["log_p"].astype(np.float64).sum() / np.log(2)
    assert result["counted"] < result["tokens"] == len(columns["log_p"])
    assert result["perplexity"] == pytest.approx(printed, rel=1e-5)
    assert printed == pytest.approx(2 ** (bits / result["counted"]), rel=1e-5)
    # the text that the pieces are of
    dictionary = Dictionary.load(str(pieces / "dict.txt"))
    symbols = [dictionary[i] for i in columns["targets"]]
    lines = " ".join(symbols).split(" </s>")[:-1]
    text = "".join(post_process(line.strip(), form) + "\n" for line in lines)
    assert result["bytes"] == len(text.encode())
    assert result["bits_per_byte"] == result["base_bits_per_byte"]
    assert result["bits_per_byte"] == pytest.approx(bits / len(text.encode()))
    said = (
        f"perplexity is of {result['counted']:,} words; of their {result['tokens']:,} tokens it is"
    )
    assert f"{said} {2 ** (bits / result['tokens']):.2f}; " in caplog.text
    assert (
        f"{result['bits_per_byte']:.3f} bits for each of {result['bytes']:,} bytes" in caplog.text
    )


def test_words_that_stock_prints_are_not_those_of_sentencepiece(data, checkpoints, tmp_path):
    pieces = in_pieces(data, tmp_path / "bin", "sentencepiece")
    with pytest.raises(UserError, match="--output-word-probs and .* drop one"):
        evaluate(
            pieces, checkpoints["plain"], "--remove-bpe", "sentencepiece", "--output-word-probs"
        )


def test_an_impossible_token_is_counted(data, checkpoints, datastores, tmp_path):
    file = tmp_path / "result.json"
    flags = ["--knn-datastore", datastores["plain"], "--knn-k", 1, "--knn-lambda", 1]
    assert evaluate(data, checkpoints["plain"], *flags, "--knn-output", file) == math.inf
    result = json.loads(file.read_text())
    assert result["perplexity"] is None and 0 < result["impossible"] < result["tokens"]


@pytest.mark.parametrize("flag", ["--knn-output", "--knn-output-tokens"])
def test_what_cannot_be_written_is_refused_before_any_work(flag, data, checkpoints, monkeypatch):
    monkeypatch.setattr(
        "fairseq.tasks.language_modeling.LanguageModelingTask.load_dataset",
        lambda *args, **named: pytest.fail("the text was loaded"),
    )
    with pytest.raises(UserError, match=f"{flag} /nonesuch/file cannot be written"):
        evaluate(data, checkpoints["plain"], flag, "/nonesuch/file")
    with pytest.raises(UserError, match=f"{flag} / cannot be written"):
        evaluate(data, checkpoints["plain"], flag, "/")


def test_the_perplexity_is_not_lost_where_the_disk_is_full(
    data, checkpoints, tmp_path, monkeypatch
):
    def fail(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(results, "write_json", fail)
    perplexity = evaluate(data, checkpoints["plain"])
    expected = f"perplexity is {perplexity:.2f} over .* cannot write --knn-output .*No space left"
    with pytest.raises(UserError, match=expected):
        evaluate(data, checkpoints["plain"], "--knn-output", tmp_path / "result.json")


def test_a_share_of_a_text_is_refused(data, checkpoints, tmp_path):
    with pytest.raises(UserError, match="no process of 2 sees: evaluate in one process"):
        evaluate(
            data, checkpoints["plain"], "--num-shards", 2, "--shard-id", 0, "--knn-output",
            tmp_path / "result.json",
        )  # fmt: skip


def test_our_commands_have_the_same_keys(data, checkpoints, tmp_path):
    file, directory = tmp_path / "result.json", tmp_path / "d"

    def result_of(main, *flags):
        call(
            main, data, "--path", checkpoints["plain"], "--knn-datastore", directory, "--cpu",
            "--tokens-per-sample", 32, "--log-format", "none", "--knn-output", file, *flags,
        )  # fmt: skip
        return json.loads(file.read_text())

    build(data, checkpoints["plain"], directory, "--knn-index", "Flat", "--knn-output", file)
    built = json.loads(file.read_text())
    assert set(built) == {*COMMON, "settings"}
    assert built["settings"]["index"] == {"value": "Flat", "source": "given"}

    tuned = result_of(tune.main, "--knn-k", 16, "--knn-cache-size", 20)
    assert set(tuned) > {*SCORED, "tuned_on", "best", "grid", "command"}
    assert tuned["perplexity"] == tuned["tuned_on"]["knn_cache_perplexity"]
    assert tuned["settings"]["cache_size"]["source"] == "tuned"

    size = built["datastores"][0]["data"]["split"], tuned["tokens"]
    assert size == ("train", tuned["tuned_on"]["tokens"])
    evaluate(
        data, checkpoints["plain"], "--knn-datastore", directory, "--knn-tuned", "--gen-subset",
        "valid", "--knn-output", file,
    )  # fmt: skip
    evaluated = json.loads(file.read_text())
    assert evaluated["perplexity"] == pytest.approx(tuned["perplexity"], rel=1e-5)
    values = [
        {name: setting["value"] for name, setting in result["settings"].items()}
        for result in (evaluated, tuned)
    ]
    assert values[0] == values[1]

    looked_at = result_of(inspect.main, "--knn-tuned", "--positions", "0:30")
    assert set(looked_at) == {*SCORED, "counted", "source", "passage"}
    assert looked_at["tokens"] == len(looked_at["passage"]["tokens"]) == 30

    knnlm("fairseq-knnlm-info", directory, "--verify", "--knn-output", file)
    info = json.loads(file.read_text())
    assert set(info) == {*COMMON, "tuned", "verified"}
    assert info["datastores"] == built["datastores"] and info["verified"]
    assert info["tuned"]["k"] == tuned["best"]["k"]


@pytest.mark.parametrize("main", [tune.main, inspect.main])
def test_tokens_are_written_by_an_evaluation_alone(main, data, checkpoints, datastores, tmp_path):
    with pytest.raises(UserError, match="--knn-output-tokens is for fairseq-eval-lm"):
        call(
            main, data, "--path", checkpoints["plain"], "--knn-datastore", datastores["plain"],
            "--cpu", "--knn-output-tokens", tmp_path / "tokens.npz",
            *(["--positions", "0:1"] if main is inspect.main else []),
        )  # fmt: skip


def test_where_there_is_nothing_to_write_it_is_refused(data, checkpoints, tmp_path):
    file = tmp_path / "result.json"
    for flags in (["--estimate"], ["--num-shards", 2]):
        with pytest.raises(UserError, match="--knn-output is of a datastore that one process"):
            build(data, checkpoints["plain"], tmp_path / "d", "--knn-output", file, *flags)
    assert not file.exists()
