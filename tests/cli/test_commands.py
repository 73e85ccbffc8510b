"""The command lines as a user types them, each in a process of its own."""

import json
import re
import shlex
import shutil
import sys

import pytest
from helpers.commands import (
    USER_DIR,
    build,
    command,
    contents,
    evaluate,
    flags_of,
    in_two_processes,
    knnlm,
    run,
)


def test_build_evaluate_tune_and_info(data, checkpoints, tmp_path):
    flags = flags_of(data, checkpoints["adaptive"], tmp_path / "d")
    built = knnlm("fairseq-knnlm-build", *flags, "--sample-break-mode", "eos").stdout
    assert re.search(r"datastore .* is complete: [\d,]+ entries", built)
    assert sorted(contents(tmp_path / "d")) == [
        "index.faiss", "keys.npy", "manifest.json", "values.npy",
    ]  # fmt: skip

    described = knnlm("fairseq-knnlm-info", tmp_path / "d", "--verify").stdout
    count = json.loads((tmp_path / "d" / "manifest.json").read_text())["count"]
    assert f"{count:,} of 32 dimensions" in described
    assert "every byte is as the manifest says" in described

    output = tmp_path / "tuned.json"
    tuned = knnlm(
        "fairseq-knnlm-tune", *flags, "--knn-k", 64, "--gen-subset", "valid",
        "--report-subset", "test", "--knn-output", output,
    ).stdout  # fmt: skip
    results = json.loads(output.read_text())
    report = results["reported_on"]
    assert report["split"] == "test"
    assert results["best"]["perplexity"] < results["tuned_on"]["base_perplexity"]

    words = shlex.split(re.search(r"evaluate with: (.*)", tuned).group(1))
    evaluated = run(command(words[0]), *words[1:]).stdout
    perplexity = float(re.search(r"Perplexity: ([\d.]+)", evaluated).group(1))
    assert perplexity == pytest.approx(report["knn_perplexity"], rel=2e-3)


def test_python_m_and_a_checkpoint_of_the_stock_task(data, checkpoints, datastores):
    done = run(
        sys.executable, "-m", "fairseq_cli.eval_lm",
        *flags_of(data, checkpoints["plain"], datastores["plain"], "--knn-k", 8),
        "--user-dir", USER_DIR, "--task", "knnlm_lm",
    ).stdout  # fmt: skip
    in_process = evaluate(
        data, checkpoints["plain"], "--knn-datastore", datastores["plain"], "--knn-k", 8
    )
    assert f"Perplexity: {in_process:.2f}" in done


def test_several_datastores_are_searched_as_one(data, checkpoints, datastores, tmp_path):
    build(
        data, checkpoints["plain"], tmp_path / "v", "--gen-subset", "valid", "--knn-index", "Flat"
    )
    both = f"{datastores['plain']}:{tmp_path / 'v'}"
    settings = ["--knn-k", 16, "--knn-temperature", 5]
    one = evaluate(data, checkpoints["plain"], "--knn-datastore", datastores["plain"], *settings)
    two = evaluate(data, checkpoints["plain"], "--knn-datastore", both, *settings)
    shutil.copytree(datastores["plain"], tmp_path / "copy")
    same = f"{datastores['plain']}:{tmp_path / 'copy'}"
    doubled = evaluate(
        data, checkpoints["plain"], "--knn-datastore", same, "--knn-k", 32, "--knn-temperature", 5
    )
    assert two != one
    assert doubled == pytest.approx(one, rel=1e-5)


def test_two_processes_report_one_perplexity(data, checkpoints, datastores, tmp_path, monkeypatch):
    flags = ["--knn-k", 8, "--context-window", 8, "--gen-subset", "train"]
    flags += ["--knn-datastore", datastores["plain"]]
    output = in_two_processes(
        [
            command("fairseq-eval-lm"), data, "--path", checkpoints["plain"], "--cpu",
            "--user-dir", USER_DIR, "--task", "knnlm_lm", "--tokens-per-sample", 32,
            "--model-overrides", "{}", *flags,
        ],
        tmp_path,
    )  # fmt: skip
    alone = evaluate(data, checkpoints["plain"], *flags)
    assert f"Perplexity: {alone:.2f}" in output
