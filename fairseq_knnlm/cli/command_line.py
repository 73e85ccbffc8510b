"""What the commands share: the flags of ``fairseq-eval-lm``, logging, and how a command ends."""

import contextlib
import functools
import logging
import os
import sys
from typing import Callable, Optional

from fairseq import distributed_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import progress_bar

import fairseq_knnlm

from ..errors import UserError
from ..plugin.bars import in_bars
from ..plugin.commands import closing_text
from ..plugin.config import datastore_paths
from ..plugin.spinning import spin_little
from ..plugin.stock_flags import refuse_impossible_shards
from ..progress import shown_by
from .help import asked_for, help_text
from .noise import silence

# What --user-dir takes. A module of the same name from another folder would be refused.
USER_DIR = os.path.dirname(os.path.abspath(fairseq_knnlm.__file__))


def configure_logging() -> None:
    """Log in fairseq's own format, to standard output."""
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        stream=sys.stdout,
        force=True,  # importing fairseq has configured it already, in another format
    )


@contextlib.contextmanager
def ending_with_text():
    """End the program with the text of a ``UserError`` and exit status 1, without a traceback.

    That holds as well for an error in one of the processes that fairseq starts for the GPUs.

    Raises:
        SystemExit: with that text.
    """
    try:
        yield
    except Exception as error:
        text = closing_text(error)
        if text is None:
            raise
        raise SystemExit(text) from error


def make_eval_parser(description: str, gen_subset: str):
    """The parser of ``fairseq-eval-lm``, for the task ``knnlm_lm``.

    Args:
        description (str): of the command, for its help.
        gen_subset (str): the default of ``--gen-subset``.
    """
    parser = options.get_eval_lm_parser(default_task="knnlm_lm")
    parser.description = description
    parser.set_defaults(gen_subset=gen_subset, user_dir=USER_DIR)
    return parser


def run_command(parser, main: Callable, argv: Optional[list[str]] = None) -> None:
    """Parse the command line and run the command in every process that it asks for.

    Args:
        parser: from ``make_eval_parser``.
        main (callable): called with fairseq's configuration and ``args=``, the parsed flags; can be
            pickled, for the other processes.
        argv: the command line; None: that of the program.

    Raises:
        SystemExit: with the text of a ``UserError``.
    """
    typed = sys.argv[1:] if argv is None else argv
    if asked_for(typed):
        print(help_text(parser, typed), end="")
        return
    configure_logging()
    silence()
    spin_little()
    with ending_with_text():
        args = options.parse_args_and_arch(parser, input_args=argv)
        cfg = convert_namespace_to_omegaconf(args)
        refuse_impossible_shards(cfg)
        distributed_utils.call_main(cfg, functools.partial(_run, main=main), args=args)


class Outputs:
    """The files that a command writes when its work is done.

    What cannot be written is kept until the results have been printed and all other files are
    there: hours of work are not lost for want of a file.
    """

    def __init__(self):
        self._faults: list[str] = []

    @contextlib.contextmanager
    def writing(self, what: str):
        """Go on after what is written here cannot be.

        Args:
            what (str): flag and file, for the message.
        """
        try:
            yield
        except OSError as error:
            self._faults.append(f"cannot write {what}: {error}")
        except UserError as error:
            self._faults.append(str(error))

    def refuse_unwritten(self) -> None:
        """The last thing that a command does.

        Raises:
            UserError: naming all that could not be written.
        """
        if self._faults:
            raise UserError("; ".join(self._faults))


def _run(cfg, main: Callable, args) -> None:
    """Run a command in this process, one of those that fairseq starts maybe."""
    silence()
    with shown_by(in_bars(functools.partial(_progress_bar, cfg))):
        main(cfg, args=args)


def require_datastore(cfg) -> list[str]:
    """The directories that ``--knn-datastore`` names.

    Raises:
        UserError: if it is missing.
    """
    paths = datastore_paths(cfg.task)
    if not paths:
        raise UserError("--knn-datastore is missing: which directory?")
    return paths


def max_tokens(cfg) -> int:
    """``--max-tokens``, or the default of ``fairseq-eval-lm``."""
    return cfg.dataset.max_tokens or 36000


def context_settings(cfg) -> dict:
    """How the text is cut into blocks and fed, as it is asked for on the command line."""
    return {
        "tokens_per_sample": cfg.task.tokens_per_sample + cfg.eval_lm.context_window,
        "context_window": cfg.eval_lm.context_window,
        "sample_break_mode": str(cfg.task.sample_break_mode),
        "add_bos_token": cfg.task.add_bos_token,
        "fp16": cfg.common.fp16,
    }


def with_progress(cfg, iterator, prefix: str):
    """fairseq's progress bar in the form that ``--log-format`` asks for, and its TensorBoard.

    Args:
        cfg: fairseq's configuration.
        iterator: of what is to be worked on.
        prefix (str): in front of each line.

    Returns:
        an iterator over the same; its ``log`` and ``print`` need a step, since TensorBoard knows
        no other.
    """
    master = distributed_utils.is_master(cfg.distributed_training)
    logdir = cfg.common.tensorboard_logdir if master else None
    return _progress_bar(cfg, iterator, prefix, tensorboard_logdir=logdir)


def _progress_bar(cfg, iterator, prefix: str, **options):
    return progress_bar.progress_bar(
        iterator,
        log_format=cfg.common.log_format,
        log_interval=cfg.common.log_interval,
        prefix=prefix,
        default_log_format="simple" if cfg.common.no_progress_bar else "tqdm",
        **options,
    )
