"""Chunks and shards: every block once, in order."""

import numpy as np
import pytest

from fairseq_knnlm.encoding.chunks import (
    NEIGHBORS_BYTES,
    SEARCH_TOKENS,
    blocks_before,
    plan_chunks,
    shard,
    share_of_text,
    split_evenly,
    tokens_of_search,
)
from fairseq_knnlm.errors import UserError


@pytest.mark.parametrize("chunk_tokens", [1, 10, 64, 10**6])
def test_chunks_cover_every_block_once_in_order(chunk_tokens):
    sizes = np.random.default_rng(1).integers(1, 30, size=100)
    chunks = plan_chunks(sizes, chunk_tokens)
    assert [block for chunk in chunks for block in chunk] == list(range(100))
    for chunk in chunks:
        assert len(chunk) == 1 or sizes[chunk].sum() <= chunk_tokens
        assert chunk.stop == 100 or sizes[chunk].sum() + sizes[chunk.stop] > chunk_tokens


def test_chunks_by_hand():
    assert plan_chunks([5, 5, 1, 9, 10], 10) == [range(0, 2), range(2, 4), range(4, 5)]


def test_no_blocks_no_chunks():
    assert plan_chunks(np.array([]), 10) == []


@pytest.mark.parametrize("chunk_tokens, num_shards", [(10**6, 1), (10**6, 7), (100, 3), (64, 8)])
def test_every_process_has_an_even_share_of_a_text(chunk_tokens, num_shards):
    sizes = np.random.default_rng(2).integers(1, 30, size=100)
    shares = [share_of_text(sizes, chunk_tokens, num_shards, i) for i in range(num_shards)]
    chunks = [chunk for share in shares for chunk in share]
    assert [block for chunk in chunks for block in chunk] == list(range(100))
    assert len({len(share) for share in shares}) == 1
    # A cut is at the end of a block, so a chunk is off by less than the largest.
    assert all(abs(sizes[chunk].sum() - sizes.sum() / len(chunks)) < 30 for chunk in chunks)
    assert max(sizes[chunk].sum() for chunk in chunks) < chunk_tokens + 30


@pytest.mark.parametrize("count", [1, 2, 5, 64])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 64, 100])
def test_shards_cover_every_chunk_once_in_order(count, num_shards):
    chunks = [range(i, i + 1) for i in range(count)]
    shares = [shard(chunks, num_shards, shard_id) for shard_id in range(num_shards)]
    assert [chunk for share in shares for chunk in share] == chunks
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("k", [1, 8, 1024, 4096, 10**6, 10**12])
def test_the_neighbours_of_a_chunk_have_room(k):
    """Two packed distances and ids of 8 bytes each; more of them would fit no longer."""
    tokens = tokens_of_search(k)
    assert isinstance(tokens, int) and 1 <= tokens <= SEARCH_TOKENS
    assert tokens == 1 or 16 * k * tokens <= NEIGHBORS_BYTES
    assert tokens == SEARCH_TOKENS or 16 * k * (tokens + 1) > NEIGHBORS_BYTES
    assert SEARCH_TOKENS == 98304 and NEIGHBORS_BYTES == 1.5 * 2**30


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 100])
def test_an_even_split_covers_every_block_once_in_order(count):
    sizes = np.random.default_rng(count).integers(1, 30, size=60)
    chunks = split_evenly(sizes, count)
    assert [block for chunk in chunks for block in chunk] == list(range(60))
    assert all(map(len, chunks)) and len(chunks) <= count
    # Each cut is at the end of the block that holds it, so a run is off by less than a block.
    fair = sizes.sum() / count
    assert max(abs(sizes[chunk].sum() - fair) for chunk in chunks) < 30
    assert len(chunks) == count or fair < 30


def test_an_even_split_by_hand():
    assert split_evenly([4, 4, 4, 4], 2) == [range(0, 2), range(2, 4)]
    assert split_evenly([5, 5, 1, 1], 2) == [range(0, 2), range(2, 4)]
    assert split_evenly([10, 1, 1], 3) == [range(0, 1), range(1, 3)]
    assert split_evenly([3], 4) == [range(0, 1)]
    assert split_evenly([], 3) == []


@pytest.mark.parametrize("tokens", [0, 1, 5, 29, 30, 200, 10**6])
def test_the_blocks_that_are_looked_back_on(tokens):
    sizes = np.random.default_rng(tokens).integers(1, 30, size=20)
    for first in range(21):
        before = blocks_before(sizes, first, tokens)
        assert before.stop == first and before.start >= 0
        # enough of them, and none that could be left out
        assert sizes[before].sum() >= min(tokens, sizes[:first].sum())
        assert not before or sizes[before[1:]].sum() < tokens


def test_uneven_shares_are_rounded():
    chunks = [range(i, i + 1) for i in range(5)]
    assert [len(shard(chunks, 3, shard_id)) for shard_id in range(3)] == [2, 1, 2]


def test_a_share_of_a_short_text_is_one_chunk():
    sizes = np.array([3, 4, 5])
    assert share_of_text(sizes, 100, 1, 0) == [range(3)]
    assert share_of_text(sizes[:0], 100, 2, 1) == []


@pytest.mark.parametrize("shard_id", [-1, 3, 4])
def test_a_share_that_is_not_there_is_refused(shard_id):
    with pytest.raises(UserError, match=r"^shard: shard_id must be a whole number .* <= 2"):
        shard([range(3), range(3, 5)], 3, shard_id)
