"""``--help``: our flags first, few of fairseq's; ``--help-all``: every flag, each once."""

import importlib
import re

import pytest
from fairseq import options

from fairseq_knnlm.plugin.task import KNNLMTask

COMMANDS = ["build", "tune", "inspect", "eval"]


def printed(name, flag, capsys):
    importlib.import_module(f"fairseq_knnlm.cli.{name}").main([flag])
    return capsys.readouterr().out


def flags_in(text):
    """Flags that are described, in their order."""
    return re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.M)


def stock_flags():
    parser = options.get_eval_lm_parser()
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("name", COMMANDS)
def test_our_flags_come_first(name, capsys):
    flags = flags_in(printed(name, "--help", capsys))
    ours = [flag for flag in flags if flag not in stock_flags()]
    memory = {"--knn-datastore", "--knn-k", "--knn-lambda", "--knn-temperature"}
    assert memory <= set(ours)
    # Flags of language modelling are the task's, as ours are, and stand with fairseq's.
    of_task = {"--tokens-per-sample", "--sample-break-mode"}
    first_of_stock = min(flags.index(flag) for flag in flags if flag in stock_flags() | of_task)
    assert all(flags.index(flag) < first_of_stock for flag in ours if flag not in of_task)
    assert "--path" in flags and "--ddp-backend" not in flags


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_describes_every_flag_once(name, capsys):
    parser = importlib.import_module(f"fairseq_knnlm.cli.{name}").make_parser()
    KNNLMTask.add_args(parser)
    text = printed(name, "--help-all", capsys)
    flags = flags_in(text)
    assert len(flags) == len(set(flags))
    every = {flag for action in parser._actions for flag in action.option_strings}
    assert every - set(re.findall(r"--[\w-]+", text)) == {"-h", "--help"}


def test_help_says_how_to_see_the_rest(capsys):
    short, long = (printed("build", flag, capsys) for flag in ("--help", "--help-all"))
    (more,) = re.findall(r"--help-all describes (\d+) more flags", short)
    assert len(flags_in(long)) - len(flags_in(short)) == int(more)
    assert len(short.splitlines()) < 160 < 300 < len(long.splitlines())


def test_short_help(capsys):
    assert printed("build", "-h", capsys) == printed("build", "--help", capsys)
