"""The example of the Python interface, as a user starts it, beside the commands."""

import re
import sys

import pytest
from helpers.commands import REPOSITORY, evaluate, run
from helpers.small import contents


@pytest.mark.parametrize("architecture", ["adaptive", "plain"])
def test_it_builds_what_the_command_builds_and_says_what_the_command_says(
    data, checkpoints, datastores, tmp_path, architecture
):
    checkpoint, path = checkpoints[architecture], tmp_path / "datastore"
    script = REPOSITORY / "examples" / "python_api.py"
    words = (data, checkpoint, path, "--tokens-per-sample", 32, "--k", 20)
    printed = run(sys.executable, script, *words).stdout
    made, expected = contents(path), contents(datastores[architecture])
    assert made["values.npy"] == expected["values.npy"]
    k, temperature, knn_lambda, tuned = re.search(
        r"valid: k (\d+), temperature (\S+), lambda (\S+): perplexity (\S+)", printed
    ).groups()
    alone, mixed = re.search(r"test: perplexity (\S+), with neighbours (\S+)", printed).groups()
    setting = (
        "--knn-datastore", path, "--knn-k", k, "--knn-temperature", temperature,
        "--knn-lambda", knn_lambda,
    )  # fmt: skip
    on_valid = evaluate(data, checkpoint, "--gen-subset", "valid", *setting)
    assert float(tuned) == pytest.approx(on_valid, abs=0.01)
    assert float(alone) == pytest.approx(evaluate(data, checkpoint), abs=0.01)
    assert float(mixed) == pytest.approx(evaluate(data, checkpoint, *setting), abs=0.01)
    assert float(mixed) < float(alone)
