"""Bad input ends in one clear message that names both sides, a non-zero exit, and no damage."""

import concurrent.futures
import multiprocessing
import shutil
import sys

import numpy as np
import pytest
from helpers.commands import NO_THREADS, USER_DIR, build, call, command, evaluate, knnlm, run

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.scoring.compatibility import refuse_ensemble


def refused(message, *parts):
    """Whether an error's text has every part."""
    return all(str(part) in str(message.value) for part in parts)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--knn-k", 0], ["--knn-k", ">= 1", "got 0"]),
        (["--knn-lambda", 1.5], ["--knn-lambda", "[0, 1]", "1.5"]),
        (["--knn-lambda", "nan"], ["--knn-lambda", "[0, 1]", "nan"]),
        (["--knn-temperature", 0], ["--knn-temperature", "> 0", "got 0"]),
        (["--knn-temperature", "inf"], ["--knn-temperature", "inf"]),
        (["--knn-nprobe", 0], ["--knn-nprobe", ">= 1", "got 0"]),
        (
            ["--knn-nprobe", 8, "--knn-distances", "exhaustive"],
            ["--knn-nprobe", "--knn-distances exhaustive reads none"],
        ),
        (["--knn-k", -3, "--knn-lambda", -1], ["--knn-k", "--knn-lambda"]),
        (["--knn-k", 10**6], ["--knn-k", "at most", "entries", "1000000"]),
        (["--knn-key", "attn-input"], ["--knn-key attn-input", "ffn-input"]),
        (["--knn-metric", "ip"], ["--knn-metric ip", "built with l2"]),
        (["--knn-device", "cuda"], ["(--knn-device) cuda", "GPU"]),
    ],
    ids=str,
)
def test_settings(data, checkpoints, datastores, flags, parts):
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoints["plain"], "--knn-datastore", datastores["plain"], *flags)
    assert refused(error, *parts)


def test_no_such_datastore(data, checkpoints, tmp_path):
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoints["plain"], "--knn-datastore", tmp_path / "none")
    assert refused(error, tmp_path / "none", "no such directory")


def test_another_checkpoint(data, checkpoints, datastores):
    with pytest.raises(UserError) as error:
        evaluate(
            data, checkpoints["adaptive"], "--knn-datastore", datastores["plain"], "--knn-k", 8
        )
    assert refused(error, "weights", "sha256", datastores["plain"])


def test_another_dictionary(data, checkpoints, datastores, tmp_path):
    other = tmp_path / "bin"
    shutil.copytree(data, other)
    lines = (data / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(UserError) as error:
        evaluate(other, checkpoints["plain"], "--knn-datastore", datastores["plain"], "--knn-k", 8)
    assert refused(error, "dictionary", "sha256", datastores["plain"])


def test_another_dimension(data, checkpoints, datastores, tmp_path):
    run(
        command("fairseq-train"), data, "--task", "language_modeling", "--arch", "transformer_lm",
        "--decoder-layers", 1, "--decoder-embed-dim", 16, "--decoder-input-dim", 16,
        "--decoder-output-dim", 16, "--decoder-ffn-embed-dim", 16, "--decoder-attention-heads", 1,
        "--optimizer", "sgd", "--lr", 0.1, "--max-update", 1, "--tokens-per-sample", 32,
        "--max-tokens", 64, "--cpu", "--disable-validation", *NO_THREADS, "--save-dir", tmp_path,
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        evaluate(
            data, tmp_path / "checkpoint_last.pt", "--knn-datastore", datastores["plain"],
            "--knn-k", 8,
        )  # fmt: skip
    assert refused(error, "16 dimensions", "32", datastores["plain"])


def test_truncated_datastore(data, checkpoints, datastores, tmp_path):
    damaged = tmp_path / "d"
    shutil.copytree(datastores["plain"], damaged)
    with open(damaged / "keys.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoints["plain"], "--knn-datastore", damaged, "--knn-k", 8)
    assert refused(error, "keys.npy", "1000 bytes", "truncated")


def test_ensemble(data, checkpoints, tmp_path):
    both = f"{checkpoints['plain']}:{checkpoints['adaptive']}"
    with pytest.raises(UserError) as error:
        build(data, both, tmp_path / "d")
    assert refused(error, "ensemble", "not supported")
    assert not (tmp_path / "d").exists()


def test_ensemble_in_eval_lm(data, checkpoints):
    both = f"{checkpoints['plain']}:{checkpoints['adaptive']}"
    done = run(
        command("fairseq-eval-lm"), data, "--user-dir", USER_DIR, "--task", "knnlm_lm",
        "--path", both, "--cpu", check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "an ensemble of 2 models is not supported" in done.stdout


def test_model_that_is_no_language_model(data, tmp_path):
    shutil.copytree(data, tmp_path / "bin")
    for name in ("dict.a.txt", "dict.b.txt"):
        shutil.copy(data / "dict.txt", tmp_path / "bin" / name)
    for split in ("train", "valid"):
        for side in "ab":
            for ending in ("bin", "idx"):
                shutil.copy(
                    data / f"{split}.{ending}", tmp_path / "bin" / f"{split}.a-b.{side}.{ending}"
                )
    run(
        command("fairseq-train"), tmp_path / "bin", "--task", "translation",
        "--arch", "transformer_iwslt_de_en", "--encoder-layers", 1, "--decoder-layers", 1,
        "--encoder-embed-dim", 32, "--decoder-embed-dim", 32, "--optimizer", "sgd", "--lr", 0.1,
        "--max-update", 1, "--max-tokens", 64, "--cpu", "--disable-validation",
        *NO_THREADS,
        "--save-dir", tmp_path / "save",
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        build(data, tmp_path / "save" / "checkpoint_last.pt", tmp_path / "d")
    assert refused(error, "transformer_iwslt_de_en", "decoder-only")


@pytest.mark.parametrize(
    "architecture",
    [
        "lstm_lm --decoder-embed-dim 8 --decoder-hidden-size 8 --decoder-out-embed-dim 8",
        "lightconv_lm --decoder-layers 1 --decoder-embed-dim 8 --decoder-input-dim 8 "
        "--decoder-output-dim 8 --decoder-ffn-embed-dim 8 --decoder-attention-heads 1 "
        "--decoder-kernel-size-list [3]",
    ],
    ids=["lstm_lm", "lightconv_lm"],
)
def test_language_model_that_is_no_transformer(data, tmp_path, architecture):
    run(
        command("fairseq-train"), data, "--task", "language_modeling",
        "--arch", *architecture.split(), "--optimizer", "sgd", "--lr", 0.1, "--max-update", 1,
        "--tokens-per-sample", 32, "--max-tokens", 64, "--cpu", "--disable-validation",
        *NO_THREADS,
        "--save-dir", tmp_path,
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        evaluate(data, tmp_path / "checkpoint_last.pt")
    assert refused(error, "Decoder", "transformer_lm family")
    with pytest.raises(UserError):
        build(data, tmp_path / "checkpoint_last.pt", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_empty_split(data, checkpoints, tmp_path):
    shutil.copytree(data, tmp_path / "bin")
    (tmp_path / "bin" / "valid.bin").write_bytes(b"")
    with pytest.raises(UserError) as error:
        evaluate(tmp_path / "bin", checkpoints["plain"], "--gen-subset", "valid")
    assert refused(error, "valid.bin is empty", "'valid'")


def test_blocks_longer_than_the_model_takes(data, checkpoints, tmp_path):
    with pytest.raises(UserError) as error:
        build(data, checkpoints["plain"], tmp_path / "d", "--tokens-per-sample", 64)
    assert refused(error, "64", "32", "--tokens-per-sample")
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoints["plain"], "--tokens-per-sample", 64)
    assert refused(error, "64", "32", "--tokens-per-sample")


def test_build_over_a_finished_datastore(data, checkpoints, datastores):
    before = {file.name: file.read_bytes() for file in datastores["plain"].iterdir()}
    with pytest.raises(UserError) as error:
        build(data, checkpoints["plain"], datastores["plain"])
    assert refused(error, datastores["plain"], "--overwrite")
    assert {file.name: file.read_bytes() for file in datastores["plain"].iterdir()} == before


def test_bad_arguments_of_build_make_no_directory(data, checkpoints, tmp_path):
    cases = [
        (["--gen-subset", "nonesuch"], "no split 'nonesuch'"),
        (["--path", tmp_path / "no.pt"], "no such checkpoint"),
        (["--knn-index", "IVF4,Nonsense"], "--knn-index"),
        (["--knn-index", "IVF65536,Flat"], "needs 65,536 keys"),
        (["--knn-key-layer", 7], "(--knn-key-layer) must be"),
        (["--max-tokens", 16], "--max-tokens"),
        (["--num-shards", 2, "--shard-id", 2], "--shard-id"),
    ]
    for flags, part in cases:
        with pytest.raises(UserError) as error:
            build(data, checkpoints["plain"], tmp_path / "d", *flags)
        assert refused(error, part)
    assert not (tmp_path / "d").exists()


def test_a_path_that_is_no_checkpoint(data, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(SystemExit, match="--path .*text.pt cannot be loaded as a checkpoint"):
        build(data, tmp_path / "text.pt", tmp_path / "d")


def test_directory_that_cannot_be_written(data, checkpoints, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        build(data, checkpoints["plain"], tmp_path / "file" / "d")
    assert refused(error, "--knn-datastore", tmp_path / "file" / "d")


def test_message_and_exit_status_of_the_commands(data, checkpoints, datastores):
    """A message without a traceback, and a non-zero exit, in our commands and the stock one."""
    flags = [data, "--path", checkpoints["plain"], "--cpu", "--tokens-per-sample", 32]
    flags += ["--knn-datastore", datastores["plain"], "--knn-lambda", 2]
    plugin = ["--user-dir", USER_DIR, "--task", "knnlm_lm"]
    for done in (
        run(command("fairseq-eval-lm"), *plugin, *flags, check=False),
        run(sys.executable, "-m", "fairseq_cli.eval_lm", *plugin, *flags, check=False),
        knnlm("fairseq-knnlm-tune", *flags, check=False),
    ):
        assert done.returncode == 1
        assert "Traceback" not in done.stdout
        assert done.stdout.strip().endswith(
            "fairseq_knnlm: --knn-lambda must be in [0, 1], got 2.0"
        )


def test_message_and_exit_status_of_info(tmp_path):
    """A command without fairseq's flags ends in the same way."""
    done = knnlm("fairseq-knnlm-info", tmp_path / "none", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("fairseq_knnlm: ")
    assert str(tmp_path / "none") in done.stdout


@pytest.mark.parametrize("overrides", ["{", "3", "{'a': __import__('os')}", ""])
def test_model_overrides_are_data(data, checkpoints, tmp_path, overrides):
    with pytest.raises(UserError) as error:
        build(data, checkpoints["plain"], tmp_path / "d", "--model-overrides", overrides)
    assert refused(error, "--model-overrides", "dictionary", repr(overrides))
    assert not (tmp_path / "d").exists()


def test_model_overrides_change_the_model(data, checkpoints, tmp_path):
    overrides = "{'max_target_positions': 16}"
    with pytest.raises(SystemExit, match="size mismatch"):
        build(data, checkpoints["plain"], tmp_path / "d", "--model-overrides", overrides)
    build(data, checkpoints["plain"], tmp_path / "d", "--model-overrides", "{'dropout': 0.3}")
    assert (tmp_path / "d" / "manifest.json").exists()


# -- the exception ---------------------------------------------------------------------------------


def test_bad_input_is_a_value_error_and_ends_no_program():
    assert issubclass(UserError, ValueError)
    assert not issubclass(UserError, SystemExit)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_bad_input_in_a_worker_arrives_as_a_value_error(kind):
    pools = {
        "thread": concurrent.futures.ThreadPoolExecutor(1),
        "process": concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("forkserver")
        ),
    }
    with pools[kind] as pool:
        with pytest.raises(ValueError, match="ensemble of 2 models") as error:
            pool.submit(refuse_ensemble, 2).result()
        assert type(error.value) is UserError
        assert pool.submit(int, "7").result() == 7  # the worker lives on


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--report-subset", "nonesuch"], ["no split 'nonesuch'"]),
        (["--knn-output", "/nonesuch/tuned.json"], ["--knn-output", "/nonesuch/tuned.json"]),
    ],
    ids=str,
)
def test_faults_of_the_report_are_found_before_tuning(
    data, checkpoints, datastores, monkeypatch, flags, parts
):
    from fairseq_knnlm.cli import tune

    monkeypatch.setattr(tune, "sweep", lambda *args, **grid: pytest.fail("it was tuned"))
    with pytest.raises(UserError) as error:
        call(
            tune.main, data, "--path", checkpoints["plain"],
            "--knn-datastore", datastores["plain"], "--knn-k", 8, "--tokens-per-sample", 32,
            "--cpu", "--log-format", "none", *flags,
        )  # fmt: skip
    assert refused(error, *parts)


def test_tuning_and_reporting_on_one_split(data, checkpoints, datastores):
    from fairseq_knnlm.cli.tune import main

    with pytest.raises(UserError) as error:
        call(
            main, data, "--path", checkpoints["plain"], "--knn-datastore", datastores["plain"],
            "--gen-subset", "valid", "--report-subset", "valid", "--cpu",
        )  # fmt: skip
    assert refused(error, "--report-subset", "valid")


def test_key_beyond_half_precision(tmp_path):
    from fairseq_knnlm.datastore.writer import DatastoreWriter

    with DatastoreWriter(str(tmp_path), {}, [2], 3, np.dtype("uint8")) as writer:
        with pytest.raises(UserError) as error:
            writer.write(0, np.full((2, 3), np.inf, dtype=np.float16), np.zeros(2, dtype=np.uint8))
    assert refused(error, "float16", "65504")
