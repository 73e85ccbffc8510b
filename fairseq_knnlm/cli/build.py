"""``fairseq-knnlm-build``: one pass over the training text, then the index."""

import logging
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor

import fairseq
import numpy as np
import torch

from .. import estimate as estimates
from .. import index as faiss_index
from ..config import DEFAULT_KEY, DEFAULT_METRIC, DEFAULT_NPROBE
from ..context import plan_chunks, refuse_oversized, shard
from ..datastore_writer import (
    DatastoreWriter,
    free_bytes,
    refuse_finished,
    refuse_small_disk,
    value_dtype,
)
from ..errors import UserError
from ..fingerprint import dictionary_fingerprint, file_fingerprint, weights_fingerprint
from ..key_extractor import KeyExtractor, resolve_layer
from ..scorer import encode
from ..task import NEIGHBORS_BYTES
from ..temperature import find_temperature
from ..version import __version__
from . import common

logger = logging.getLogger("fairseq_knnlm.build")

# Tokens between two journal entries: what a killed dump loses at most.
CHUNK_TOKENS = 1 << 14


def make_parser():
    """The parser of this command."""
    parser = common.make_parser(
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
            type=int,
            help=f"for --estimate before text and checkpoint are there: {what}; both are needed",
        )
    return parser


def main(argv=None):
    """Entry point of ``fairseq-knnlm-build``."""
    common.run(make_parser(), build, argv)


def build(cfg, args):
    """Build a datastore, or the share of it that falls to this process."""
    directory = _output_directory(cfg)
    cfg.task.knn_datastore = None  # it is written here, not searched
    num_shards, shard_id = _shard_of(cfg)
    if args.estimate or args.entries is not None or args.dimension is not None:
        if shard_id == 0:
            estimate(cfg, args, directory)
        return
    if args.overwrite and num_shards > 1:
        raise UserError(
            "fairseq_knnlm: --overwrite is for one process: shards would overwrite each other; "
            f"remove {directory} by hand first"
        )
    if not args.overwrite:
        refuse_finished(directory)
    task, model = common.load_task_and_model(cfg)
    blocks = _load_blocks(cfg, task, model)
    chunks = plan_chunks(blocks.sizes, CHUNK_TOKENS)
    sizes = [int(blocks.sizes[chunk.start : chunk.stop].sum()) for chunk in chunks]
    settings = _settings(cfg, task, model)
    with KeyExtractor(
        model.decoder, settings["key"]["type"], settings["key"]["layer"]
    ) as extractor:
        factory = _factory(cfg, sum(sizes), extractor.dimension)
        cost = faiss_index.estimate_cost(
            factory, sum(sizes), extractor.dimension, settings["metric"]
        )
        with DatastoreWriter(
            directory,
            {**settings, "index": {"factory": factory}},
            sizes,
            extractor.dimension,
            value_dtype(len(task.target_dictionary)),
            num_shards=num_shards,
            shard_id=shard_id,
            overwrite=args.overwrite,
            index_bytes=cost.file + cost.parts,
        ) as writer:
            mine = shard(range(len(chunks)), num_shards, shard_id)
            todo = sorted(set(mine) - set(writer.done))
            if len(todo) < len(mine):
                logger.info(f"going on after {len(mine) - len(todo)} of {len(mine)} chunks")
            _dump(cfg, task, model, extractor, blocks, {i: chunks[i] for i in todo}, writer)
            _finish(writer, factory, settings["metric"], num_shards)


def estimate(cfg, args, directory: str) -> None:
    """Print what the datastore would take; nothing is written.

    Raises:
        UserError: if the disk is too small for it, or the sizes are given by halves.
    """
    metric = str(cfg.task.knn_metric or DEFAULT_METRIC)
    if args.entries is None and args.dimension is None:
        count, dimension, dtype, trial = _tried(cfg)
    else:
        _check_sizes(args)
        # of a vocabulary that is not known
        count, dimension, dtype, trial = args.entries, args.dimension, np.dtype("uint32"), None
    factory = _factory(cfg, count, dimension)
    costs = estimates.estimate(count, dimension, dtype, factory, metric)
    print(f"{directory}: {count:,} entries of {dimension:,} dimensions, index {factory}")
    print(estimates.table(costs, count, free_bytes(directory), NEIGHBORS_BYTES, trial), flush=True)
    refuse_small_disk(directory, costs.disk_bytes, count)


def _check_sizes(args) -> None:
    if not args.estimate or min(args.entries or 0, args.dimension or 0) < 1:
        raise UserError(
            "fairseq_knnlm: --entries and --dimension, both >= 1, are for --estimate, got "
            f"--entries {args.entries} --dimension {args.dimension}"
        )


def _tried(cfg):
    """Sizes of the datastore of text and checkpoint, and the first two chunks of its dump."""
    task, model = common.load_task_and_model(cfg)
    blocks = _load_blocks(cfg, task, model)
    key = _key_settings(cfg, model)
    with KeyExtractor(model.decoder, key["type"], key["layer"]) as extractor:
        chunks = plan_chunks(blocks.sizes, CHUNK_TOKENS)[:2]
        device, tokens = next(model.parameters()).device, 0
        for sample in _samples(cfg, task, blocks, chunks):
            start = time.monotonic()
            _encode_keys(model, common.to_device(sample, device), extractor).cpu()
            seconds = time.monotonic() - start
            tokens += sample["ntokens"]
        on_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        trial = estimates.Trial(tokens, sample["ntokens"] / seconds, on_gpu)
        types = len(task.target_dictionary)
        return int(blocks.sizes.sum()), extractor.dimension, value_dtype(types), trial


def _factory(cfg, count: int, dimension: int) -> str:
    """``--knn-index``, or the default for the size."""
    factory = cfg.task.knn_index or faiss_index.default_factory(count, dimension)
    metric = str(cfg.task.knn_metric or DEFAULT_METRIC)
    faiss_index.refuse_unbuildable(factory, count, dimension, metric)
    return factory


def _output_directory(cfg) -> str:
    paths = common.require_datastore(cfg)
    if len(paths) > 1:
        raise UserError(f"fairseq_knnlm: --knn-datastore must name one directory, got {paths}")
    return paths[0]


def _shard_of(cfg):
    """Number of builders and which this is, of ``--num-shards`` or of fairseq's launcher."""
    num_shards = max(cfg.dataset.num_shards, cfg.distributed_training.distributed_world_size)
    shard_id = max(cfg.dataset.shard_id, cfg.distributed_training.distributed_rank or 0)
    if not 0 <= shard_id < num_shards:
        raise UserError(
            f"fairseq_knnlm: --shard-id must be in [0, {num_shards}), got {shard_id}: it counts "
            "from 0 to --num-shards - 1"
        )
    return num_shards, shard_id


def _load_blocks(cfg, task, model):
    split = cfg.dataset.gen_subset
    if os.pathsep in cfg.task.data:
        raise UserError(
            f"fairseq_knnlm: DATA must be one directory, got {cfg.task.data}: build a datastore of "
            "each and name them all, separated by ':', in --knn-datastore"
        )
    if split == "train" and os.path.exists(_data_path(cfg, "train1.idx")):
        logger.warning(
            "fairseq-train reads train, train1, ... as one; this datastore is of train alone: "
            "build others with --gen-subset train1, ... and name them all in --knn-datastore"
        )
    blocks = task.blocks(common.load_split(task, cfg, split), cfg.eval_lm.context_window)
    refuse_oversized(blocks, common.max_positions(model), common.max_tokens(cfg))
    return blocks


def _data_path(cfg, name: str) -> str:
    return os.path.join(cfg.task.data, name)


def _key_settings(cfg, model) -> dict:
    layer = -1 if cfg.task.knn_key_layer is None else cfg.task.knn_key_layer
    return {
        "type": str(cfg.task.knn_key or DEFAULT_KEY),
        "layer": resolve_layer(model.decoder, layer),
        "layers": len(model.decoder.layers),
    }


def _settings(cfg, task, model) -> dict:
    """Everything that decides what is written, for the manifest."""
    split = cfg.dataset.gen_subset
    return {
        "key": _key_settings(cfg, model),
        "metric": str(cfg.task.knn_metric or DEFAULT_METRIC),
        "model": {
            "sha256": weights_fingerprint(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "dictionary": {
            "sha256": dictionary_fingerprint(task.target_dictionary),
            "types": len(task.target_dictionary),
        },
        "data": {
            "split": split,
            "sha256": file_fingerprint(
                _data_path(cfg, f"{split}.idx"), _data_path(cfg, f"{split}.bin")
            ),
        },
        "context": {
            **common.context_settings(cfg),
            "max_tokens": common.max_tokens(cfg),
            "batch_size": cfg.dataset.batch_size,
        },
        "versions": {
            "fairseq_knnlm": __version__,
            "fairseq": fairseq.__version__,
            "torch": torch.__version__,
            "faiss": faiss_index.faiss_version(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _samples(cfg, task, blocks, chunks):
    return task.chunk_iterator(
        blocks,
        chunks,
        common.max_tokens(cfg),
        cfg.dataset.batch_size,
        cfg.dataset.num_workers,
        cfg.dataset.data_buffer_size,
    )


def _dump(cfg, task, model, extractor, blocks, chunks, writer) -> None:
    """Write keys and values of *chunks*, a dict of numbers and block ranges."""
    device = next(model.parameters()).device
    samples = _samples(cfg, task, blocks, chunks.values())
    progress = common.with_progress(cfg, samples, prefix="dump")
    entries = 0
    # one chunk is copied from a GPU and written while the model is at the next one; on a CPU that
    # would only take a core from the model
    with ThreadPoolExecutor(1) as background:
        writing = None
        for number, sample in zip(chunks, progress):
            keys = _encode_keys(model, common.to_device(sample, device), extractor)
            if writing is not None:
                writing.result()
            if device.type == "cpu":
                _write(writer, number, keys, sample["target"])
            else:
                writing = background.submit(_write, writer, number, keys, sample["target"])
            entries += sample["ntokens"]
            progress.log({"entries": entries}, tag="dump", step=number)
        if writing is not None:
            writing.result()


def _encode_keys(model, sample, extractor):
    """The keys of a sample as they are stored."""
    return encode(model, sample, extractor, log_probs=False, key_type=torch.float16).keys


def _write(writer, number: int, keys, values) -> None:
    writer.write(
        number,
        keys.cpu().numpy(),
        values.cpu().numpy().astype(writer.value_dtype),
    )


def _finish(writer, factory: str, metric: str, num_shards: int) -> None:
    with writer.finishing() as missing:
        if missing:
            logger.info(
                f"this share is done, others are not ({missing}): the last of the {num_shards} "
                "shards to finish builds the index"
            )
        elif missing is not None:
            description = faiss_index.build_index(
                writer.keys(), factory, metric, writer.index_path, writer.work_path, logger.info
            )
            logger.info("looking for a temperature to start with")
            temperature = find_temperature(
                writer.index_path, metric, writer.keys(), writer.values(), DEFAULT_NPROBE
            )
            writer.finish(description, temperature=temperature)
            logger.info(f"datastore {writer.path} is complete: {writer.count:,} entries")
