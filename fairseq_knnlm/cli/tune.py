"""``fairseq-knnlm-tune``: one pass, the whole grid of neighbours and continuous cache."""

import functools
import json
import logging
import sys
import time
from typing import Optional

from ..files import without_infinities
from ..plugin.config import datastore_paths
from ..plugin.results import circumstances, write_results
from ..reporting import report
from ..reporting.sizes import tune_sizes
from ..scoring.settings import AUTO
from ..tuning.choice import METHODS, Chosen, command, measure, refuse_to_replace, store
from ..tuning.choose_gate import with_gate
from ..tuning.grid import KNNGridPoint, best, of_larger_units
from ..tuning.knn_sweep import best_of_each_k, k_at_an_end, sweep, temperature_at_an_end
from ..tuning.tuning_data import TuningData, beside
from ..units import in_time
from .command_line import Outputs, context_settings, run_command, with_progress
from .described import describe_run
from .loading import Loaded, load_task_and_model
from .split_data import SplitData
from .tune_flags import CONSTANT, cache_grid, knn_grid, make_parser, refuse_flags, refuse_same_text

logger = logging.getLogger("fairseq_knnlm.tune")

# Settings that a grid is tried with. Of k, and of the size of a cache, this is the largest.
_NOT_TUNED = ("k", "nprobe", "distances", "cache_size", "cache_metric", "cache_reset")


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
        UserError: if the flags ask for something that cannot be, before any work; or at the end,
            for what could not be written.
    """
    refuse_flags(cfg, args)
    knn, cache = knn_grid(cfg, args), cache_grid(cfg, args)
    task, model, tuned_on, reported_on = _prepare(cfg, args)
    outputs = Outputs()
    data = tuned_on.obtain(outputs)
    starts = tuned_on.word_starts(data)
    per_unit = 1.0 if starts is None else len(data.log_p_lm) / len(starts)
    points = _tune(cfg, tuned_on.split, data, knn, per_unit) if task.retriever else []
    chosen = _choose(args.knn_gate, task, data, points, cache, per_unit)
    sizes = tune_sizes(data, chosen.knn.temperature) if args.report else []
    summary = {
        "tuned_on": measure(tuned_on.split, data, chosen, starts, tuned_on.text_bytes(data)),
        **{name: point._asdict() for name, point in chosen.points().items()},
    }
    if reported_on is tuned_on:
        logger.warning(f"reported on {tuned_on.split}, where it was tuned: too good")
        summary["reported_on"] = summary["tuned_on"]
    elif reported_on is not None:
        del data  # two splits need not fit in memory
        data = reported_on.obtain(outputs)
        starts = reported_on.word_starts(data)
        summary["reported_on"] = measure(
            reported_on.split, data, chosen, starts, reported_on.text_bytes(data)
        )
    summary["command"] = command(typed, (reported_on or tuned_on).split, chosen)
    if task.retriever and not args.no_store:
        with outputs.writing(f"what was tuned into {task.retriever.datastores[0].path}"):
            store(task.retriever.datastores, tuned_on.settings, chosen, summary)
    if cfg.task.knn_output is not None:
        with outputs.writing(f"--knn-output {cfg.task.knn_output}"):
            write_results(cfg.task.knn_output, _results(cfg, task, chosen, summary, points))
    if args.report:
        logger.info("writing the report: tables and figures take up to a minute")
        with outputs.writing(f"--report {args.report}"):
            page = report.write(
                args.report, {**summary, **describe_run(cfg, model)}, points, chosen.cache_grid,
                data, sizes, task.retriever, task.target_dictionary, starts, chosen,
            )  # fmt: skip
            logger.info(f"report written to {page}")
    if chosen.gate is not None and args.no_store:
        logger.info("no flag can say what the gate is: without --no-store --knn-tuned uses it")
    else:
        logger.info(f"evaluate with: {summary['command']}")
    logger.info(json.dumps(without_infinities(summary)))
    outputs.refuse_unwritten()


def _choose(
    gate: str, task, data: TuningData, points, cache: Optional[dict], tokens_per_unit: float
) -> Chosen:
    """The best point, and beside it the best cache and a gate where they are asked for."""
    chosen = Chosen(task.settings, best(points) if points else None)
    if cache:
        chosen = chosen.tune_cache(data, **cache, tokens_per_unit=tokens_per_unit)
    if gate != CONSTANT:
        dictionary, datastores = task.target_dictionary, task.retriever.datastores
        eos = dictionary.eos()
        chosen = with_gate(chosen, gate, data, datastores, len(dictionary), eos)
    return chosen


def _prepare(cfg, args):
    """Load everything, and refuse what cannot be, before any work.

    Returns:
        tuple: task, model, what is tuned on and what is reported on, see ``_splits``.
    """
    if datastore_paths(cfg.task) and cfg.task.knn_temperature in (None, AUTO):
        # The grid has temperatures of its own, so a datastore that records none can be tuned.
        cfg.task.knn_temperature = "1"
    loaded = load_task_and_model(cfg)
    task = loaded.task
    task.warn_of_no_neighbors()
    logger.info(f"{task.in_effect.line(_NOT_TUNED)}; the others are tuned")
    tuned_on, reported_on = _splits(cfg, args, loaded)
    if task.retriever and not (args.no_store or args.overwrite):
        refuse_to_replace(datastore_paths(cfg.task), tuned_on.settings["data"], tuned_on.tokens)
    return task, loaded.model, tuned_on, reported_on


def _results(cfg, task, chosen: Chosen, summary: dict, points: list[KNNGridPoint]) -> dict:
    """What ``--knn-output`` of every command has, of the best setting; the summary and the grid."""
    measured = summary.get("reported_on", summary["tuned_on"])
    *_, method = (name for name in METHODS if f"{name}_perplexity" in measured)
    in_effect = task.in_effect.with_tuned(chosen.final())
    names = ("split", "tokens", "counted", "bytes", "base_perplexity", "base_bits_per_byte")
    return {
        "program": "fairseq-knnlm-tune",
        **{name: measured.get(name) for name in names},
        "perplexity": measured[f"{method}_perplexity"],
        "bits_per_byte": measured.get(f"{method}_bits_per_byte"),
        **circumstances(task, in_effect, context_settings(cfg), measured["split"]),
        "gate": None if chosen.gate is None else chosen.gate.kind,
        **summary,
        "grid": [point._asdict() for point in points],
    }


def _splits(cfg, args, loaded: Loaded) -> tuple[SplitData, Optional[SplitData]]:
    """What is tuned on and what is reported on: the same one, another one, or None."""
    tuned_split, reported_split = cfg.dataset.gen_subset, args.report_subset
    if tuned_split == reported_split:
        refuse_same_text(args, tuned_split, reported_split)
    path, kept = args.knn_neighbors, (bool(cfg.task.knn_cache_size), args.knn_gate == "learned")
    tuned_on = SplitData(cfg, loaded, tuned_split, path, *kept)
    if reported_split in (None, tuned_split):
        return tuned_on, tuned_on if reported_split else None
    reported_path = None if path is None else beside(path, reported_split)
    reported_on = SplitData(cfg, loaded, reported_split, reported_path, *kept)
    if reported_on.settings["data"]["sha256"] == tuned_on.settings["data"]["sha256"]:
        refuse_same_text(args, tuned_split, reported_split)
    return tuned_on, reported_on


def _tune(
    cfg, split: str, data: TuningData, grid: dict, tokens_per_unit: float
) -> list[KNNGridPoint]:
    """Every point of the grid, perplexity of the units that count; the best ones are logged."""
    started = time.monotonic()
    points = [of_larger_units(point, tokens_per_unit) for point in sweep(data, **grid)]
    chosen = best(points)
    logger.info(
        f"{len(points):,} settings in {in_time(time.monotonic() - started)}; best: k {chosen.k:,}, "
        f"lambda {chosen.knn_lambda:g}, temperature {chosen.temperature:g}"
    )
    if temperature_at_an_end(points):
        logger.warning("the best temperature is at an end of the range that was tried")
    end = k_at_an_end(points)
    if end is not None:
        flags = "--knn-k" if end == "largest" else "--knn-grid-k"
        logger.warning(
            f"the best k, {chosen.k}, is the {end} that was tried: see {flags} for others"
        )
    # Perplexity against k, in fairseq's form, which TensorBoard has as well.
    progress = with_progress(cfg, [], prefix=f"tune {split}")
    for point in best_of_each_k(points):
        progress.print(point._asdict(), tag=f"tune_{split}", step=point.k)
    return points
