"""The command lines as a user types them, each in a process of its own."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, USER_DIR, build, command, evaluate, knnlm, run
from killed_build import build_until, use_small_parts

from fairseq_knnlm.errors import UserError


def flags_of(data, checkpoint, directory, *flags):
    return [
        data, "--path", checkpoint, "--knn-datastore", directory, "--tokens-per-sample", 32,
        "--cpu", "--log-format", "simple", *flags,
    ]  # fmt: skip


def contents(directory):
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


def test_build_evaluate_tune_and_info(data, checkpoints, tmp_path):
    flags = flags_of(data, checkpoints["adaptive"], tmp_path / "d")
    built = knnlm("fairseq-knnlm-build", *flags, "--sample-break-mode", "eos").stdout
    assert re.search(r"datastore .* is complete: [\d,]+ entries", built)
    assert sorted(contents(tmp_path / "d")) == [
        "index.faiss", "keys.npy", "manifest.json", "values.npy",
    ]  # fmt: skip

    told = knnlm("fairseq-knnlm-info", tmp_path / "d", "--verify").stdout
    count = json.loads((tmp_path / "d" / "manifest.json").read_text())["count"]
    assert f"{count:,} of 32 dimensions" in told
    assert "every byte is as it was written" in told

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
    same = f"{datastores['plain']}:{datastores['plain']}"
    doubled = evaluate(
        data, checkpoints["plain"], "--knn-datastore", same, "--knn-k", 32, "--knn-temperature", 5
    )
    assert two != one
    assert doubled == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_give_the_bytes_of_one_builder(data, checkpoints, tmp_path, monkeypatch, shards):
    from fairseq_knnlm.cli import build as module

    monkeypatch.setattr(module, "CHUNK_TOKENS", 500)
    flags = ["--context-window", 8, "--sample-break-mode", "complete_doc"]
    build(data, checkpoints["plain"], tmp_path / "one", *flags)
    for shard in reversed(range(shards)):
        assert not (tmp_path / "many" / "manifest.json").exists()
        build(
            data, checkpoints["plain"], tmp_path / "many", *flags,
            "--num-shards", shards, "--shard-id", shard,
        )  # fmt: skip
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_give_the_same_bytes(data, checkpoints, tmp_path, monkeypatch, workers):
    from fairseq_knnlm.cli import build as module

    monkeypatch.setattr(module, "CHUNK_TOKENS", 500)
    flags = ["--context-window", 8, "--batch-size", 3]
    build(data, checkpoints["plain"], tmp_path / "one", *flags)
    build(data, checkpoints["plain"], tmp_path / "many", *flags, "--num-workers", workers)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_killed_build_goes_on_to_the_same_bytes(data, checkpoints, tmp_path, monkeypatch):
    """At 20 moments drawn with a seed, before anything that touches a file."""
    use_small_parts(monkeypatch.setattr)
    processes = multiprocessing.get_context("forkserver")  # forks after the imports, not anew
    processes.set_forkserver_preload(["killed_build"])
    flags = ["--knn-index", "IVF8,PQ8", "--num-workers", 0]
    build(data, checkpoints["plain"], tmp_path / "whole", *flags)
    whole = contents(tmp_path / "whole")
    for moment in random.Random(11).sample(range(1, 100), 20):
        directory = tmp_path / f"killed-{moment}"
        arguments = flags_of(data, checkpoints["plain"], directory, *flags)
        killed = processes.Process(target=build_until, args=(moment, list(map(str, arguments))))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        with contextlib.suppress(UserError):  # killed after the manifest: it is finished
            build(data, checkpoints["plain"], directory, *flags)
        assert contents(directory) == whole, moment


def in_two_processes(start, tmp_path):
    """Run a command line in two processes that talk through gloo; the output of the first."""
    flags = "--distributed-world-size 2 --distributed-no-spawn --distributed-backend gloo".split()
    flags += ["--distributed-init-method", f"file://{tmp_path}/rendezvous"]
    processes = [
        subprocess.Popen(
            [str(word) for word in [*start, *flags, "--distributed-rank", rank]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0]


def test_two_processes_report_one_perplexity(data, checkpoints, datastores, tmp_path, monkeypatch):
    flags = ["--knn-k", 8, "--context-window", 8, "--gen-subset", "train"]
    flags += ["--knn-datastore", datastores["plain"]]
    found = in_two_processes(
        [
            command("fairseq-eval-lm"), data, "--path", checkpoints["plain"], "--cpu",
            "--user-dir", USER_DIR, "--task", "knnlm_lm", "--tokens-per-sample", 32,
            "--model-overrides", "{}", *flags,
        ],
        tmp_path,
    )  # fmt: skip
    alone = evaluate(data, checkpoints["plain"], *flags)
    assert f"Perplexity: {alone:.2f}" in found


def test_two_processes_build_one_datastore(data, checkpoints, tmp_path):
    build(data, checkpoints["plain"], tmp_path / "one")
    code = "import sys; from fairseq_knnlm.cli.build import main; main(sys.argv[1:])"
    in_two_processes(
        [sys.executable, "-c", code, *flags_of(data, checkpoints["plain"], tmp_path / "two")],
        tmp_path,
    )
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert np.array_equal(
        np.load(tmp_path / "two" / "keys.npy"), np.load(tmp_path / "one" / "keys.npy")
    )
    assert one == two
