"""``fairseq-knnlm-build``: one pass over the training text, then the index."""

import logging
import os
import platform
from concurrent.futures import ThreadPoolExecutor

import fairseq
import numpy as np
import torch

from .. import index as faiss_index
from ..config import DEFAULT_KEY, DEFAULT_METRIC, DEFAULT_NPROBE
from ..context import plan_chunks, refuse_oversized, shard
from ..datastore_writer import DatastoreWriter, refuse_finished, value_dtype
from ..errors import UserError
from ..fingerprint import dictionary_fingerprint, file_fingerprint, weights_fingerprint
from ..key_extractor import KeyExtractor, resolve_layer
from ..scorer import encode
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
    return parser


def main(argv=None):
    """Entry point of ``fairseq-knnlm-build``."""
    common.run(make_parser(), build, argv)


def build(cfg, args):
    """Build a datastore, or the share of it that falls to this process."""
    directory = _output_directory(cfg)
    cfg.task.knn_datastore = None  # it is written here, not searched
    num_shards, shard_id = _shard_of(cfg)
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
        factory = cfg.task.knn_index or faiss_index.default_factory(sum(sizes), extractor.dimension)
        faiss_index.refuse_unbuildable(factory, sum(sizes), extractor.dimension, settings["metric"])
        with DatastoreWriter(
            directory,
            {**settings, "index": {"factory": factory}},
            sizes,
            extractor.dimension,
            value_dtype(len(task.target_dictionary)),
            num_shards=num_shards,
            shard_id=shard_id,
            overwrite=args.overwrite,
            index_bytes=faiss_index.estimate_bytes(
                factory, sum(sizes), extractor.dimension, settings["metric"]
            ),
        ) as writer:
            mine = shard(range(len(chunks)), num_shards, shard_id)
            todo = sorted(set(mine) - set(writer.done))
            if len(todo) < len(mine):
                logger.info(f"going on after {len(mine) - len(todo)} of {len(mine)} chunks")
            _dump(cfg, task, model, extractor, blocks, {i: chunks[i] for i in todo}, writer)
            _finish(writer, factory, settings["metric"], num_shards)


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


def _settings(cfg, task, model) -> dict:
    """Everything that decides what is written, for the manifest."""
    layer = -1 if cfg.task.knn_key_layer is None else cfg.task.knn_key_layer
    split = cfg.dataset.gen_subset
    return {
        "key": {
            "type": str(cfg.task.knn_key or DEFAULT_KEY),
            "layer": resolve_layer(model.decoder, layer),
            "layers": len(model.decoder.layers),
        },
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


def _dump(cfg, task, model, extractor, blocks, chunks, writer) -> None:
    """Write keys and values of *chunks*, a dict of numbers and block ranges."""
    device = next(model.parameters()).device
    samples = task.chunk_iterator(
        blocks,
        chunks.values(),
        common.max_tokens(cfg),
        cfg.dataset.batch_size,
        cfg.dataset.num_workers,
        cfg.dataset.data_buffer_size,
    )
    progress = common.with_progress(cfg, samples, prefix="dump")
    entries = 0
    # one chunk is copied from the device and written while the model is at the next one
    with ThreadPoolExecutor(1) as background:
        writing = None
        for number, sample in zip(chunks, progress):
            encoded = encode(model, common.to_device(sample, device), extractor, log_probs=False)
            if writing is not None:
                writing.result()
            writing = background.submit(_write, writer, number, encoded.keys, sample["target"])
            entries += sample["ntokens"]
            progress.log({"entries": entries}, tag="dump", step=number)
        if writing is not None:
            writing.result()


def _write(writer, number: int, keys, values) -> None:
    writer.write(
        number,
        keys.to("cpu", torch.float16).numpy(),
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
