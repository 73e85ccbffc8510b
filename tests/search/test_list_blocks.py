"""Blocks hold what they are cut from, fit in the memory made for them, and find every near pair."""

import numpy as np
import pytest
import torch

from fairseq_knnlm.search.float_products import columns
from fairseq_knnlm.search.list_blocks import (
    Block,
    Groups,
    Workspace,
    first_elements,
    keys_of_block,
    padded,
    queries_of_block,
)
from fairseq_knnlm.search.product_type import TYPES, products_of


def test_matrices_have_few_heights_and_little_that_is_empty():
    counts = range(1, 9000)
    heights = [padded(count) for count in counts]
    assert heights == sorted(heights)
    assert all(count <= height < count + 64 + count / 4 for count, height in zip(counts, heights))
    assert all(height % 64 == 0 for height in heights)
    assert len(set(heights)) < 40


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dimension", [1, 24, 500, 1024, 5000, 70_000])
def test_a_block_fits_in_its_memory(dimension, name):
    count = keys_of_block(columns(dimension))
    scratch = products_of(name, "l2", dimension).scratch(count)
    if name == "int8":
        width = scratch.right.integers.size(1)
        assert len(scratch.right.terms) == len(scratch.right.factors) == count
        assert len(scratch.right.integers) == count and width >= dimension
    else:
        assert scratch.right.shape == (count, columns(dimension)) and not scratch.right.any()
        width = columns(dimension)
    for keys in {1, 64, min(100, count), count}:
        assert padded(keys) <= count
        for queries in (1, 70, 10**6):
            rows = queries_of_block(max(columns(dimension), padded(keys)), queries)
            assert 0 < rows <= queries
            matrices = {"left": width, "products": padded(keys)}
            if name == "int8":
                matrices.update(vectors=dimension)
            for matrix, size in matrices.items():
                found = first_elements(getattr(scratch, matrix), padded(rows), size)
                assert found.shape == (padded(rows), size) and found.is_contiguous()


def test_memory_is_used_again_and_grows():
    workspace = Workspace()
    large = workspace.array((50, 7), np.float32)
    assert large.shape == (50, 7) and large.dtype == np.float32
    small = workspace.array((3, 5), np.uint64)
    assert small.shape == (3, 5) and small.dtype == np.uint64
    assert small.ctypes.data == large.ctypes.data
    larger = workspace.array((1000, 7), np.uint64)
    assert larger.shape == (1000, 7) and not np.shares_memory(larger, large)
    assert workspace.array((0, 4), np.uint64).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_every_near_pair_is_named_once(dtype, share):
    rng = np.random.default_rng(3)
    near = rng.random((37, 128)) < share
    products = torch.from_numpy(np.where(near, -1.0, rng.integers(2, size=near.shape))).to(dtype)
    block = Block(0, np.arange(37), np.zeros(37, int), 0, np.arange(128), None, products)
    for found, expected in zip(block.near(), near.nonzero()):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("nlist", [9, (1 << 15) - 1, 1 << 15, 40_000, 70_000])
def test_the_queries_of_a_list_are_those_that_probe_it(nlist):
    rng = np.random.default_rng(2)
    choices = np.unique([0, *rng.integers(nlist, size=5), nlist - 1])
    probes = np.stack([rng.permutation(choices)[:4] for _ in range(200)])
    probes[rng.random(probes.shape) < 0.2] = -1
    groups = Groups(probes, nlist)
    assert groups.lists == sorted(set(probes[probes >= 0].tolist()))
    for number in range(0, nlist, max(1, nlist // 50)):
        rows, slots = groups.of(number)
        assert list(zip(rows, slots)) == list(zip(*(probes == number).nonzero()))
    for number in groups.lists:
        assert list(zip(*groups.of(number))) == list(zip(*(probes == number).nonzero()))


def test_no_query_probes_anything():
    assert Groups(np.full((4, 3), -1), 5).lists == []
    assert Groups(np.empty((0, 3), np.int64), 5).lists == []
