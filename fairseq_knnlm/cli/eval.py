"""``fairseq-knnlm-eval``: the stock ``fairseq-eval-lm``, with ``--user-dir`` and ``--task`` set."""

import sys

from fairseq import distributed_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm

from ..plugin.spinning import spin_little
from ..plugin.stock_flags import refuse_impossible_shards
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
    spin_little()
    without_configuration(eval_lm.logger.name)
    # In front: flags that are typed count.
    arguments = ["--user-dir", USER_DIR, "--task", "knnlm_lm", *typed]
    with ending_with_text():  # what eval_lm.cli_main does; of no processes it starts none
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), input_args=arguments)
        cfg = convert_namespace_to_omegaconf(args)
        refuse_impossible_shards(cfg)
        distributed_utils.call_main(cfg, eval_lm.main)
