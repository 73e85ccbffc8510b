"""``fairseq-knnlm-build``: one pass over the training text, then the index."""

import argparse
import logging
import math
import os
import time

import fairseq
import numpy as np
import torch

from ..building.build import JOURNAL_TOKENS, build_datastore, encode_keys, key_of, manifest_settings
from ..building.estimate import Trial, estimate_build, table
from ..datastore.datastore import Datastore
from ..datastore.fingerprint import file_fingerprint
from ..datastore.free_space import free_bytes, refuse_small_disk
from ..datastore.journal import refuse_finished
from ..datastore.reading_lock import refuse_readers
from ..datastore.writer import value_dtype
from ..encoding.blocks import refuse_oversized
from ..encoding.chunks import NEIGHBORS_BYTES, plan_chunks
from ..encoding.encode import learned_positions
from ..encoding.key_extractor import extractor_of
from ..encoding.samples import to_device
from ..errors import UserError
from ..options import DEFAULT_METRIC
from ..plugin.results import description, write_results
from ..scoring.in_effect import DEFAULT, GIVEN, settings_line
from ..search.index_factory import default_index_factory, refuse_unbuildable
from ..units import Count
from .command_line import (
    context_settings,
    make_eval_parser,
    max_tokens,
    require_datastore,
    run_command,
    with_progress,
)
from .loading import load_split, load_task_and_model, max_positions

logger = logging.getLogger("fairseq_knnlm.build")


def make_parser():
    """The parser of this command."""
    parser = make_eval_parser(
        "Build a datastore: the keys and values of one pass over a text, and an index over them.",
        gen_subset="train",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the datastore that --knn-datastore holds, finished or not",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="write nothing: print what the datastore takes of disk, memory and time, after a "
        "short trial; status 1 if the disk is too small",
    )
    for name, what in (("--entries", "tokens of the text"), ("--dimension", "numbers of a key")):
        parser.add_argument(
            name,
            type=_whole_number,
            metavar="N",
            help=f"for --estimate before text and checkpoint are there: {what}; both are needed",
        )
    return parser


def _whole_number(text: str) -> int:
    """A whole number as people write large ones: 100000000, 100,000,000 or 1e8."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(
            f"expected a whole number, such as 100000000 or 1e8, got {text!r}"
        )
    return int(number)


def main(argv=None):
    """Entry point of ``fairseq-knnlm-build``."""
    run_command(make_parser(), run, argv)


def run(cfg, args):
    """Build a datastore, or the share of it that falls to this process.

    Args:
        cfg, args: the command line, as fairseq reads it and as it was typed.

    Raises:
        UserError: if a flag, the checkpoint or the directory will not do, before any work; if the
            disk is full, after which the same command goes on.
    """
    directory = _output_directory(cfg)
    cfg.task.knn_datastore = None  # it is written here, not searched
    num_shards, shard_id = _shard_of(cfg)
    _refuse_output(cfg, args, num_shards)
    if args.estimate or args.entries is not None or args.dimension is not None:
        if shard_id == 0:
            print_estimate(cfg, args, directory)
        return
    if args.overwrite and num_shards > 1:
        raise UserError(
            "--overwrite is for one process: shards would overwrite each other; "
            f"remove {directory} by hand first"
        )
    if args.overwrite:
        refuse_readers(directory)
    else:
        refuse_finished(directory)
    task, model, model_sha256 = load_task_and_model(cfg)
    settings = list(_settings_in_effect(cfg, task))
    logger.info(settings_line(settings))
    blocks = _load_blocks(cfg, task, model)
    build_datastore(
        directory,
        model,
        blocks,
        lambda chunks: _samples_with_progress(cfg, task, blocks, chunks),
        _manifest_settings(cfg, task, model, model_sha256),
        cfg.task.knn_index,
        num_shards,
        shard_id,
        args.overwrite,
    )
    if cfg.task.knn_output is not None:
        write_results(cfg.task.knn_output, _results(cfg, task, directory, settings))


def _refuse_output(cfg, args, num_shards: int) -> None:
    if cfg.task.knn_output is None:
        return
    if args.estimate or num_shards > 1:
        raise UserError(
            "--knn-output is of a datastore that one process builds: drop it, and describe the "
            "finished one by fairseq-knnlm-info --knn-output"
        )


def _results(cfg, task, directory: str, settings: list) -> dict:
    """What ``--knn-output`` of every command has, of a datastore that was built."""
    datastore = description(Datastore.open(directory))
    return {
        "program": "fairseq-knnlm-build",
        "tokens": datastore["entries"],
        "settings": {name: {"value": value, "source": source} for name, value, source in settings},
        "model": {"path": cfg.common_eval.path, **datastore["model"]},
        "data": {"path": cfg.task.data, **datastore["data"]},
        "context": datastore["context"],
        "datastores": [datastore],
        "versions": datastore["versions"],
    }


def _settings_in_effect(cfg, task):
    """Name, value and source of what a datastore is built with."""
    for name, value in (
        ("key", task.key["type"]),
        ("key_layer", task.key["layer"]),
        ("metric", cfg.task.knn_metric or DEFAULT_METRIC),
        ("index", cfg.task.knn_index or "by size"),
    ):
        is_given = getattr(cfg.task, f"knn_{name}") is not None
        yield name, value, GIVEN if is_given else DEFAULT


def _manifest_settings(cfg, task, model, model_sha256: str) -> dict:
    split = cfg.dataset.gen_subset
    files = [_data_path(cfg, f"{split}.{kind}") for kind in ("idx", "bin")]
    context = {
        **context_settings(cfg),
        "max_tokens": max_tokens(cfg),
        "batch_size": cfg.dataset.batch_size,
    }
    return manifest_settings(
        model,
        task.target_dictionary,
        key_of(model, task.key["type"], task.key["layer"]),
        str(cfg.task.knn_metric or DEFAULT_METRIC),
        data={"split": split, "sha256": file_fingerprint(*files)},
        context=context,
        versions={"fairseq": fairseq.__version__},
        model_sha256=model_sha256,
    )


def _samples_with_progress(cfg, task, blocks, chunks: dict):
    progress = with_progress(cfg, _samples(cfg, task, blocks, chunks.values()), prefix="dump")
    entries = 0
    for number, sample in zip(chunks, progress):
        yield sample
        entries += sample["ntokens"]
        progress.log({"entries": Count(entries)}, tag="dump", step=number)


def _samples(cfg, task, blocks, chunks):
    return task.chunk_iterator(
        blocks,
        chunks,
        max_tokens(cfg),
        cfg.dataset.batch_size,
        cfg.dataset.num_workers,
        cfg.dataset.data_buffer_size,
    )


def print_estimate(cfg, args, directory: str) -> None:
    """Print what the datastore would take; nothing is written.

    Args:
        cfg, args: the command line.
        directory (str): of the datastore.

    Raises:
        UserError: if the disk is too small for it, or the sizes are given by halves.
    """
    metric = str(cfg.task.knn_metric or DEFAULT_METRIC)
    if args.entries is None and args.dimension is None:
        count, dimension, dtype, trial = _tried(cfg)
    else:
        _check_sizes(args)
        # The vocabulary is not known: the largest type of values.
        count, dimension, dtype, trial = args.entries, args.dimension, np.dtype("uint32"), None
    index_factory = _factory(cfg, count, dimension)
    costs = estimate_build(index_factory, count, dimension, metric, dtype)
    print(f"{directory}: {count:,} entries of {dimension:,} dimensions, index {index_factory}")
    print(table(costs, count, free_bytes(directory), NEIGHBORS_BYTES, trial), flush=True)
    refuse_small_disk(directory, costs.disk_bytes, count)


def _check_sizes(args) -> None:
    if not args.estimate or min(args.entries or 0, args.dimension or 0) < 1:
        raise UserError(
            "--entries and --dimension, both >= 1, are for --estimate, got "
            f"--entries {args.entries} --dimension {args.dimension}"
        )


def _tried(cfg):
    """Sizes of the datastore of text and checkpoint, and the first two chunks of its dump."""
    task, model, _ = load_task_and_model(cfg)
    blocks = _load_blocks(cfg, task, model)
    with extractor_of(model, task.key) as extractor:
        chunks = plan_chunks(blocks.sizes, JOURNAL_TOKENS)[:2]
        device, tokens = next(model.parameters()).device, 0
        for sample in _samples(cfg, task, blocks, chunks):
            start = time.monotonic()
            encode_keys(model, to_device(sample, device), extractor).cpu()
            seconds = time.monotonic() - start
            tokens += sample["ntokens"]
        on_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        trial = Trial(tokens, sample["ntokens"] / seconds, on_gpu)
        types = len(task.target_dictionary)
        return int(blocks.sizes.sum()), extractor.dimension, value_dtype(types), trial


def _factory(cfg, count: int, dimension: int) -> str:
    """``--knn-index``, or the default for the size."""
    index_factory = cfg.task.knn_index or default_index_factory(count, dimension)
    metric = str(cfg.task.knn_metric or DEFAULT_METRIC)
    refuse_unbuildable(index_factory, count, dimension, metric)
    return index_factory


def _output_directory(cfg) -> str:
    paths = require_datastore(cfg)
    if len(paths) > 1:
        raise UserError(f"--knn-datastore must name one directory, got {paths}")
    return paths[0]


def _shard_of(cfg):
    """Number of builders and which this is, of ``--num-shards`` or of fairseq's launcher."""
    num_shards = max(cfg.dataset.num_shards, cfg.distributed_training.distributed_world_size)
    return num_shards, max(cfg.dataset.shard_id, cfg.distributed_training.distributed_rank or 0)


def _load_blocks(cfg, task, model):
    split = cfg.dataset.gen_subset
    if os.pathsep in cfg.task.data:
        raise UserError(
            f"DATA must be one directory, got {cfg.task.data}: build a datastore of "
            "each and name them all, separated by ':', in --knn-datastore"
        )
    if split == "train" and os.path.exists(_data_path(cfg, "train1.idx")):
        logger.warning(
            "fairseq-train reads train, train1, ... as one; this datastore is of train alone: "
            "build others with --gen-subset train1, ... and name them all in --knn-datastore"
        )
    blocks = task.blocks(load_split(task, split), cfg.eval_lm.context_window)
    refuse_oversized(blocks, max_positions(model), max_tokens(cfg), learned_positions(model))
    return blocks


def _data_path(cfg, name: str) -> str:
    return os.path.join(cfg.task.data, name)
