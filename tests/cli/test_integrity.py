"""Damaged files, hostile settings and replaced datastores, through the commands that users type."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from helpers.commands import (
    REPOSITORY,
    USER_DIR,
    build,
    call,
    command,
    contents,
    evaluate,
    knnlm,
    run,
)
from helpers.small import edit_manifest, flip_byte

from fairseq_knnlm.cli.info import main
from fairseq_knnlm.datastore import read_manifest, save_tuned
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.files import render

TUNED = {"k": 8, "knn_lambda": 0.25, "temperature": 10.0, "nprobe": 32, "distances": "exact"}


@pytest.fixture
def copy(datastores, tmp_path):
    return shutil.copytree(datastores["plain"], tmp_path / "copy")


@pytest.fixture
def info(capsys):
    """Runs ``fairseq-knnlm-info`` in this process; gives its exit status and what it says."""

    def run_info(path, *flags):
        end = ""
        try:
            call(main, path, *flags)
        except UserError as error:
            end = str(error)
        out, err = capsys.readouterr()
        return int(bool(end)), out + err + end

    return run_info


@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "index.faiss"])
def test_an_evaluation_of_damaged_files_is_refused(data, checkpoints, copy, name):
    flags = data, checkpoints["plain"], "--knn-datastore", copy, "--knn-k", 8
    whole = evaluate(*flags)
    flip_byte(copy / name, os.path.getsize(copy / name) - 40)
    with pytest.raises(UserError, match=f"{name} is damaged between bytes"):
        evaluate(*flags)
    assert evaluate(*flags, "--knn-verify", "off") == pytest.approx(whole, rel=0.1)


def test_the_message_and_the_exit_status_of_damage(data, checkpoints, copy):
    flip_byte(copy / "keys.npy", 1000)
    done = run(
        command("fairseq-eval-lm"), data, "--user-dir", USER_DIR, "--task", "knnlm_lm",
        "--path", checkpoints["plain"], "--cpu", "--tokens-per-sample", 32, "--knn-k", 8,
        "--knn-datastore", copy, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "Perplexity" not in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"fairseq_knnlm: {copy}/keys.npy is damaged between bytes 128 and")
    done = knnlm("fairseq-knnlm-info", copy, "--verify", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "keys.npy: damaged between bytes 128 and" in done.stdout


# -- tuned.json ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"k": -5}, "--knn-k must be a whole number >= 1, got -5"),
        ({"k": 0}, "--knn-k must be a whole number >= 1, got 0"),
        ({"k": "8"}, "--knn-k must be a whole number >= 1, got '8'"),
        ({"nprobe": 0}, "--knn-nprobe must be a whole number >= 1, got 0"),
        ({"distances": "zzz"}, "--knn-distances must be one of"),
        ({"temperature": -1}, "--knn-temperature must be a finite number > 0"),
        ({"knn_lambda": 7}, "--knn-lambda must be in [0, 1], got 7"),
        ({"datastores": "all"}, "datastores must be a list of one or more checksums"),
        ({"format_version": True}, "format_version must be 1, got True"),
        ({"tuned_on": []}, "tuned_on must be a dict, got []"),
    ],
    ids=str,
)
def test_settings_that_were_not_tuned_are_refused(data, checkpoints, copy, changed, message):
    path = save_tuned([str(copy)], TUNED)
    stored = json.loads(open(path, "rb").read())
    with open(path, "wb") as file:
        file.write(render({**stored, **changed}))
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoints["plain"], "--knn-datastore", copy, "--knn-tuned")
    assert message in str(error.value) and path in str(error.value)
    with pytest.raises(UserError) as error:
        call(main, copy)
    assert message in str(error.value)


def test_info_says_what_it_can_of_what_was_tuned(copy, info):
    path = save_tuned([str(copy)], {**TUNED, "tuned_on": {"split": "valid"}})
    status, text = info(copy)
    assert status == 0
    assert "tuned        k 8, lambda 0.25, temperature 10, nprobe 32, exact distances, on " in text
    with open(path, "wb") as file:
        file.write(b"{")
    status, text = info(copy)
    assert status == 1 and "what is stored cannot be used" in text and "entries" in text
    os.remove(path)
    os.mkdir(path)
    status, text = info(copy)
    assert status == 1 and f"cannot read {path}" in text


# -- info ------------------------------------------------------------------------------------------


def test_info_of_a_datastore_of_own_settings(copy, info):
    """What the builder left out has no line."""
    names = ("key", "model", "dictionary", "data", "context", "versions", "temperature")
    edit_manifest(copy, lambda manifest: [manifest.pop(name) for name in names])
    status, text = info(copy, "--verify")
    assert status == 0 and "verified: " in text
    assert "entries" in text and "dictionary" not in text


def test_results_of_a_datastore_of_own_settings(copy, info, tmp_path):
    edit_manifest(copy, lambda manifest: [manifest.pop(name) for name in ("model", "versions")])
    status, _ = info(copy, "--knn-output", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert status == 0 and results["model"] is None and results["versions"] is None


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda manifest: manifest["chunks"].update(rows=[]), "chunks.rows must end with"),
        (lambda manifest: manifest["key"].update(layer=7), "key.layer must be < 2"),
        (lambda manifest: manifest["index"].update(factory="IVF4,Flat"), "index.factory is IVF4"),
        (lambda manifest: manifest.update(count="9"), "count must be a whole number"),
    ],
)
def test_what_a_manifest_cannot_say_is_not_verified(copy, edit, message, info):
    edit_manifest(copy, edit)
    status, text = info(copy, "--verify")
    assert status == 1 and message in text and "verified: " not in text


def test_a_directory_in_place_of_the_manifest(data, checkpoints, copy, info):
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").mkdir()
    status, text = info(copy)
    assert status == 1 and "manifest.json: Is a directory" in text
    with pytest.raises(UserError, match="manifest.json: Is a directory"):
        evaluate(data, checkpoints["plain"], "--knn-datastore", copy, "--knn-k", 8)
    before = set(os.listdir(copy))
    with pytest.raises(UserError):
        build(data, checkpoints["plain"], copy, "--overwrite")
    assert set(os.listdir(copy)) >= before


def test_a_key_that_the_model_does_not_have_is_refused(data, checkpoints, copy):
    edit_manifest(copy, lambda manifest: manifest["key"].update(type="thoughts"))
    with pytest.raises(UserError, match="key must be one of .*, got 'thoughts'"):
        evaluate(data, checkpoints["plain"], "--knn-datastore", copy, "--knn-k", 8)


def test_a_datastore_that_does_not_say_its_model_is_refused(data, checkpoints, copy):
    edit_manifest(copy, lambda manifest: [manifest.pop("model"), manifest.pop("key")])
    with pytest.raises(UserError, match="does not say key, model, which the task knnlm_lm needs"):
        evaluate(data, checkpoints["plain"], "--knn-datastore", copy, "--knn-k", 8)


# -- overwriting -----------------------------------------------------------------------------------

READER = """
import sys
from fairseq_knnlm.search import Retriever
retriever = Retriever.open([sys.argv[1]], k=8)
print("open", flush=True)
sys.stdin.readline()
import torch
keys = retriever.datastores[0].keys[:5].astype("float32")
print(retriever.search(torch.from_numpy(keys)).distances[:, 0].tolist())
"""


def test_a_build_does_not_overwrite_what_is_read(data, checkpoints, copy):
    """The index is loaded long after the manifest was read: it is still the one that was opened."""
    before = contents(copy)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(copy)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    stop = threading.Timer(60, reader.kill)
    stop.start()
    assert reader.stdout.readline() == "open\n"
    with pytest.raises(UserError, match=f"--overwrite: the datastore {copy} is being read"):
        build(data, checkpoints["plain"], copy, "--overwrite")
    assert contents(copy) == before
    output, _ = reader.communicate("\n")
    stop.cancel()
    assert reader.returncode == 0 and output == f"{[0.0] * 5}\n"
    build(data, checkpoints["plain"], copy, "--overwrite", "--knn-index", "Flat")
    assert read_manifest(str(copy))["index"]["factory"] == "Flat"
