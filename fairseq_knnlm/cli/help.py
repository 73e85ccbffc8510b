"""What ``--help`` prints: our flags, then those of ``fairseq-eval-lm`` that are used most.

fairseq's own help is 500 lines in which ours would be lost; ``--help-all`` prints those as well.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from fairseq import options

from ..plugin.task import KNNLMTask

_HELP, _HELP_ALL = {"-h", "--help"}, "--help-all"
# Of fairseq-eval-lm, in the order in which they are shown.
_USUAL = (
    "--path", "--gen-subset", "--tokens-per-sample", "--context-window", "--sample-break-mode",
    "--max-tokens", "--batch-size", "--cpu", "--fp16", "--num-workers", "--num-shards",
    "--shard-id", "--tokenizer", "--bpe", "--remove-bpe", "--model-overrides", "--log-format",
    "--log-interval", "--tensorboard-logdir",
)  # fmt: skip


def asked_for(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return bool({*_HELP, _HELP_ALL} & set(argv))


def help_text(parser: argparse.ArgumentParser, argv: Sequence[str]) -> str:
    """The help that a command line asks for.

    Args:
        parser: of one of our commands, which takes the flags of ``fairseq-eval-lm``.
        argv (sequence of str): the command line; with ``--help-all`` every flag is described.
    """
    stock = _by_flag(options.get_eval_lm_parser())
    own = [action for flag, action in _by_flag(parser).items() if flag not in stock]
    KNNLMTask.add_args(parser)  # fairseq adds them later, once it knows the task
    every = _by_flag(parser)
    of_memory = [
        action for flag, action in every.items() if flag.startswith("--knn-") and action not in own
    ]
    usual = _unique([every[flag] for flag in _USUAL])
    shown = {id(action) for action in (*own, *of_memory, *usual)}
    rest = [action for action in _unique(parser._actions) if id(action) not in shown]
    sections = {
        "this command": own,
        "neighbours and cache (task knnlm_lm)": of_memory,
        "text and model, as of fairseq-eval-lm": usual,
    }
    positional = [action for action in rest if not action.option_strings]
    others = [action for action in rest if action.option_strings and action.dest != "help"]
    if _HELP_ALL in argv:
        sections["all other flags of fairseq-eval-lm"] = others
    else:
        closing = f"{_HELP_ALL} describes {len(others)} more flags, which are fairseq's."
    return _render(parser, positional, sections, None if _HELP_ALL in argv else closing)


def _by_flag(parser) -> dict:
    return {flag: action for action in parser._actions for flag in action.option_strings}


def _unique(actions) -> list:
    """The actions in their order, each once: a flag may have two names."""
    return list({id(action): action for action in actions}.values())


def _render(parser, positional, sections: dict, closing: Optional[str]) -> str:
    formatter = parser.formatter_class(prog=parser.prog)
    names = " ".join(action.metavar or action.dest.upper() for action in positional)
    formatter.add_usage(f"{parser.prog} {names} [flags]", [], [])
    formatter.add_text(parser.description)
    for title, actions in sections.items():
        formatter.start_section(title)
        formatter.add_arguments(_unique(actions))
        formatter.end_section()
    formatter.add_text(closing)
    return formatter.format_help()
