"""``fairseq-knnlm-tune``: one retrieval, the whole k x lambda x temperature grid."""

import argparse
import functools
import json
import logging
import math
import os
import shlex
import sys
import time
from typing import Callable, Optional

import fairseq_knnlm

from .. import report
from ..analysis import tune_sizes
from ..bootstrap import BLOCK_TOKENS, MIN_DOCUMENTS, paired_interval
from ..config import Settings, given_settings
from ..datastore import write_atomically
from ..errors import UserError
from ..metrics import perplexity, without_infinities
from ..neighbors_file import Retrieved, beside
from ..sweep import Setting, best, best_of_each_k, mixture, sweep, temperature_at_an_end
from ..tuned import save_tuned
from ..version import __version__
from . import common
from .retrieval import Retrieval

logger = logging.getLogger("fairseq_knnlm.tune")


def make_parser():
    """The parser of this command."""
    parser = common.make_parser(
        "Tune k, lambda and temperature on one split (--gen-subset), up to --knn-k neighbours, and "
        "report the best setting on another. The best setting is stored in the datastore, for "
        "fairseq-eval-lm --knn-tuned.",
        gen_subset="valid",
    )
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
        "--knn-output", metavar="FILE", help="write the grid and the report there, as JSON"
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a report there: report.html, one page that needs no network, its plots as PNG "
        "and its tables as CSV and JSON; needs matplotlib",
    )
    return parser


def main(argv=None):
    """Entry point of ``fairseq-knnlm-tune``."""
    typed = sys.argv[1:] if argv is None else argv
    common.run(make_parser(), functools.partial(run, typed=typed), argv)


def run(cfg, args, typed):
    """Tune on one split, report on another; *typed* is the command line."""
    _refuse_settings(cfg, args)
    grid = _grid(cfg, args)
    task, model = common.load_task_and_model(cfg)
    tuned_on, reported_on = _retrievals(cfg, args, task, model)
    retrieved = tuned_on.run()
    started = time.monotonic()
    settings = sweep(retrieved, **grid)
    chosen = best(settings)
    logger.info(
        f"{len(settings)} settings in {time.monotonic() - started:.1f} s; best: k {chosen.k}, "
        f"lambda {chosen.knn_lambda:g}, temperature {chosen.temperature:g}"
    )
    if temperature_at_an_end(settings):
        logger.warning("the best temperature is at an end of the range that was tried")
    _print_curve(cfg, tuned_on.split, settings)
    sizes = tune_sizes(retrieved, chosen.temperature) if args.report else []
    summary = {"tuned_on": _report(tuned_on.split, retrieved, chosen), "best": chosen._asdict()}
    if reported_on is tuned_on:
        logger.warning(f"reported on {tuned_on.split}, where it was tuned: too good")
        summary["reported_on"] = summary["tuned_on"]
    elif reported_on is not None:
        del retrieved
        retrieved = reported_on.run()
        summary["reported_on"] = _report(reported_on.split, retrieved, chosen)
    summary["command"] = _command(typed, (reported_on or tuned_on).split, chosen)
    if args.knn_output:
        results = without_infinities({**summary, "grid": [s._asdict() for s in settings]})
        write_atomically(args.knn_output, json.dumps(results, indent=1).encode())
    _store(task, tuned_on.settings, chosen, summary)
    if args.report:
        page = report.write(
            args.report, summary, settings, retrieved, sizes, task.retriever, task.target_dictionary
        )
        logger.info(f"report written to {page}")
    logger.info(f"evaluate with: {summary['command']}")
    logger.info(json.dumps(without_infinities(summary)))


# -- before any work -------------------------------------------------------------------------------


def _refuse_settings(cfg, args) -> None:
    if cfg.distributed_training.distributed_world_size > 1:
        raise UserError("fairseq_knnlm: fairseq-knnlm-tune runs in one process")
    if cfg.task.knn_tuned:
        raise UserError("fairseq_knnlm: fairseq-knnlm-tune makes what --knn-tuned uses: drop it")
    common.require_datastore(cfg)
    if args.knn_output:
        common.refuse_unwritable("--knn-output", args.knn_output)
    if args.report is not None:
        report.refuse_impossible(args.report)


def _grid(cfg, args) -> dict:
    """Arguments of ``sweep``: what the flags name, or what it finds by itself."""
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


def _numbers(flag: str, text: Optional[str], kind: Callable, holds: Callable, expected: str):
    """The different numbers of a flag, ascending; None where it is not given."""
    if text is None:
        return None
    try:
        numbers = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(map(holds, numbers)):
        raise UserError(
            f"fairseq_knnlm: {flag} must be {expected}, separated by commas, got {text!r}"
        )
    return numbers


def _powers_of_two(k: int):
    """1, 2, 4, ... up to *k*, and *k* itself."""
    return [1 << exponent for exponent in range((k - 1).bit_length())] + [k]


def _retrievals(cfg, args, task, model):
    """What is tuned on and what is reported on: the same one, another one, or None."""
    tuned_split, reported_split = cfg.dataset.gen_subset, args.report_subset
    if tuned_split == reported_split and not args.report_on_tuned:
        raise _same_text(tuned_split, reported_split)
    path = args.knn_neighbors
    tuned_on = Retrieval(cfg, task, model, tuned_split, path)
    if reported_split in (None, tuned_split):
        return tuned_on, tuned_on if reported_split else None
    reported_path = None if path is None else beside(path, reported_split)
    reported_on = Retrieval(cfg, task, model, reported_split, reported_path)
    same = reported_on.settings["data"]["sha256"] == tuned_on.settings["data"]["sha256"]
    if same and not args.report_on_tuned:
        raise _same_text(tuned_split, reported_split)
    return tuned_on, reported_on


def _same_text(tuned_split: str, reported_split: str) -> UserError:
    return UserError(
        f"fairseq_knnlm: --gen-subset {tuned_split} and --report-subset {reported_split} are the "
        "same text: what was tuned on it says nothing about it; name another to report on, or pass "
        "--report-on-tuned"
    )


# -- results ---------------------------------------------------------------------------------------


def _print_curve(cfg, split: str, settings) -> None:
    """Perplexity against k, in fairseq's form, also for TensorBoard."""
    progress = common.with_progress(cfg, [], prefix=f"tune {split}")
    for setting in best_of_each_k(settings):
        progress.print(setting._asdict(), tag=f"tune_{split}", step=setting.k)


def _report(split: str, retrieved: Retrieved, setting: Setting) -> dict:
    """Perplexity without and with neighbours, and how sure the difference is; also logged."""
    mixed = mixture(retrieved, setting)
    base, knn = perplexity(retrieved.log_p_lm), perplexity(mixed)
    change = paired_interval(retrieved.log_p_lm, mixed, retrieved.document_starts)
    drawn = f"{change.units:,} documents"
    if change.unit == "blocks":
        drawn = (
            f"{change.units:,} blocks of {BLOCK_TOKENS:,} tokens, for want of {MIN_DOCUMENTS} "
            "documents"
        )
    logger.info(
        f"{split}: perplexity {base:.2f} without neighbours, {knn:.2f} with them, over "
        f"{len(mixed):,} tokens: {change.value:+.2%}, 95% interval [{change.low:+.2%}, "
        f"{change.high:+.2%}] ({drawn})"
    )
    return {
        "split": split,
        "tokens": len(mixed),
        "base_perplexity": base,
        "knn_perplexity": knn,
        "relative_change": change._asdict(),
    }


def _command(typed, split: str, chosen: Setting) -> str:
    """The command line of ``fairseq-eval-lm`` for the chosen setting: as typed, but for ours."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (
        "--gen-subset", "--report-subset", "--user-dir", "--task", "--knn-neighbors",
        "--knn-output", "--knn-grid-k", "--knn-grid-temperature", "--knn-grid-lambda", "--knn-k",
        "--knn-lambda", "--knn-temperature", "--report",
    ):  # fmt: skip
        ours.add_argument(flag)
    ours.add_argument("--report-on-tuned", action="store_true")
    _, others = ours.parse_known_args(typed)
    plugin = os.path.dirname(fairseq_knnlm.__file__)
    words = ["fairseq-eval-lm", *others, "--user-dir", plugin, "--task", "knnlm_lm"]
    words += ["--gen-subset", split, "--knn-k", chosen.k, "--knn-lambda", chosen.knn_lambda]
    words += ["--knn-temperature", chosen.temperature]
    return shlex.join(map(str, words))


def _store(task, settings: dict, chosen: Setting, summary: dict) -> None:
    """Keep the setting in the datastore, for ``--knn-tuned``."""
    tuned = {
        "k": chosen.k,
        "knn_lambda": chosen.knn_lambda,
        "temperature": chosen.temperature,
        **{name: settings[name] for name in ("nprobe", "distances", "model", "data", "context")},
        **{name: summary[name] for name in ("tuned_on", "reported_on") if name in summary},
        "versions": {"fairseq_knnlm": __version__},
    }
    paths = [datastore.path for datastore in task.retriever.datastores]
    try:
        path = save_tuned(paths, without_infinities(tuned))
    except OSError as error:
        logger.warning(f"the setting cannot be stored in the datastore, for --knn-tuned: {error}")
    else:
        logger.info(f"stored in {path}: fairseq-eval-lm --knn-tuned evaluates with it")
