"""``fairseq-knnlm-tune``: one pass, the whole grid of neighbours and continuous cache."""

import functools
import json
import logging
import sys
import time
from typing import Optional

from ..files import without_infinities, write_json
from ..reporting import report
from ..reporting.sizes import tune_sizes
from ..tuning.choice import Chosen, command, measure, store
from ..tuning.grid import KNNGridPoint, best
from ..tuning.knn_sweep import best_of_each_k, sweep, temperature_at_an_end
from ..tuning.tuning_data import TuningData, beside
from ..units import in_time
from .command_line import run_command, with_progress
from .loading import load_task_and_model
from .split_data import SplitData
from .tune_flags import cache_grid, knn_grid, make_parser, refuse_flags, refuse_same_text

logger = logging.getLogger("fairseq_knnlm.tune")


def main(argv=None):
    """Entry point of ``fairseq-knnlm-tune``."""
    typed = sys.argv[1:] if argv is None else argv
    run_command(make_parser(), functools.partial(run, typed=typed), argv)


def run(cfg, args, typed) -> None:
    """Tune on one split, report on another.

    Args:
        cfg: fairseq's configuration.
        args: the parsed flags of ``make_parser``.
        typed (list of str): the command line.

    Raises:
        UserError: if the flags ask for something that cannot be, before any work.
    """
    refuse_flags(cfg, args)
    knn, cache = knn_grid(cfg, args), cache_grid(cfg, args)
    task, model = load_task_and_model(cfg)
    tuned_on, reported_on = _splits(cfg, args, task, model)
    data = tuned_on.obtain()
    points = _tune(cfg, tuned_on.split, data, knn) if task.retriever else []
    chosen = Chosen(task.settings, best(points) if points else None)
    if cache:
        chosen = chosen.tune_cache(data, **cache)
    sizes = tune_sizes(data, chosen.knn.temperature) if args.report else []
    summary = {
        "tuned_on": measure(tuned_on.split, data, chosen),
        **{name: point._asdict() for name, point in chosen.points().items()},
    }
    if reported_on is tuned_on:
        logger.warning(f"reported on {tuned_on.split}, where it was tuned: too good")
        summary["reported_on"] = summary["tuned_on"]
    elif reported_on is not None:
        del data  # two splits need not fit in memory
        data = reported_on.obtain()
        summary["reported_on"] = measure(reported_on.split, data, chosen)
    summary["command"] = command(typed, (reported_on or tuned_on).split, chosen)
    if args.knn_output:
        write_json(args.knn_output, {**summary, "grid": [point._asdict() for point in points]})
    if task.retriever:
        store(task.retriever.datastores, tuned_on.settings, chosen, summary)
    if args.report:
        logger.info("writing the report: tables and figures take up to a minute")
        page = report.write(
            args.report, summary, points, data, sizes, task.retriever, task.target_dictionary
        )
        logger.info(f"report written to {page}")
    logger.info(f"evaluate with: {summary['command']}")
    logger.info(json.dumps(without_infinities(summary)))


def _splits(cfg, args, task, model) -> tuple[SplitData, Optional[SplitData]]:
    """What is tuned on and what is reported on: the same one, another one, or None."""
    tuned_split, reported_split = cfg.dataset.gen_subset, args.report_subset
    if tuned_split == reported_split:
        refuse_same_text(args, tuned_split, reported_split)
    path, with_cache = args.knn_neighbors, bool(cfg.task.knn_cache_size)
    tuned_on = SplitData(cfg, task, model, tuned_split, path, with_cache)
    if reported_split in (None, tuned_split):
        return tuned_on, tuned_on if reported_split else None
    reported_path = None if path is None else beside(path, reported_split)
    reported_on = SplitData(cfg, task, model, reported_split, reported_path, with_cache)
    if reported_on.settings["data"]["sha256"] == tuned_on.settings["data"]["sha256"]:
        refuse_same_text(args, tuned_split, reported_split)
    return tuned_on, reported_on


def _tune(cfg, split: str, data: TuningData, grid: dict) -> list[KNNGridPoint]:
    """Every point of the grid; the best ones are logged."""
    started = time.monotonic()
    points = sweep(data, **grid)
    chosen = best(points)
    logger.info(
        f"{len(points):,} settings in {in_time(time.monotonic() - started)}; best: k {chosen.k:,}, "
        f"lambda {chosen.knn_lambda:g}, temperature {chosen.temperature:g}"
    )
    if temperature_at_an_end(points):
        logger.warning("the best temperature is at an end of the range that was tried")
    # Perplexity against k, in fairseq's form, which TensorBoard has as well.
    progress = with_progress(cfg, [], prefix=f"tune {split}")
    for point in best_of_each_k(points):
        progress.print(point._asdict(), tag=f"tune_{split}", step=point.k)
    return points
