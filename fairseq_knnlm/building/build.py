"""Building a datastore: the dump, one pass of the model over a text, and then the index.

Khandelwal et al. (2020), section 2: for every token of the text a key, the state of the model that
predicts it, and a value, the token. A build that was interrupted goes on where it stopped, and
several processes may each dump a share; ``datastore.DatastoreWriter`` sees to both.
"""

import logging
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Optional

import numpy as np
import torch

from ..arguments import check_arguments
from ..datastore.fingerprint import dictionary_fingerprint, weights_fingerprint
from ..datastore.writer import DatastoreWriter, value_dtype
from ..encoding.blocks import BlockDataset
from ..encoding.chunks import plan_chunks, shard
from ..encoding.encode import encode
from ..encoding.key_extractor import KeyExtractor, extractor_of, resolve_layer
from ..encoding.samples import to_device
from ..fields import one_of
from ..options import DEFAULT_KEY, DEFAULT_NPROBE, METRICS
from ..search.faiss_import import faiss_version
from ..search.index_build import build_index
from ..search.index_cost import estimate_cost
from ..search.index_factory import default_index_factory, refuse_unbuildable
from ..tuning.temperature import find_temperature
from ..version import __version__

logger = logging.getLogger("fairseq_knnlm.build")

# Tokens between two journal entries: what a killed dump loses at most.
JOURNAL_TOKENS = 1 << 14


def key_of(model, key: str = DEFAULT_KEY, layer: int = -1) -> dict:
    """Which state of a model the keys are, as the manifest says it.

    Args:
        model: a fairseq decoder-only language model.
        key (str): one of ``encoding.KEY_TYPES``.
        layer (int): decoder layer, negative from the top.

    Returns:
        dict: ``type``, ``layer`` (from 0) and ``layers``.

    Raises:
        UserError: if the model has no such layer.
    """
    layers = len(model.decoder.layers)
    return {"type": key, "layer": resolve_layer(model.decoder, layer), "layers": layers}


def manifest_settings(
    model,
    dictionary,
    key: dict,
    metric: str,
    data: dict,
    context: dict,
    versions: dict,
    model_sha256: Optional[str] = None,
) -> dict:
    """Everything that decides what is written, for the manifest.

    Args:
        model: a fairseq decoder-only language model.
        dictionary: fairseq's, of the text.
        key (dict): from ``key_of``.
        metric (str): ``l2`` or ``ip``.
        data (dict): ``split`` and ``sha256`` of the text.
        context (dict): how the text is cut into blocks and fed: ``tokens_per_sample``,
            ``context_window``, ``sample_break_mode`` and what else decides the numbers.
        versions (dict): of what is known only to the caller, fairseq's say.
        model_sha256 (str): of the weights as they were loaded, see
            ``datastore.weights_fingerprint``; None: those of *model*, which is as it was loaded.

    Returns:
        dict: JSON.

    Raises:
        UserError: if there is no such metric.
    """
    check_arguments("manifest_settings", metric=(metric, one_of(METRICS)))
    return {
        "key": key,
        "metric": metric,
        "model": {
            "sha256": model_sha256 or weights_fingerprint(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "dictionary": {"sha256": dictionary_fingerprint(dictionary), "types": len(dictionary)},
        "data": data,
        "context": context,
        "versions": {
            "fairseq_knnlm": __version__,
            "torch": torch.__version__,
            "faiss": faiss_version(),
            "numpy": np.__version__,
            "python": platform.python_version(),
            **versions,
        },
    }


def build_datastore(
    path: str,
    model,
    blocks: BlockDataset,
    samples_of: Callable,
    settings: dict,
    index_factory: Optional[str] = None,
    num_shards: int = 1,
    shard_id: int = 0,
    overwrite: bool = False,
) -> bool:
    """Build a datastore, or the share of it that falls to this process.

    Args:
        path (str): directory of the datastore.
        model: a fairseq decoder-only language model in evaluation mode.
        blocks (BlockDataset): the text.
        samples_of (callable): takes the chunks that are to be dumped, a dict of their numbers
            and ranges of blocks; gives their samples, in that order.
        settings (dict): from ``manifest_settings``.
        index_factory (str): FAISS factory string; None: chosen from the size.
        num_shards, shard_id (int): how many processes build it, and which this is, from 0.
        overwrite (bool): replace the datastore that is there.

    Returns:
        bool: whether the datastore is complete; not, while other shares are missing.

    Raises:
        UserError: if the datastore cannot be written, or is that of other settings, or FAISS cannot
            build the index. What was written before stays, and the same call goes on from there.
    """
    chunks = plan_chunks(blocks.sizes, JOURNAL_TOKENS)
    sizes = [int(blocks.sizes[chunk.start : chunk.stop].sum()) for chunk in chunks]
    with extractor_of(model, settings["key"]) as extractor:
        dimension, metric = extractor.dimension, settings["metric"]
        index_factory, index_bytes = _planned_index(index_factory, sum(sizes), dimension, metric)
        with DatastoreWriter(
            path,
            {**settings, "index": {"factory": index_factory}},
            sizes,
            dimension,
            value_dtype(settings["dictionary"]["types"]),
            num_shards=num_shards,
            shard_id=shard_id,
            overwrite=overwrite,
            index_bytes=index_bytes,
        ) as writer:
            mine = shard(range(len(chunks)), num_shards, shard_id)
            share = {number: chunks[number] for number in mine}
            dump(model, _samples_to_do(share, samples_of, writer), extractor, writer)
            missing = finish(writer, index_factory, metric)
    if missing:
        logger.info(
            f"this share is done, others are not ({missing}): the last of the {num_shards} "
            "shards to finish builds the index"
        )
    return not missing


def _planned_index(
    index_factory: Optional[str], count: int, dimension: int, metric: str
) -> tuple[str, int]:
    """The factory string of an index that can be built, and the most it takes of the disk."""
    index_factory = index_factory or default_index_factory(count, dimension)
    refuse_unbuildable(index_factory, count, dimension, metric)
    cost = estimate_cost(index_factory, count, dimension, metric)
    return index_factory, cost.file + cost.parts


def _samples_to_do(
    share: dict, samples_of: Callable, writer: DatastoreWriter
) -> Iterator[tuple[int, dict]]:
    """The chunks of a share that are not written yet: their numbers, each with its sample.

    Args:
        share (dict): numbers and ranges of blocks of all chunks of the share.
        samples_of (callable): see ``build_datastore``.
        writer (DatastoreWriter): an entered writer.
    """
    todo = sorted(set(share) - set(writer.done))
    if len(todo) < len(share):
        logger.info(f"going on after {len(share) - len(todo)} of {len(share)} chunks")
    samples = samples_of({number: share[number] for number in todo})
    # Samples stand first in zip, which asks them until their end: their workers end then.
    return ((number, sample) for sample, number in zip(samples, todo))


def dump(
    model,
    samples: Iterable[tuple[int, dict]],
    extractor: KeyExtractor,
    writer: DatastoreWriter,
) -> None:
    """Write keys and values of some chunks.

    Args:
        model: a fairseq decoder-only language model in evaluation mode.
        samples (iterable): numbers of chunks, and of each the sample from
            ``encoding.ChunkCollater``.
        extractor (KeyExtractor): an entered extractor on this model.
        writer (DatastoreWriter): an entered writer.

    Raises:
        UserError: if a key is not finite in float16, or the disk is full.
    """
    device = next(model.parameters()).device
    # One chunk is copied from a GPU and written while the model is at the next one. On a CPU a
    # thread would only take a core from the model.
    with ThreadPoolExecutor(1) as background:
        writing = None
        for number, sample in samples:
            keys = encode_keys(model, to_device(sample, device), extractor)
            if writing is not None:
                writing.result()
            if device.type == "cpu":
                _write(writer, number, keys, sample["target"])
            else:
                writing = background.submit(_write, writer, number, keys, sample["target"])
        if writing is not None:
            writing.result()


def encode_keys(model, sample: dict, extractor: KeyExtractor) -> torch.Tensor:
    """The keys of a sample as they are stored.

    Args:
        model: a fairseq decoder-only language model in evaluation mode.
        sample (dict): from ``encoding.ChunkCollater``, on the model's device.
        extractor (KeyExtractor): an entered extractor on this model.

    Returns:
        Tensor: shape (N, D), float16, on the model's device.
    """
    return encode(model, sample, extractor, log_probs=False, key_dtype=torch.float16).keys


def _write(writer, number: int, keys, values) -> None:
    writer.write(number, keys.cpu().numpy(), values.cpu().numpy().astype(writer.value_dtype))


def finish(
    writer: DatastoreWriter, index_factory: str, metric: str, nprobe: int = DEFAULT_NPROBE
) -> str:
    """Build the index and write the manifest, once all chunks are written.

    Args:
        writer (DatastoreWriter): an entered writer, whose own share is written.
        index_factory (str): FAISS factory string.
        metric (str): ``l2`` or ``ip``.
        nprobe (int): inverted lists visited where a temperature to start with is looked for.

    Returns:
        str: what other shares have not done yet; empty where the datastore is complete.

    Raises:
        UserError: if FAISS cannot build the index, or the disk is full. The keys stay.
    """
    check_arguments("finish", metric=(metric, one_of(METRICS)))
    with writer.finishing() as missing:
        if missing is None:  # another process has finished it
            return ""
        if not missing:
            keys, index_path = writer.keys(), writer.index_path
            description = build_index(
                keys,
                index_factory,
                metric,
                index_path,
                writer.work_path,
                logger.info,
                writer.key_checks(),
            )
            logger.info("looking for a temperature to start with")
            temperature = find_temperature(keys, writer.values(), metric, index_path, nprobe)
            writer.finish(description, temperature=temperature)
            logger.info(f"datastore {writer.path} is complete: {writer.count:,} entries")
        return missing
