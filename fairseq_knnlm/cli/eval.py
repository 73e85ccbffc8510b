"""``fairseq-knnlm-eval``: the stock ``fairseq-eval-lm``, with ``--user-dir`` and ``--task`` set."""

import sys

from fairseq_cli import eval_lm

from .command_line import USER_DIR, configure_logging, ending_with_text, make_eval_parser
from .help import asked_for, help_text
from .noise import silence, without_configuration


def make_parser():
    """The parser of this command, for its help; the command line is read by fairseq's own."""
    return make_eval_parser(
        "Perplexity with neighbours: fairseq-eval-lm with --user-dir and --task knnlm_lm filled "
        "in. All its flags are the same.",
        gen_subset="test",
    )


def main(argv=None):
    """Entry point of ``fairseq-knnlm-eval``."""
    typed = sys.argv[1:] if argv is None else list(argv)
    if asked_for(typed):
        print(help_text(make_parser(), typed), end="")
        return
    configure_logging()
    silence()
    without_configuration(eval_lm.logger.name)
    # In front: flags that are typed count.
    sys.argv[1:] = ["--user-dir", USER_DIR, "--task", "knnlm_lm", *typed]
    with ending_with_text():
        eval_lm.cli_main()
