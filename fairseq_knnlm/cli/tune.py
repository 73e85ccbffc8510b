"""``fairseq-knnlm-tune``: one retrieval, the whole k x lambda x temperature grid."""

import json
import logging
import os

import torch

from ..datastore import write_atomically
from ..errors import UserError
from ..metrics import perplexity
from ..scorer import encode_and_search
from ..sweep import Retrieved, best, evaluate, tune
from . import common

logger = logging.getLogger("fairseq_knnlm.tune")


def make_parser():
    """The parser of this command."""
    parser = common.make_parser(
        "Tune k, lambda and temperature on one split (--gen-subset), up to --knn-k neighbours, and "
        "report the best setting on another.",
        gen_subset="valid",
    )
    parser.add_argument(
        "--report-subset",
        metavar="SPLIT",
        help="split that the best setting is reported on; not the one it is tuned on",
    )
    parser.add_argument(
        "--knn-output", metavar="FILE", help="write the grid and the report there, as JSON"
    )
    return parser


def main(argv=None):
    """Entry point of ``fairseq-knnlm-tune``."""
    common.run(make_parser(), run, argv)


def run(cfg, args):
    """Tune on one split, report on another."""
    tuned_on, reported_on = cfg.dataset.gen_subset, args.report_subset
    if tuned_on == reported_on:
        raise UserError(
            f"fairseq_knnlm: --gen-subset and --report-subset are both {tuned_on!r}: what was "
            "tuned on a split says nothing about it; name another to report on"
        )
    if cfg.distributed_training.distributed_world_size > 1:
        raise UserError("fairseq_knnlm: fairseq-knnlm-tune runs in one process")
    common.require_datastore(cfg)
    if args.knn_output:
        _refuse_unwritable(args.knn_output)
    task, model = common.load_task_and_model(cfg)
    samples = _samples(cfg, task, model, tuned_on)
    if reported_on:
        reported_samples = _samples(cfg, task, model, reported_on)  # refused before any work
    retrieved = _retrieve(cfg, task, model, samples, tuned_on)
    base = perplexity(retrieved.log_p_lm)
    settings = tune(retrieved, _powers_of_two(task.retriever.k))
    chosen = best(settings)
    logger.info(
        f"{tuned_on}: perplexity {base:.2f} without neighbours, {chosen.perplexity:.2f} with "
        f"k {chosen.k}, lambda {chosen.knn_lambda:.3f}, temperature {chosen.temperature:.3g}"
    )
    results = {
        "tuned_on": {"split": tuned_on, "tokens": len(retrieved.log_p_lm), "base_perplexity": base},
        "best": chosen._asdict(),
        "grid": [setting._asdict() for setting in settings],
    }
    del retrieved
    if reported_on:
        report = evaluate(_retrieve(cfg, task, model, reported_samples, reported_on), chosen)
        logger.info(
            f"{reported_on}: perplexity {report['base_perplexity']:.2f} without neighbours, "
            f"{report['knn_perplexity']:.2f} with that setting, over {report['tokens']:,} tokens"
        )
        results["reported_on"] = {"split": reported_on, **report}
    if args.knn_output:
        write_atomically(args.knn_output, json.dumps(results, indent=1).encode())
    logger.info(
        f"evaluate with: --knn-k {chosen.k} --knn-lambda {chosen.knn_lambda:.4f} "
        f"--knn-temperature {chosen.temperature:.6g}"
    )


def _powers_of_two(k: int):
    """1, 2, 4, ... up to *k*, and *k* itself."""
    return [1 << exponent for exponent in range((k - 1).bit_length())] + [k]


def _refuse_unwritable(path: str) -> None:
    directory = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(
            f"fairseq_knnlm: --knn-output {path} cannot be written: it must name a file in a "
            "directory that is there and writable"
        )


def _samples(cfg, task, model, split: str):
    return task.evaluation_samples(
        common.load_split(task, cfg, split),
        max_tokens=common.max_tokens(cfg),
        batch_size=cfg.dataset.batch_size,
        max_positions=common.max_positions(model),
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
        context_window=cfg.eval_lm.context_window,
    )


def _retrieve(cfg, task, model, samples, split: str) -> Retrieved:
    device = next(model.parameters()).device
    parts, tokens = [], 0
    progress = common.with_progress(cfg, samples, prefix=f"retrieve {split}")
    for sample in progress:
        sample = common.to_device(sample, device)
        encoded, found = encode_and_search(model, sample, task.retriever, cfg.eval_lm.softmax_batch)
        matches = found.values == sample["target"].unsqueeze(1)
        tokens += sample["ntokens"]
        progress.log({"tokens": tokens})
        parts.append([part.cpu() for part in (encoded.log_p_lm, found.distances, matches)])
    return Retrieved(*(torch.cat(part) for part in zip(*parts)))
