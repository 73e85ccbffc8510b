"""The flags of ``fairseq-knnlm-tune``, the grids that they ask for, and what is refused."""

import math
import os
from typing import Callable, Optional

from ..errors import UserError
from ..plugin.config import datastore_paths, given_settings
from ..reporting.report import refuse_impossible
from ..scoring.settings import Settings
from .command_line import make_eval_parser

# What --knn-gate can be.
CONSTANT = "constant"
GATES = (CONSTANT, "buckets", "nest", "learned")
# How often the largest size of the cache is halved: every half is tried as well.
_HALVINGS = 4


def make_parser():
    """The parser of this command."""
    parser = make_eval_parser(
        "Tune k, lambda and temperature on one split (--gen-subset), up to --knn-k neighbours, and "
        "with --knn-cache-size a continuous cache of up to that size, and report the best setting "
        "on another. The best setting is stored in the datastore, for fairseq-eval-lm --knn-tuned.",
        gen_subset="valid",
    )
    _add_splits(parser)
    _add_grids(parser)
    _add_results(parser)
    return parser


def _add_splits(parser) -> None:
    """Flags of the texts, and of what is retrieved for them."""
    parser.add_argument(
        "--report-subset",
        metavar="SPLIT",
        help="split that the best setting is reported on; not the one it is tuned on",
    )
    parser.add_argument(
        "--report-on-tuned",
        action="store_true",
        help="allow --report-subset to be the split that is tuned on",
    )
    parser.add_argument(
        "--knn-neighbors",
        metavar="FILE",
        help=".npz file that keeps what is retrieved for --gen-subset: written if it is not there, "
        "else read in place of a search; that of --report-subset is FILE with .SPLIT before its "
        "extension",
    )


def _add_grids(parser) -> None:
    """Flags of what is tried."""
    parser.add_argument(
        "--knn-grid-k", metavar="K,...", help="only these k (default: powers of two up to --knn-k)"
    )
    parser.add_argument(
        "--knn-grid-temperature",
        metavar="T,...",
        help="only these temperatures (default: powers of two, then closer around the best)",
    )
    parser.add_argument(
        "--knn-grid-lambda",
        metavar="L,...",
        help="only these lambdas (default: the best one for each k and temperature, computed)",
    )
    parser.add_argument(
        "--knn-grid-cache-size",
        metavar="N,...",
        help="only these sizes of the cache (default: --knn-cache-size and halves of it)",
    )
    parser.add_argument(
        "--knn-grid-cache-theta",
        metavar="THETA,...",
        help="only these thetas (default: powers of two, then closer around the best); the weights "
        "of model, neighbours and cache are computed",
    )


def _add_results(parser) -> None:
    """Flags of what is written."""
    parser.add_argument(
        "--no-store",
        action="store_true",
        help="leave the setting that is stored in the datastore as it is",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the stored setting also if it was tuned on more text",
    )
    parser.add_argument(
        "--knn-gate",
        choices=GATES,
        default=CONSTANT,
        help="weights that depend on the token: 'buckets', by the quality of its neighbours; "
        "'nest', by the rule of two numbers of Li et al. (2024); 'learned', by networks, which can "
        "leave searches out, see --knn-skip (default: constant, the same for all)",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a report there: report.html, one page that needs no network, its figures as "
        "PNG, SVG and PDF, and its tables as CSV, LaTeX and JSON; needs matplotlib",
    )


def refuse_flags(cfg, args) -> None:
    """Refuse, before any work, what cannot be tuned or could not be written after it.

    Args:
        cfg: fairseq's configuration.
        args: the parsed flags of ``make_parser``.

    Raises:
        UserError: naming the flag.
    """
    if cfg.distributed_training.distributed_world_size > 1:
        raise UserError("fairseq-knnlm-tune runs in one process")
    if cfg.task.knn_tuned:
        raise UserError("fairseq-knnlm-tune makes what --knn-tuned uses: drop it")
    if not datastore_paths(cfg.task) and not cfg.task.knn_cache_size:
        raise UserError(
            "there is nothing to tune: --knn-datastore and --knn-cache-size are both missing"
        )
    if cfg.task.trime_temperature is not None:
        raise UserError(
            "fairseq-knnlm-tune has no grid of --trime-temperature: drop it, and compare values by "
            "fairseq-eval-lm"
        )
    if args.knn_gate != CONSTANT and not datastore_paths(cfg.task):
        raise UserError(f"--knn-gate {args.knn_gate} weighs neighbours: --knn-datastore is missing")
    if cfg.task.knn_skip:
        raise UserError("fairseq-knnlm-tune makes every search: drop --knn-skip")
    if args.report is not None and not datastore_paths(cfg.task):
        raise UserError("--report is about neighbours: --knn-datastore is missing")
    if args.report is not None:
        refuse_impossible(args.report)
    output = cfg.task.knn_output
    if None not in (output, args.knn_neighbors) and _is_one_file(output, args.knn_neighbors):
        raise UserError(f"--knn-output and --knn-neighbors name the same file, {output}: name two")


def _is_one_file(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def refuse_same_text(args, tuned_split: str, reported_split: str) -> None:
    """Refuse to report on the text that is tuned on, unless that was asked for.

    Args:
        args: the parsed flags of ``make_parser``.
        tuned_split, reported_split (str): names of two splits that are the same text.

    Raises:
        UserError: naming both.
    """
    if not args.report_on_tuned:
        raise UserError(
            f"--gen-subset {tuned_split} and --report-subset {reported_split} are the same text: "
            "what was tuned on it says nothing about it; name another to report on, or pass "
            "--report-on-tuned"
        )


# -- grids -----------------------------------------------------------------------------------------


def knn_grid(cfg, args) -> dict:
    """Arguments of ``tuning.sweep``: what the flags name, or what it finds by itself.

    Args:
        cfg: fairseq's configuration.
        args: the parsed flags of ``make_parser``.

    Raises:
        UserError: naming the flag of a number that cannot be.
    """
    limit = Settings(**given_settings(cfg.task)).k
    ks = _numbers(
        "--knn-grid-k", args.knn_grid_k, int, lambda k: 1 <= k <= limit,
        f"whole numbers in [1, {limit}], the most being --knn-k",
    )  # fmt: skip
    temperatures = _numbers(
        "--knn-grid-temperature", args.knn_grid_temperature, float, lambda t: 0.0 < t < math.inf,
        "finite numbers > 0",
    )  # fmt: skip
    lambdas = _numbers(
        "--knn-grid-lambda", args.knn_grid_lambda, float, lambda x: 0.0 <= x <= 1.0,
        "numbers in [0, 1]",
    )  # fmt: skip
    return {
        "ks": _powers_of_two(limit) if ks is None else ks,
        "temperatures": temperatures,
        "lambdas": lambdas,
    }


def cache_grid(cfg, args) -> Optional[dict]:
    """Arguments of ``Chosen.tune_cache``: as the flags say; None without a cache.

    Args:
        cfg: fairseq's configuration.
        args: the parsed flags of ``make_parser``.

    Raises:
        UserError: naming the flag of a number that cannot be, or flags that exclude each other.
    """
    limit = cfg.task.knn_cache_size
    if not limit:
        if args.knn_grid_cache_size or args.knn_grid_cache_theta:
            raise UserError(
                "--knn-grid-cache-size and --knn-grid-cache-theta need --knn-cache-size, the "
                "largest size to try"
            )
        return None
    if args.knn_grid_lambda is not None:
        raise UserError(
            "--knn-grid-lambda and --knn-cache-size: the weights of model, neighbours and cache "
            "are computed together; drop one of them"
        )
    sizes = _numbers(
        "--knn-grid-cache-size", args.knn_grid_cache_size, int, lambda n: 1 <= n <= limit,
        f"whole numbers in [1, {limit}], the most being --knn-cache-size",
    )  # fmt: skip
    thetas = _numbers(
        "--knn-grid-cache-theta", args.knn_grid_cache_theta, float,
        lambda theta: 0.0 <= theta < math.inf, "finite numbers >= 0",
    )  # fmt: skip
    return {"sizes": sizes or _halves(limit), "thetas": thetas}


def _numbers(flag: str, text: Optional[str], kind: Callable, holds: Callable, expected: str):
    """The different numbers of a flag, ascending; None where it is not given.

    Args:
        flag (str): for the message.
        text (str): what was given, numbers separated by commas.
        kind (callable): int or float.
        holds (callable): whether a number can be.
        expected (str): in words, for the message.
    """
    if text is None:
        return None
    try:
        numbers = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(map(holds, numbers)):
        raise UserError(f"{flag} must be {expected}, separated by commas, got {text!r}")
    return numbers


def _powers_of_two(k: int) -> list[int]:
    """1, 2, 4, ... up to *k*, and *k* itself."""
    return [1 << exponent for exponent in range((k - 1).bit_length())] + [k]


def _halves(size: int) -> list[int]:
    """*size*, half of it and so on, ascending."""
    return sorted({size >> times for times in range(_HALVINGS + 1)} - {0})
