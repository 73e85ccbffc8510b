"""``fairseq-eval-lm`` with flags and files that cannot be: one message, no traceback, status 1."""

import os
import shutil
import sys

import pytest
import torch
from helpers.commands import NO_THREADS, USER_DIR, build, call, flags_of, knnlm, run
from helpers.commands import evaluate as evaluate_here

from fairseq_knnlm.cli import inspect, tune
from fairseq_knnlm.errors import UserError

DATASTORE = "DATASTORE"


def evaluate(data, checkpoint, *flags, launcher=("-m", "fairseq_cli.eval_lm")):
    """Run stock ``fairseq-eval-lm`` as a command, wherever it ends."""
    return run(
        sys.executable, *launcher, data, "--user-dir", USER_DIR, "--task", "knnlm_lm",
        "--path", checkpoint, "--tokens-per-sample", 32, "--cpu", "--log-format", "none",
        *NO_THREADS, *flags, check=False,
    )  # fmt: skip


def refused(done, *parts):
    """Whether a command ended with one message that has every part."""
    assert done.returncode == 1, done.stdout[-2000:]
    assert "Traceback" not in done.stdout, done.stdout[-2000:]
    message = done.stdout[done.stdout.rindex("fairseq_knnlm: ") :]
    missing = [part for part in map(str, parts) if part not in message]
    assert not missing, message
    return True


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--context-window", 32], ["--tokens-per-sample", "more than --context-window", "32"]),
        (["--context-window", 40], ["--tokens-per-sample", "got 32 and 40"]),
        (["--context-window", -1], ["--context-window must be >= 0, got -1"]),
        (["--tokens-per-sample", 0], ["--tokens-per-sample must be in [1, ", "got 0"]),
        (["--tokens-per-sample", 2**70], ["--tokens-per-sample must be in [1, ", f"got {2**70}"]),
        (["--num-shards", 2, "--shard-id", 2], ["--shard-id must be in [0, 2), got 2"]),
        (["--shard-id", -1], ["--shard-id must be in [0, 1), got -1"]),
        (["--num-shards", 10**6, "--shard-id", 5], ["no perplexity of no tokens", "--shard-id"]),
        (["--distributed-rank", 3], ["--distributed-rank must be in [0, 1), got 3"]),
        (["--distributed-world-size", 99], ["--distributed-world-size 99", "available devices"]),
        (["--num-shards", 0], ["--num-shards must be >= 1, got 0"]),
        (["--num-shards", -2], ["--num-shards must be >= 1, got -2"]),
        (["--softmax-batch", -5], ["--softmax-batch must be >= 0, got -5"]),
        (["--batch-size", 0], ["--batch-size must be >= 1, got 0"]),
        (["--max-tokens", 0], ["--max-tokens must be >= 1, got 0"]),
        (["--self-target"], ["--self-target", "next-token targets"]),
        (["--gen-subset", "nonesuch"], ["no split 'nonesuch'"]),
        (["--gen-subset", ""], ["--gen-subset must name a split", "''"]),
        (["--use-plasma-view"], ["--use-plasma-view needs pyarrow.plasma"]),
        (["--add-bos-token"], ["learned 32 positions", "--tokens-per-sample 31"]),
        (["--knn-output", "o", "--knn-output-tokens", "./o"], ["--knn-output", "the same file"]),
        (["--model-overrides", "{"], ["--model-overrides must be a Python dictionary"]),
        (["--model-overrides", "[1]"], ["--model-overrides must be a Python dictionary", "[1]"]),
        (["--knn-cache-size", 10**20], ["--knn-cache-size", 10**20]),
        (["--knn-datastore", ""], ["--knn-datastore", "''"]),
        (["--knn-datastore", ":"], ["--knn-datastore", "':'"]),
        (["--knn-datastore", DATASTORE + ":" + DATASTORE], ["--knn-datastore", "2 times"]),
        (["--knn-datastore", DATASTORE + ":" + DATASTORE + "/"], ["--knn-datastore", "2 times"]),
        (
            ["--num-shards", 0, "--softmax-batch", -1, "--knn-k", 0],
            ["--num-shards", "--softmax-batch", "--knn-k"],
        ),
    ],
    ids=str,
)
def test_flags(data, checkpoints, datastores, flags, parts):
    flags = [str(flag).replace(DATASTORE, str(datastores["plain"])) for flag in flags]
    assert refused(evaluate(data, checkpoints["plain"], *flags), *parts)


def damaged_checkpoint(kind, good, folder):
    path = folder / "checkpoint.pt"
    if kind == "directory":
        path.mkdir()
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("without a model", "no dictionary"):
        state = torch.load(good, weights_only=False)
        if kind == "no dictionary":
            state = [1, 2]
        else:
            del state["model"]
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "kind, part",
    [
        ("missing", "no such checkpoint"),
        ("directory", "is a directory"),
        ("truncated", "cannot be loaded as a checkpoint"),
        ("empty", "cannot be loaded as a checkpoint"),
        ("without a model", "cannot be loaded as a checkpoint"),
        ("no dictionary", "cannot be loaded as a checkpoint"),
    ],
)
@pytest.mark.parametrize("command", ["eval-lm", "build"])
def test_checkpoints(data, checkpoints, tmp_path, command, kind, part):
    path = damaged_checkpoint(kind, checkpoints["plain"], tmp_path)
    if command == "eval-lm":
        done = evaluate(data, path)
    else:
        done = knnlm(
            "fairseq-knnlm-build", data, "--path", path, "--knn-datastore", tmp_path / "d",
            "--tokens-per-sample", 32, "--cpu", check=False,
        )  # fmt: skip
        assert not (tmp_path / "d").exists()
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert f"--path {path}" in done.stdout and part in done.stdout


@pytest.mark.parametrize("factory", ["IVF0,Flat", "HNSW0", "IVF4_HNSW0,Flat", "IVF4,PQ4x0"])
def test_an_index_that_cannot_be(data, checkpoints, tmp_path, factory):
    with pytest.raises(UserError, match=f"{factory} .--knn-index. has a size of 0"):
        build(data, checkpoints["plain"], tmp_path / "d", "--knn-index", factory)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--shard-id", -1], "--shard-id must be in [0, 1), got -1"),
        (["--num-shards", -2], "--num-shards must be >= 1, got -2"),
        (["--distributed-world-size", 0], "--distributed-world-size must be >= 1, got 0"),
    ],
    ids=str,
)
def test_shares_of_our_commands(data, checkpoints, datastores, tmp_path, flags, part):
    with pytest.raises(UserError) as error:
        build(data, checkpoints["plain"], tmp_path / "d", *flags)
    assert part in str(error.value) and not (tmp_path / "d").exists()
    flags = flags_of(data, checkpoints["plain"], datastores["plain"], *flags)
    for main, more in ((tune.main, []), (inspect.main, ["--positions", "0:3"])):
        with pytest.raises(UserError) as error:
            call(main, *flags, *more)
        assert part in str(error.value)


def test_processes_that_fairseq_cannot_start(data, checkpoints, tmp_path):
    with pytest.raises(SystemExit, match="--distributed-world-size 99 .*99 but have"):
        build(data, checkpoints["plain"], tmp_path / "d", "--distributed-world-size", 99)


def test_an_evaluation_of_ours_without_a_process(data, checkpoints):
    done = knnlm(
        "fairseq-knnlm-eval", data, "--path", checkpoints["plain"], "--cpu",
        "--distributed-world-size", 0, check=False,
    )  # fmt: skip
    assert refused(done, "--distributed-world-size must be >= 1, got 0")


@pytest.fixture(scope="module")
def broken(checkpoints, tmp_path_factory):
    """A checkpoint with a weight that is no number."""
    state = torch.load(checkpoints["plain"], weights_only=False)
    state["model"]["decoder.layers.1.fc2.weight"][3, 4] = float("nan")
    path = tmp_path_factory.mktemp("broken") / "checkpoint.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("flags", [[], ["--knn-cache-size", 20]], ids=["alone", "with a cache"])
def test_a_weight_that_is_no_number(data, broken, flags):
    assert refused(evaluate(data, broken, *flags), "decoder.layers.1.fc2.weight", "not a number")


def test_a_weight_that_is_no_number_is_not_built_with(data, broken, tmp_path):
    with pytest.raises(UserError, match="decoder.layers.1.fc2.weight"):
        build(data, broken, tmp_path / "d", "--knn-index", "Flat")


def test_half_precision_is_of_the_same_model(data, checkpoints, datastores, tmp_path):
    build(data, checkpoints["plain"], tmp_path / "d", "--knn-index", "Flat", "--fp16")
    flags = ["--knn-datastore", tmp_path / "d", "--knn-k", 8, "--knn-temperature", 10]
    half = evaluate_here(data, checkpoints["plain"], *flags)
    flags[1] = datastores["plain"]
    full = evaluate_here(data, checkpoints["plain"], *flags)
    assert half == pytest.approx(full, rel=0.01)


def test_flags_of_neighbours_without_a_datastore_are_warned_of(data, checkpoints):
    done = evaluate(data, checkpoints["plain"], "--knn-k", 8, "--knn-lambda", 0.3)
    assert done.returncode == 0 and "Perplexity" in done.stdout
    (warning,) = [line for line in done.stdout.splitlines() if "--knn-datastore" in line]
    assert "--knn-k" in warning and "--knn-lambda" in warning and "WARNING" in warning


def test_no_warning_without_such_flags(data, checkpoints):
    assert "--knn-datastore" not in evaluate(data, checkpoints["plain"]).stdout


def test_a_datastore_named_by_a_link_is_the_same(data, checkpoints, datastores, tmp_path):
    (tmp_path / "link").symlink_to(datastores["plain"])
    both = f"{datastores['plain']}:{tmp_path / 'link'}"
    done = evaluate(data, checkpoints["plain"], "--knn-datastore", both, "--knn-k", 8)
    assert refused(done, "2 times", tmp_path / "link")


def test_the_root_logger_is_left_as_it_was():
    code = (
        "import logging; before = logging.root.level, list(logging.root.handlers); "
        "import fairseq_knnlm; assert before == (logging.root.level, list(logging.root.handlers))"
    )
    run(sys.executable, "-c", code)


def test_a_cache_is_tuned_without_a_warning_of_flags_that_nobody_gave(data, checkpoints, capfd):
    flags = [data, "--path", checkpoints["plain"], "--tokens-per-sample", 32, "--cpu"]
    flags += ["--log-format", "none", "--knn-cache-size", 10, "--knn-grid-cache-theta", 1]
    call(tune.main, *flags)
    assert "without --knn-datastore" not in capfd.readouterr().out
    call(tune.main, *flags, "--knn-lambda", 0.5)
    assert "--knn-lambda without --knn-datastore" in capfd.readouterr().out


# -- what was computed is not lost for want of a file ----------------------------------------------


def run_inspect(data, checkpoint, datastore, *flags):
    return knnlm(
        "fairseq-knnlm-inspect", data, "--path", checkpoint, "--knn-datastore", datastore,
        "--tokens-per-sample", 32, "--cpu", "--knn-k", 8, "--gen-subset", "valid",
        "--positions", "0:3", "--log-format", "none", *flags, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flag", ["--html", "--json"])
def test_a_full_disk_loses_no_passage(data, checkpoints, datastores, tmp_path, flag):
    # Written beside it and renamed: the name beside it leads to a disk that is full.
    target = tmp_path / "passage"
    (tmp_path / "passage.tmp").symlink_to("/dev/full")
    done = run_inspect(data, checkpoints["plain"], datastores["plain"], flag, target)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert f"{flag} {target}" in done.stdout and "No space left" in done.stdout
    assert "log p" in done.stdout or "perplexity" in done.stdout.lower()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_loses_no_tuning(data, checkpoints, datastores, tmp_path):
    target = tmp_path / "tuned.json"
    (tmp_path / "tuned.json.tmp").symlink_to("/dev/full")
    shutil.copytree(datastores["plain"], tmp_path / "d")
    done = knnlm(
        "fairseq-knnlm-tune", data, "--path", checkpoints["plain"], "--knn-datastore",
        tmp_path / "d", "--tokens-per-sample", 32, "--cpu", "--knn-grid-k", 8,
        "--knn-grid-temperature", 10, "--report-subset", "test", "--knn-output", target,
        "--log-format", "none", check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert f"--knn-output {target}" in done.stdout and "No space left" in done.stdout
    assert "evaluate with" in done.stdout and (tmp_path / "d" / "tuned.json").exists()


def test_a_directory_in_the_way_loses_no_report(data, checkpoints, datastores, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "report" / "report.html").mkdir(parents=True)
    output = tmp_path / "tuned.json"
    flags = flags_of(data, checkpoints["plain"], datastores["plain"], "--no-store")
    flags += ["--knn-grid-k", 8, "--knn-grid-temperature", 10, "--knn-output", output]
    with pytest.raises(UserError, match="cannot write --report .*report"):
        call(tune.main, *flags, "--report", tmp_path / "report")
    assert output.exists()
