"""The recipe of training with memory: its commands and its table."""

import importlib.util
import json
import sys

import pytest
from fairseq import options
from helpers.commands import REPOSITORY, USER_DIR

from fairseq_knnlm.cli import build, tune

FOLDER = REPOSITORY / "examples" / "trime"
PARSERS = {
    "fairseq-train": options.get_training_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-knnlm-build": build.make_parser,
    "fairseq-knnlm-tune": tune.make_parser,
}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "sotu"))
    for name in ("demo", "report"):  # other examples have modules of these names
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location("trime_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """In place of a pipeline: keeps the steps, and leaves what later ones read."""

    def __init__(self, work):
        self.work, self.steps = work, {}
        (work / "data").mkdir()
        (work / "data" / "dict.txt").write_text("word 1\n" * 6000)

    def run(self, name, what, command, inputs, outputs, folder=None, show=""):
        self.steps[name] = [str(argument) for argument in command]
        for path in outputs:
            if path.suffix == ".json":
                best = {"k": 64, "knn_lambda": 0.25, "temperature": 4.0}
                split = {"cache_perplexity": 90.0}
                written = {"best": best, "tuned_on": split, "reported_on": split}
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(written))
        log = self.work / f"{name}.log"
        log.write_text(f"Evaluated 1,000 tokens\nPerplexity: {100 + len(self.steps)}\n")
        return log


def parsed(words):
    program = words[0].rpartition("/")[2]
    arguments = [*words[1:]]
    if program in ("fairseq-train", "fairseq-eval-lm") and "--task" not in arguments:
        arguments += ["--task", "knnlm_lm", "--user-dir", str(USER_DIR)]
    return options.parse_args_and_arch(PARSERS[program](), input_args=arguments)


def test_every_step_is_a_command_that_its_program_takes(recipe, tmp_path):
    args = recipe.parse_args(["--work", str(tmp_path)])
    pipeline = Recorder(tmp_path)
    found = recipe.Recipe(pipeline, args).run()
    assert len(pipeline.steps) == recipe.count_steps(args.memories)
    for name, words in pipeline.steps.items():
        if name not in ("prepare", "preprocess"):
            parsed(words)
    trained = {memory: parsed(pipeline.steps[f"train-{memory}"]) for memory in args.memories}
    assert {memory: flags.trime_memory for memory, flags in trained.items()} == {
        memory: memory for memory in recipe.MEMORIES
    }
    stock = parsed(pipeline.steps["train"])
    assert {flags.max_update for flags in (stock, *trained.values())} == {2600}
    assert {flags.criterion for flags in trained.values()} == {"trime_loss"}
    external = parsed(pipeline.steps["external-test"])
    assert (external.knn_k, external.trime_temperature) == (64, 1.25)
    rows = list(recipe.table(found))
    assert len(rows) == 1 + 2 + 2 * 3 and "54.78    54.69" in "\n".join(rows)


def test_only_what_is_asked_for(recipe, tmp_path):
    args = recipe.parse_args(["--work", str(tmp_path), "--memories", "local"])
    pipeline = Recorder(tmp_path)
    recipe.Recipe(pipeline, args).run()
    assert len(pipeline.steps) == recipe.count_steps(args.memories)
    assert not {"train-long", "build"} & set(pipeline.steps)


@pytest.mark.parametrize("size, tokens", [("7M", 24576), ("150M", 9000), ("247M", 12288)])
def test_the_commands_of_the_paper(recipe, size, tokens, capsys):
    for memory in recipe.MEMORIES:
        words = [str(word) for word in recipe.paper_command(size, memory)]
        flags = parsed(words)
        assert flags.trime_memory == memory and flags.max_tokens == tokens
    recipe.main(["--dry-run", "--size", size])
    assert capsys.readouterr().out.count("fairseq-train") == 3
