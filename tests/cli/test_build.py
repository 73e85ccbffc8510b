"""``fairseq-knnlm-build``: the same bytes from several processes and after interruptions."""

import contextlib
import multiprocessing
import random
import signal
import sys

import numpy as np
import pytest
from helpers.commands import build, contents, flags_of, in_two_processes
from helpers.killed_build import build_until, use_small_parts

from fairseq_knnlm.building import build as build_module
from fairseq_knnlm.errors import UserError


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_give_the_bytes_of_one_builder(data, checkpoints, tmp_path, monkeypatch, shards):
    monkeypatch.setattr(build_module, "JOURNAL_TOKENS", 500)
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
    monkeypatch.setattr(build_module, "JOURNAL_TOKENS", 500)
    flags = ["--context-window", 8, "--batch-size", 3]
    build(data, checkpoints["plain"], tmp_path / "one", *flags)
    build(data, checkpoints["plain"], tmp_path / "many", *flags, "--num-workers", workers)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_killed_build_goes_on_to_the_same_bytes(data, checkpoints, tmp_path, monkeypatch):
    """At 20 moments drawn with a seed, before anything that touches a file."""
    use_small_parts(monkeypatch.setattr)
    processes = multiprocessing.get_context("forkserver")  # forks after the imports, not anew
    processes.set_forkserver_preload(["helpers.killed_build"])
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
