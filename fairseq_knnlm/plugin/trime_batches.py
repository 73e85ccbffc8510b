"""The order of segments from which batches are cut where a model is trained with memory.

fairseq cuts batches from the order that a dataset gives, and shuffles whole batches: what stands
together in the order stays together, and in order.
"""

import functools
import math
from typing import Callable, Optional

import numpy as np
import torch.distributed as dist
from fairseq.data import BaseWrapperDataset

from ..errors import UserError
from .similar_segments import cached_similar_segments, order_of_similar


class OrderedDataset(BaseWrapperDataset):
    """A split of a text with an order of its own, in place of one by size.

    Args:
        dataset: fairseq's ``MonolingualDataset``.
        order (callable): gives the indices, shape (M,); it may draw from numpy's random numbers,
            which fairseq seeds for each epoch.
    """

    def __init__(self, dataset, order: Callable[[], np.ndarray]):
        super().__init__(dataset)
        self._order = order

    def ordered_indices(self) -> np.ndarray:
        """The order from which batches are cut."""
        return self._order()


def refuse_lonely(
    memory: str, sizes: np.ndarray, max_tokens: Optional[int], max_sentences: Optional[int]
) -> None:
    """Refuse batches of one segment, where the memory is the other segments of the batch.

    Args:
        memory (str): as ``--trime-memory``, for the message.
        sizes (ndarray): shape (M,), tokens of each segment.
        max_tokens, max_sentences (int): most tokens and segments of a batch; None: any number.

    Raises:
        UserError: naming the flags to change.
    """
    typical = int(np.median(sizes))
    by_tokens = math.inf if max_tokens is None else max_tokens // max(1, typical)
    if min(by_tokens, math.inf if max_sentences is None else max_sentences) < 2:
        raise UserError(
            f"--trime-memory {memory} looks at the other segments of a batch, and a batch holds "
            f"one of {typical} tokens: raise --max-tokens and --batch-size, or lower "
            "--tokens-per-sample"
        )


def in_text_order(dataset) -> OrderedDataset:
    """A split whose batches hold consecutive segments, in order."""
    return OrderedDataset(dataset, functools.partial(np.arange, len(dataset)))


def by_similarity(dataset, vocabulary_size: int, prefix: str) -> OrderedDataset:
    """A split whose batches hold segments that share words; others in each epoch.

    Args:
        dataset: fairseq's ``MonolingualDataset``.
        vocabulary_size (int): above every token id.
        prefix (str): of the file that keeps what is similar.
    """
    segments = [dataset[index]["target"].numpy() for index in range(len(dataset))]
    # One process of several finds what the others read.
    several = dist.is_available() and dist.is_initialized()
    if several and dist.get_rank() > 0:
        dist.barrier()
    hits = cached_similar_segments(segments, vocabulary_size, prefix)
    if several and dist.get_rank() == 0:
        dist.barrier()
    return OrderedDataset(dataset, functools.partial(order_of_similar, hits))
