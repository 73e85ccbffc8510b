"""The order of segments from which batches are cut where a model is trained with memory.

fairseq cuts batches from the order that a dataset gives, and shuffles whole batches: what stands
together in the order stays together, and in order.
"""

import functools
from typing import Callable

import numpy as np
import torch.distributed as dist
from fairseq.data import BaseWrapperDataset

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
