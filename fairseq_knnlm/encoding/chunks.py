"""Chunks: runs of consecutive blocks, the unit in which keys are written and neighbours searched.

Which blocks a chunk has depends on the text alone, not on batches, workers or shards.
"""

from collections.abc import Sequence

import numpy as np

from ..arguments import check_arguments
from ..fields import whole

# Target tokens of a chunk that is searched: as many as possible, since a search reads all keys of
# the probed lists once for all of them.
SEARCH_TOKENS = 3 << 15
# The neighbours of a chunk fit in this many bytes.
NEIGHBORS_BYTES = 3 << 29
# Of a neighbour: two packed distances and ids, from which the nearest are taken.
_BYTES_PER_NEIGHBOR = 16


def tokens_of_search(k: int) -> int:
    """Target tokens of a chunk that is searched for *k* neighbours each."""
    return max(1, min(SEARCH_TOKENS, NEIGHBORS_BYTES // (_BYTES_PER_NEIGHBOR * k)))


def plan_chunks(sizes: np.ndarray, chunk_tokens: int) -> list[range]:
    """Cut the blocks into runs of about *chunk_tokens* target tokens, at least one block each.

    Args:
        sizes (ndarray): shape (M,), target tokens of each block.
        chunk_tokens (int): target tokens of a chunk, >= 1.

    Returns:
        list of range: block indices of each chunk, together every block once, in order.

    Raises:
        UserError: if *chunk_tokens* cannot be.
    """
    check_arguments("plan_chunks", chunk_tokens=(chunk_tokens, whole(1)))
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    chunks, start, tokens_before = [], 0, 0
    while start < len(ends):
        stop = int(np.searchsorted(ends, tokens_before + chunk_tokens, side="right"))
        stop = max(stop, start + 1)
        chunks.append(range(start, stop))
        tokens_before = int(ends[stop - 1])
        start = stop
    return chunks


def split_evenly(sizes: np.ndarray, count: int) -> list[range]:
    """Cut the blocks into *count* runs of about equally many target tokens, fewer of few blocks.

    Args:
        sizes (ndarray): shape (M,), target tokens of each block.
        count (int): how many runs, >= 1.

    Returns:
        list of range: block indices of each chunk, together every block once, in order.

    Raises:
        UserError: if *count* cannot be.
    """
    check_arguments("split_evenly", count=(count, whole(1)))
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, [total * number // count for number in range(1, count)]) + 1
    bounds = sorted({0, *cuts.clip(max=len(ends)).tolist(), len(ends)})
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:])]


def shard(chunks: Sequence[range], num_shards: int, shard_id: int) -> list[range]:
    """The contiguous share of the chunks that one of several processes takes.

    Args:
        chunks (sequence of range): all of them.
        num_shards (int): processes.
        shard_id (int): which of them, from 0.

    Raises:
        UserError: if there is no such share.
    """
    check_arguments("shard", num_shards=(num_shards, whole(1)))
    check_arguments("shard", shard_id=(shard_id, whole(0, num_shards - 1)))
    bounds = np.linspace(0, len(chunks), num_shards + 1).round().astype(int)
    return list(chunks[bounds[shard_id] : bounds[shard_id + 1]])


def share_of_text(
    sizes: np.ndarray, chunk_tokens: int, num_shards: int, shard_id: int
) -> list[range]:
    """The chunks that one of several processes scores.

    The text is cut evenly, so that every process has a share of a short text, and none has a small
    rest.

    Args:
        sizes (ndarray): shape (M,), target tokens of each block.
        chunk_tokens (int): target tokens of a chunk, about, at most.
        num_shards (int): processes.
        shard_id (int): which of them, from 0.

    Returns:
        list of range: block indices of each chunk, in order.

    Raises:
        UserError: if there is no such share.
    """
    per_shard = max(1, -(-int(sizes.sum()) // (num_shards * chunk_tokens)))
    return shard(split_evenly(sizes, num_shards * per_shard), num_shards, shard_id)


def blocks_before(sizes: np.ndarray, first: int, tokens: int) -> range:
    """The blocks before block *first* that hold the last *tokens* target tokens before it.

    Args:
        sizes (ndarray): shape (M,), target tokens of each block.
        first (int): index of a block.
        tokens (int): how many are looked back on.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    before = int(ends[first - 1]) if first else 0
    return range(int(np.searchsorted(ends, before - tokens, side="right")), first)
