"""Chunks and shards: every block once, in order."""

import numpy as np
import pytest

from fairseq_knnlm.encoding.chunks import plan_chunks, shard


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


@pytest.mark.parametrize("count", [1, 2, 5, 64])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 64, 100])
def test_shards_cover_every_chunk_once_in_order(count, num_shards):
    chunks = [range(i, i + 1) for i in range(count)]
    shares = [shard(chunks, num_shards, shard_id) for shard_id in range(num_shards)]
    assert [chunk for share in shares for chunk in share] == chunks
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
