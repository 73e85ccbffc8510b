"""``fairseq-knnlm-tune``: one pass, the whole grid of neighbours and continuous cache."""

import functools
import json
import logging
import math
import sys
import time
from typing import Callable, Optional

from .. import report
from ..analysis import tune_sizes
from ..config import Settings, datastore_paths, given_settings
from ..datastore import write_atomically
from ..errors import UserError
from ..metrics import without_infinities
from ..neighbors_file import beside
from ..sweep import Setting, best, best_of_each_k, sweep, temperature_at_an_end
from . import common
from .choice import Chosen, command, measure, store
from .retrieval import Retrieval

logger = logging.getLogger("fairseq_knnlm.tune")

# Sizes of the cache that are tried besides the largest.
_HALVINGS = 4


def make_parser():
    """The parser of this command."""
    parser = common.make_parser(
        "Tune k, lambda and temperature on one split (--gen-subset), up to --knn-k neighbours, and "
        "with --knn-cache-size a continuous cache of up to that size, and report the best setting "
        "on another. The best setting is stored in the datastore, for fairseq-eval-lm --knn-tuned.",
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
    grid, cache_grid = _grid(cfg, args), _cache_grid(cfg, args)
    task, model = common.load_task_and_model(cfg)
    tuned_on, reported_on = _retrievals(cfg, args, task, model)
    retrieved = tuned_on.run()
    settings = _tune(cfg, tuned_on.split, retrieved, grid) if task.retriever else []
    chosen = Chosen(task.settings, best(settings) if settings else None)
    if cache_grid:
        chosen = chosen.tune_cache(retrieved, **cache_grid)
    sizes = tune_sizes(retrieved, chosen.knn.temperature) if args.report else []
    summary = {
        "tuned_on": measure(tuned_on.split, retrieved, chosen),
        **{name: each._asdict() for name, each in chosen.settings().items()},
    }
    if reported_on is tuned_on:
        logger.warning(f"reported on {tuned_on.split}, where it was tuned: too good")
        summary["reported_on"] = summary["tuned_on"]
    elif reported_on is not None:
        del retrieved
        retrieved = reported_on.run()
        summary["reported_on"] = measure(reported_on.split, retrieved, chosen)
    summary["command"] = command(typed, (reported_on or tuned_on).split, chosen)
    if args.knn_output:
        results = without_infinities({**summary, "grid": [s._asdict() for s in settings]})
        write_atomically(args.knn_output, json.dumps(results, indent=1).encode())
    if task.retriever:
        store(task.retriever.datastores, tuned_on.settings, chosen, summary)
    if args.report:
        page = report.write(
            args.report, summary, settings, retrieved, sizes, task.retriever, task.target_dictionary
        )
        logger.info(f"report written to {page}")
    logger.info(f"evaluate with: {summary['command']}")
    logger.info(json.dumps(without_infinities(summary)))


def _tune(cfg, split: str, retrieved, grid: dict) -> list[Setting]:
    """Every setting of the grid."""
    started = time.monotonic()
    settings = sweep(retrieved, **grid)
    chosen = best(settings)
    logger.info(
        f"{len(settings)} settings in {time.monotonic() - started:.1f} s; best: k {chosen.k}, "
        f"lambda {chosen.knn_lambda:g}, temperature {chosen.temperature:g}"
    )
    if temperature_at_an_end(settings):
        logger.warning("the best temperature is at an end of the range that was tried")
    # perplexity against k, in fairseq's form, also for TensorBoard
    progress = common.with_progress(cfg, [], prefix=f"tune {split}")
    for setting in best_of_each_k(settings):
        progress.print(setting._asdict(), tag=f"tune_{split}", step=setting.k)
    return settings


# -- before any work -------------------------------------------------------------------------------


def _refuse_settings(cfg, args) -> None:
    if cfg.distributed_training.distributed_world_size > 1:
        raise UserError("fairseq_knnlm: fairseq-knnlm-tune runs in one process")
    if cfg.task.knn_tuned:
        raise UserError("fairseq_knnlm: fairseq-knnlm-tune makes what --knn-tuned uses: drop it")
    if not datastore_paths(cfg.task) and not cfg.task.knn_cache_size:
        raise UserError(
            "fairseq_knnlm: there is nothing to tune: --knn-datastore and --knn-cache-size are "
            "both missing"
        )
    if args.report is not None and not datastore_paths(cfg.task):
        raise UserError("fairseq_knnlm: --report is about neighbours: --knn-datastore is missing")
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


def _cache_grid(cfg, args) -> Optional[dict]:
    """Arguments of ``Chosen.tune_cache``: as the flags say; None without a cache."""
    limit = cfg.task.knn_cache_size
    if not limit:
        if args.knn_grid_cache_size or args.knn_grid_cache_theta:
            raise UserError(
                "fairseq_knnlm: --knn-grid-cache-size and --knn-grid-cache-theta need "
                "--knn-cache-size, the largest size to try"
            )
        return None
    if args.knn_grid_lambda is not None:
        raise UserError(
            "fairseq_knnlm: --knn-grid-lambda and --knn-cache-size: the weights of model, "
            "neighbours and cache are computed together; drop one of them"
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


def _halves(size: int):
    """*size*, half of it and so on, ascending."""
    return sorted({size >> times for times in range(_HALVINGS + 1)} - {0})


def _retrievals(cfg, args, task, model):
    """What is tuned on and what is reported on: the same one, another one, or None."""
    tuned_split, reported_split = cfg.dataset.gen_subset, args.report_subset
    if tuned_split == reported_split and not args.report_on_tuned:
        raise _same_text(tuned_split, reported_split)
    path, with_cache = args.knn_neighbors, bool(cfg.task.knn_cache_size)
    tuned_on = Retrieval(cfg, task, model, tuned_split, path, with_cache)
    if reported_split in (None, tuned_split):
        return tuned_on, tuned_on if reported_split else None
    reported_path = None if path is None else beside(path, reported_split)
    reported_on = Retrieval(cfg, task, model, reported_split, reported_path, with_cache)
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
