"""How fairseq's own commands end, and what this package leaves alone in other programs."""

import importlib
import os
import subprocess
import sys
import textwrap

import fairseq_cli
import pytest
from helpers.commands import REPOSITORY, USER_DIR, command, evaluate, run

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin import commands

REFUSED = "fairseq_knnlm: --knn-lambda must be in [0, 1], got 2.0"
# Python runs it first: as on a machine with two GPUs, fairseq starts a process for each.
TWO_GPUS = """
import torch

torch.cuda.device_count = lambda: 2
"""


def flags_of(data, checkpoint, *flags):
    return [
        data, "--path", checkpoint, "--user-dir", USER_DIR, "--task", "knnlm_lm", "--cpu",
        "--knn-lambda", 2, *flags,
    ]  # fmt: skip


def write_script(path, text):
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize(
    "name, how",
    [
        *((name, "script") for name in ("eval_lm", "generate", "interactive", "validate", "train")),
        ("eval_lm", "module"),
        ("eval_lm", "file"),
    ],
)
def test_a_command_of_fairseq_ends_with_the_text(name, how, data, checkpoints, tmp_path):
    start = {
        "script": [command(f"fairseq-{name.replace('_', '-')}")],
        "module": [sys.executable, "-m", f"fairseq_cli.{name}"],
        "file": [sys.executable, f"{fairseq_cli.__path__[0]}/{name}.py"],
    }[how]
    flags = flags_of(data, checkpoints["plain"], "--max-tokens", 64)
    if name == "train":
        flags[1:3] = ["--arch", "transformer_lm", "--optimizer", "sgd", "--lr", 0.1]
        flags += ["--save-dir", tmp_path]
    done = run(*start, *flags, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert done.stdout.strip().endswith(REFUSED)
    assert done.stdout.count(REFUSED) == 1


def with_two_gpus(folder, *arguments):
    """Run a command line in two processes, which fairseq starts; status and output."""
    (folder / "sitecustomize.py").write_text(TWO_GPUS)
    flags = ["--distributed-world-size", 2, "--distributed-backend", "gloo"]
    done = subprocess.run(
        [str(argument) for argument in [*arguments, *flags]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}"},
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", ["fairseq-eval-lm", "fairseq-interactive"])
def test_the_text_of_a_process_that_fairseq_started(name, data, checkpoints, tmp_path):
    flags = flags_of(data, checkpoints["plain"])
    status, output = with_two_gpus(tmp_path, command(name), *flags)
    assert status == 1
    assert "Traceback" not in output, output
    assert output.strip().endswith(REFUSED)


def test_a_checkpoint_that_fails_in_a_process_that_fairseq_started(data, checkpoints, tmp_path):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoints["plain"].read_bytes()[:5000])
    flags = [data, "--path", damaged, "--user-dir", USER_DIR, "--task", "knnlm_lm", "--cpu"]
    status, output = with_two_gpus(tmp_path, command("fairseq-eval-lm"), *flags)
    assert status == 1
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("fairseq_knnlm: ")]
    assert f"--path {damaged} cannot be loaded as a checkpoint: " in line


def test_the_text_of_a_process_of_our_command(data, checkpoints, datastores, tmp_path):
    script = write_script(
        tmp_path / "build.py",
        """
        import sys
        from fairseq_knnlm.cli.build import main

        if __name__ == "__main__":
            main(sys.argv[1:])
        """,
    )
    flags = [data, "--path", checkpoints["plain"], "--knn-datastore", datastores["plain"], "--cpu"]
    status, output = with_two_gpus(tmp_path, sys.executable, script, *flags)
    assert status == 1
    assert "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("fairseq_knnlm: ") and "--overwrite" in last


@pytest.mark.parametrize(
    "start",
    [[command("fairseq-eval-lm")], [sys.executable, "-m", "fairseq_cli.eval_lm"]],
    ids=["script", "python -m"],
)
def test_processes_that_fairseq_started_score_with_neighbours(
    start, data, checkpoints, datastores, tmp_path
):
    knn = ["--knn-datastore", datastores["plain"], "--knn-k", 8]
    flags = [data, "--path", checkpoints["plain"], "--user-dir", USER_DIR, "--task", "knnlm_lm"]
    flags += ["--cpu", "--tokens-per-sample", 32, *knn]
    status, output = with_two_gpus(tmp_path, *start, *flags)
    assert status == 0, output
    assert f"Perplexity: {evaluate(data, checkpoints['plain'], *knn):.2f}" in output


def test_other_errors_keep_their_traceback(data, checkpoints, tmp_path):
    script = write_script(
        tmp_path / "fails.py",
        """
        from fairseq_cli.eval_lm import cli_main
        from fairseq_knnlm.plugin import config, task

        def fail(cfg):
            raise ValueError("another fault")

        task.check_settings = fail
        if __name__ == "__main__":
            cli_main()
        """,
    )
    done = run(sys.executable, script, *flags_of(data, checkpoints["plain"]), check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stdout
    assert done.stdout.strip().endswith("ValueError: another fault")


def test_a_users_script_is_left_alone(data, checkpoints, tmp_path):
    """Importing, setting up a task and the hub: uncaught errors are shown as Python shows them."""
    script = write_script(
        tmp_path / "own.py",
        """
        import sys

        before = sys.excepthook
        import fairseq_knnlm.hub
        from fairseq.tasks import setup_task
        from fairseq_knnlm.plugin.config import KNNLMConfig

        assert sys.excepthook is before is sys.__excepthook__
        flags = KNNLMConfig(data=sys.argv[1], knn_lambda=2.0)
        flags._name = "knnlm_lm"
        try:
            fairseq_knnlm.plugin.task.KNNLMTask.setup_task(flags)
        except ValueError as error:
            assert str(error).startswith("--knn-lambda must be")
        assert sys.excepthook is before
        fairseq_knnlm.hub.from_pretrained(sys.argv[2], "nonesuch.pt")
        """,
    )
    done = run(sys.executable, script, data, checkpoints["plain"].parent, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("fairseq_knnlm.errors.UserError: checkpoint_file: there is no")


def test_another_program_and_a_second_call_change_nothing(monkeypatch):
    before = sys.excepthook
    commands.end_with_text()  # this process runs no command of fairseq
    assert sys.excepthook is before
    monkeypatch.setattr(commands, "_command_of_fairseq", lambda: "eval_lm")
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error))
    commands.end_with_text()
    hook = sys.excepthook
    commands.end_with_text()
    assert sys.excepthook is hook
    faults = [KeyError("other"), AssertionError("of no command of fairseq")]
    for fault in faults:
        hook(type(fault), fault, None)
    assert shown == [(type(fault), fault, None) for fault in faults]


def test_the_hook_prints_to_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(commands, "_command_of_fairseq", lambda: "eval_lm")
    monkeypatch.setattr(sys, "excepthook", lambda *error: pytest.fail("handed on"))
    commands.end_with_text()
    sys.excepthook(UserError, UserError("--knn-k must be >= 1, got 0"), None)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "fairseq_knnlm: --knn-k must be >= 1, got 0\n")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\nfairseq_knnlm.errors.UserError: a\nb\n", "fairseq_knnlm: a\nb"),
        ("\nValueError: a\n", None),
        (
            "\nfairseq_knnlm.errors.UserError: a\n\nDuring handling of the above exception, another"
            "\n\nTraceback (most recent call last):\n  File\nKeyError: b\n",
            None,
        ),
        (
            "\nKeyError: b\n\nThe above exception was the direct cause\n\nTraceback (most recent "
            "call last):\n  File\nfairseq_knnlm.errors.UserError: a\n",
            "fairseq_knnlm: a",
        ),
        ("\nPermissionError: [Errno 13] 'x'\n", "fairseq_knnlm: [Errno 13] 'x'"),
    ],
    ids=["ours", "other", "ours became another", "another became ours", "operating system"],
)
def test_text_of_another_process(text, expected):
    error = commands.ProcessRaisedException(
        "\n\n-- Process 1 terminated with the following error:\n"
        f"Traceback (most recent call last):\n  File{text}",
        1,
        99,
    )
    assert commands.closing_text(error) == expected


@pytest.mark.parametrize("name", ["eval_lm", "interactive"])
def test_the_names_of_an_imported_command_are_its_modules(name):
    module = importlib.import_module(f"fairseq_cli.{name}")
    assert commands.running_names(name) is vars(module)


def test_a_command_that_is_not_loaded_does_not_run():
    code = (
        "import fairseq_knnlm, sys; from fairseq_knnlm.plugin.commands import running_names; "
        "print(running_names('eval_lm'), 'fairseq_cli.eval_lm' in sys.modules)"
    )
    done = run(sys.executable, "-c", code, cwd=REPOSITORY)
    assert done.stdout.strip().endswith("None False")
