"""Chunks and shards: every block once, in order."""

import numpy as np
import pytest

from fairseq_knnlm.encoding.chunks import plan_chunks, shard, share_of_text


@pytest.mark.parametrize("chunk_tokens", [1, 10, 64, 10**6])
def test_chunks_cover_every_block_once_in_order(chunk_tokens):
    sizes = np.random.default_rng(1).integers(1, 30, size=100)
    chunks = plan_chunks(sizes, chunk_tokens)
    assert [block for chunk in chunks for block in chunk] == list(range(100))
    for chunk in chunks:
        assert len(chunk) == 1 or sizes[chunk].sum() <= chunk_tokens
        assert chunk.stop == 100 or sizes[chunk].sum() + sizes[chunk.stop] > chunk_tokens


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
