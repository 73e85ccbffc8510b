"""``fairseq-knnlm-eval``: stock ``fairseq-eval-lm``, with two flags filled in and less noise."""

import re

import pytest
from helpers.commands import USER_DIR, command, knnlm, run


def flags(data, checkpoints, *more):
    return [
        data, "--path", checkpoints["plain"], "--cpu", "--tokens-per-sample", 32,
        "--log-format", "none", *more,
    ]  # fmt: skip


def perplexity(output):
    return re.search(r"Perplexity: ([\d.]+)", output).group(1)


def test_it_gives_what_the_stock_command_gives(data, checkpoints, datastores):
    typed = flags(
        data, checkpoints, "--knn-datastore", datastores["plain"], "--knn-k", 16,
        "--knn-temperature", 5, "--gen-subset", "valid",
    )  # fmt: skip
    ours = knnlm("fairseq-knnlm-eval", *typed).stdout
    stock = run(
        command("fairseq-eval-lm"), *typed, "--user-dir", USER_DIR, "--task", "knnlm_lm"
    ).stdout
    assert perplexity(ours) == perplexity(stock)
    alone = knnlm("fairseq-knnlm-eval", *flags(data, checkpoints, "--gen-subset", "valid")).stdout
    assert perplexity(alone) != perplexity(ours)


def test_only_lines_that_mean_something_are_printed(data, checkpoints, datastores):
    typed = flags(data, checkpoints, "--knn-datastore", datastores["plain"])
    lines = knnlm("fairseq-knnlm-eval", *typed).stdout.splitlines()
    assert not [line for line in lines if "Warning" in line or "'_name'" in line]
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (INFO|WARNING) \| ", line) for line in lines
    )
    assert max(map(len, lines)) < 300


def test_a_warning_of_pytorch_that_is_not_known_is_printed():
    code = (
        "import warnings; from fairseq_knnlm.cli.noise import silence; silence();"
        "warnings.warn('CUDA initialization: no driver', UserWarning)"
    )
    assert "no driver" in run(command("python"), "-c", code).stdout


@pytest.mark.parametrize(
    "more, text",
    [
        (["--knn-lambda", 2], "--knn-lambda must be"),
        (["--knn-datastore", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(data, checkpoints, more, text):
    done = knnlm("fairseq-knnlm-eval", *flags(data, checkpoints, *more), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fairseq_knnlm: ") and text in done.stdout
