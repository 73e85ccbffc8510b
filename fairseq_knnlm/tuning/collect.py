"""One pass of model and search over a text: what all settings are then tuned with."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Callable, Optional

import numpy as np
import torch

from ..encoding.blocks import document_starts
from ..encoding.contexts import latest_tokens
from ..encoding.encode import encode, refuse_not_finite
from ..encoding.key_extractor import extractor_of
from ..encoding.samples import to_device
from ..errors import UserError
from ..gating.ngram_counts import ORDERS
from .tuning_data import TuningData, parts_of

if TYPE_CHECKING:  # A cache alone is tuned without FAISS.
    from ..search.retriever import Retriever


def collect(
    model,
    samples: Iterable[dict],
    count: int,
    eos: int,
    retriever: Optional["Retriever"] = None,
    key: Optional[dict] = None,
    keep_queries: bool = False,
    softmax_batch: int = 0,
    on_progress: Optional[Callable] = None,
    keep_for_gate: bool = False,
) -> TuningData:
    """Score a text with a language model, and find the neighbours of all its tokens.

    Args:
        model: a fairseq decoder-only language model in evaluation mode.
        samples (iterable of dict): the text, in order, from ``encoding.make_samples``. Where its
            blocks keep to documents (see ``BlockDataset``), documents begin with them.
        count (int): targets of all samples together.
        eos (int): id of the end of a line. A document begins after an empty line.
        retriever (Retriever): searches the datastore; None: no neighbours.
        key (dict): ``type`` and ``layer`` of the states that are kept; None: the retriever's.
        keep_queries (bool): keep the hidden states, for a continuous cache.
        softmax_batch (int): most tokens of one softmax; 0: as many as memory allows.
        on_progress (callable): called after each sample with the number of targets done so far.
        keep_for_gate (bool): keep what a gate is fitted to: hidden states, values of neighbours,
            how sure the model is, and contexts; needs a retriever.

    Returns:
        TuningData: on the CPU.

    Raises:
        UserError: if states are to be kept and it is not said which, *samples* have more or fewer
            targets than *count*, or the model gives what is not finite.
    """
    if key is None and retriever is not None:
        key = retriever.key
    keep_queries |= keep_for_gate
    if keep_for_gate and retriever is None:
        raise UserError("collect: keep_for_gate needs a retriever")
    if key is None and keep_queries:
        raise UserError("collect: keep_queries needs a retriever, or a key that says which states")
    extractor = None
    if retriever is not None or keep_queries:
        extractor = extractor_of(model, key)
    dimension = extractor.dimension if keep_queries else None
    data = _empty(count, retriever, dimension, keep_for_gate)
    starts, seconds = [], np.zeros(2)
    with extractor or contextlib.nullcontext():
        for rows, sample in _with_rows(samples, count):
            seconds += _fill(data, rows, model, sample, extractor, retriever, softmax_batch)
            starts += [rows.start + row for row in sample["document_starts"]]
            if on_progress is not None:
                on_progress(rows.stop)
    starts = np.union1d(document_starts(data.targets.numpy(), eos), starts)
    # How long it took is another at each time: only the speeds of a gate are worth that.
    return data._replace(
        document_starts=starts.astype(np.int64), seconds=seconds if keep_for_gate else None
    )


def _with_rows(samples: Iterable[dict], count: int) -> Iterator[tuple[slice, dict]]:
    """The rows of each sample's targets, and the sample.

    Raises:
        UserError: if there are more or fewer targets than *count*.
    """
    done = 0
    for sample in samples:
        rows = slice(done, done + len(sample["target"]))
        if rows.stop > count:
            raise UserError(f"collect: the samples have more targets than count, {count}")
        yield rows, sample
        done = rows.stop
    if done < count:
        raise UserError(f"collect: the samples have {done} targets, count is {count}")


def _empty(count: int, retriever, dimension: Optional[int], for_gate: bool) -> TuningData:
    """Memory for everything; *dimension* of the states, None where they are not kept."""
    k = 0 if retriever is None else retriever.k
    more = {}
    if for_gate:
        more = {
            "values": torch.empty(count, k, dtype=torch.int32),
            "confidence": torch.empty(count, 2),
            "contexts": torch.empty(count, ORDERS, dtype=torch.int32),
        }
    return TuningData(
        log_p_lm=torch.empty(count),
        distances=torch.empty(count, k),
        matches=torch.empty(count, k, dtype=torch.bool),
        targets=torch.empty(count, dtype=torch.long),
        parts=torch.empty(count, k, dtype=torch.uint8),
        queries=None if dimension is None else torch.empty(count, dimension),
        **more,
    )


def _fill(
    data: TuningData, rows: slice, model, sample: dict, extractor, retriever, softmax_batch: int
) -> list[float]:
    """Run model and search over a sample, keep what they give in *rows*; how long each took."""
    started = time.monotonic()
    device = next(model.parameters()).device
    for_gate = data.contexts is not None
    encoded = encode(
        model,
        to_device(sample, device),
        extractor,
        softmax_batch=softmax_batch,
        confidence=for_gate,
    )
    refuse_not_finite(encoded)
    data.targets[rows] = sample["target"].cpu()
    data.log_p_lm[rows] = encoded.log_p_lm.cpu()
    if data.queries is not None:
        data.queries[rows] = encoded.keys.cpu().float()
    if for_gate:
        data.confidence[rows] = encoded.confidence.cpu()
        data.contexts[rows] = latest_tokens(sample, ORDERS).cpu().int()
    searching = time.monotonic()
    if retriever is None:
        return [searching - started, 0.0]
    for batch, neighbors in retriever.batches(encoded.keys):
        into = slice(rows.start + batch.start, rows.start + batch.stop)
        distances, values, ids = (part.cpu() for part in neighbors)
        data.distances[into] = distances
        # A missing neighbour has a value as well.
        data.matches[into] = (values == data.targets[into].unsqueeze(1)) & (ids >= 0)
        data.parts[into] = parts_of(ids)
        if for_gate:
            data.values[into] = values.int()
    return [searching - started, time.monotonic() - searching]
