"""The commands of README, and of the page that goes with them, as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import REPOSITORY, make_text

# What a reader fills in, and what is filled in here.
PLACEHOLDERS = {
    "DATA": "data-bin",
    "CHECKPOINTS": "checkpoints",
    "HYDRA_CHECKPOINTS": "hydra",
    "DIR": "datastore",
    "UPDATES": "2",
}
# Commands that are not run here: they install packages, or run for minutes.
NOT_RUN = r"make (demo|test|paper|test-legacy)\b|pip install "


def commands(page):
    """Command lines of the fenced blocks of a page, with their line ends."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (REPOSITORY / page).read_text(), re.M | re.S)
    for block in (text for language, text in blocks if not language):
        for command in re.findall(r"(?:.*\\\n)*.*\n", block):
            if re.match(r"[a-z][\w-]*[a-z] ", command) and not block.startswith("perplexity ("):
                yield command


def filled_in(command):
    for name, value in PLACEHOLDERS.items():
        command = re.sub(rf"\b{name}\b", value, command)
    return command


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder of our console scripts, as setup.py names them, for this source tree."""
    folder = tmp_path_factory.mktemp("scripts")
    text = (REPOSITORY / "setup.py").read_text()
    for name, module in re.findall(r'"(fairseq-knnlm-[\w-]+) = ([\w.]+):main"', text):
        script = folder / name
        script.write_text(f"#!{sys.executable}\nfrom {module} import main\n\nmain()\n")
        script.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def shell(scripts, tmp_path_factory):
    """Runs a command as it is typed, in a folder with the files that README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    # Eight blocks of 256 tokens at least: fairseq-train drops a batch that is no multiple of 8.
    for seed, (split, documents) in enumerate({"train": 160, "valid": 80, "test": 80}.items()):
        (folder / f"{split}.txt").write_text(make_text(seed, documents))
    (folder / "passage.txt").write_text("w1 w7 w49 w3\nw5 unheard-of w9\n")
    path = os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""
    }  # fmt: skip

    def run(command):
        done = subprocess.run(
            ["bash", "-ec", command], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
        return done.stdout

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def printed(shell):
    """What every command of README printed that is run here, by its name."""
    runnable = [each for each in commands("README.md") if not re.match(NOT_RUN, each)]
    return {command.split()[0]: shell(filled_in(command)) for command in runnable}


def test_every_command_of_readme_runs_as_it_is_printed(printed, shell):
    assert list(printed) == [
        "fairseq-preprocess", "fairseq-train", "fairseq-knnlm-build", "fairseq-knnlm-tune",
        "fairseq-knnlm-eval", "fairseq-knnlm-inspect", "fairseq-knnlm-info",
    ]  # fmt: skip
    assert "every byte is as the manifest says" in printed["fairseq-knnlm-info"]
    assert "1 of 7 words of the input" in printed["fairseq-knnlm-inspect"]
    assert (shell.folder / "passage.html").stat().st_size > 1000


def test_the_tuned_setting_gives_the_perplexity_that_was_reported(printed):
    reported = re.findall(r"test: ([\d.]+) with neighbours", printed["fairseq-knnlm-tune"])
    evaluated = re.findall(r"Perplexity: ([\d.]+)", printed["fairseq-knnlm-eval"])
    assert float(evaluated[0]) == pytest.approx(float(reported[0]), rel=1e-3)


def test_the_step_by_step_page_runs_as_it_is_printed(printed, shell):
    train, evaluate = commands("docs/own_data.md")
    assert train.startswith("fairseq-hydra-train ") and evaluate.startswith("fairseq-eval-lm ")
    again = re.findall(r"Perplexity: ([\d.]+)", shell(filled_in(evaluate)))
    assert again == re.findall(r"Perplexity: ([\d.]+)", printed["fairseq-knnlm-eval"])
    # A model of fairseq-hydra-train with our task is as good as any.
    shell(filled_in(train))
    build = next(each for each in commands("README.md") if each.startswith("fairseq-knnlm-build"))
    of_hydra = build.replace("CHECKPOINTS", "HYDRA_CHECKPOINTS").replace("DIR", "of-hydra")
    assert "is complete" in shell(filled_in(of_hydra))


def test_what_is_not_run_is_known():
    left = [each for each in commands("README.md") if re.match(NOT_RUN, each)]
    assert sum(each.startswith("make ") for each in left) == 2
    assert sum(each.startswith("pip ") for each in left) == 3
