"""Samples: what the model is fed, and which positions are scored."""

import pickle

import numpy as np
import pytest
import torch
from helpers.blocks import (
    EOS,
    PAD,
    SENTENCES,
    make_blocks,
    make_corpus,
)

from fairseq_knnlm.encoding.blocks import Block, BlockDataset
from fairseq_knnlm.encoding.chunks import plan_chunks
from fairseq_knnlm.encoding.samples import ChunkCollater, only_rows, plan_batches


@pytest.mark.parametrize("max_sentences", [None, 1, 3])
@pytest.mark.parametrize("max_tokens", [40, 100, 10**6])
def test_batches_hold_what_is_allowed_and_every_block_once(max_tokens, max_sentences):
    lengths = np.random.default_rng(2).integers(1, 41, size=80)
    batches = plan_batches(lengths, max_tokens, max_sentences)
    assert sorted(position for batch in batches for position in batch) == list(range(80))
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= max_tokens
        assert len(batch) <= (max_sentences or 80)
    if max_tokens == 10**6:
        assert len(batches) == -(-80 // (max_sentences or 80))


def test_batches_of_equal_blocks_are_full():
    assert list(map(len, plan_batches([10] * 7, 30, None))) == [3, 3, 1]


def collate_all(break_mode="complete", context_window=5, max_tokens=60, max_sentences=None):
    blocks = make_blocks(break_mode, context_window)
    collater = ChunkCollater(PAD, max_tokens, max_sentences)
    return blocks, collater([blocks[index] for index in range(len(blocks))])


def test_scored_positions_are_followed_by_their_targets():
    blocks, sample = collate_all()
    followed = 0
    for batch in sample["batches"]:
        length = batch["src_tokens"].size(1)
        for position, row in zip(batch["positions"].tolist(), batch["rows"].tolist()):
            sentence, place = divmod(position, length)
            assert place < batch["src_lengths"][sentence]
            if place + 1 < batch["src_lengths"][sentence]:
                assert batch["src_tokens"][sentence, place + 1] == sample["target"][row]
                followed += 1
    assert followed == sum(SENTENCES) - len(blocks)


def test_every_target_is_scored_once_after_all_that_is_before_it():
    blocks, sample = collate_all(break_mode="none", context_window=5)
    assert sample["target"].tolist() == torch.cat(make_corpus()).tolist()
    assert sample["target_lengths"] == [
        len(block.target) for block in map(blocks.__getitem__, range(len(blocks)))
    ]
    rows = torch.cat([batch["rows"] for batch in sample["batches"]])
    assert sorted(rows.tolist()) == list(range(sum(SENTENCES)))
    text = [EOS] + sample["target"].tolist()
    for batch in sample["batches"]:
        fed = batch["src_tokens"].flatten()[batch["positions"]]
        assert fed.tolist() == [text[row] for row in batch["rows"].tolist()]


@pytest.mark.parametrize("max_tokens, max_sentences", [(40, None), (10**6, None), (200, 2)])
def test_batches_are_padded_on_the_right_and_count_the_context(max_tokens, max_sentences):
    _, sample = collate_all(max_tokens=max_tokens, max_sentences=max_sentences)
    for batch in sample["batches"]:
        tokens, lengths = batch["src_tokens"], batch["src_lengths"]
        assert tokens.numel() <= max_tokens
        assert len(tokens) <= (max_sentences or len(tokens))
        assert (tokens != PAD).sum(dim=1).tolist() == lengths.tolist()
        padding = torch.arange(tokens.size(1)) >= lengths[:, None]
        assert torch.equal(tokens == PAD, padding)


def test_a_sample_has_what_fairseq_eval_lm_reads():
    blocks, sample = collate_all()
    assert sample["id"].tolist() == list(range(len(blocks)))
    assert sample["ntokens"] == sum(SENTENCES)
    assert "net_input" in sample


def test_a_chunk_of_no_blocks_is_an_empty_sample():
    assert ChunkCollater(PAD, 10)([]) == {}


def assert_same_sample(left, right):
    assert torch.equal(left["target"], right["target"])
    assert len(left["batches"]) == len(right["batches"])
    for one, other in zip(left["batches"], right["batches"]):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_worker_processes_make_the_same_samples():
    blocks = make_blocks("complete", 5)
    loaders = [
        torch.utils.data.DataLoader(
            blocks,
            batch_sampler=[list(chunk) for chunk in plan_chunks(blocks.sizes, 20)],
            collate_fn=pickle.loads(pickle.dumps(ChunkCollater(PAD, 50, 3))),
            num_workers=num_workers,
        )
        for num_workers in (0, 2)
    ]
    samples = [list(loader) for loader in loaders]
    assert len(samples[0]) == len(samples[1]) > 2
    for one, other in zip(*samples):
        assert_same_sample(one, other)


def test_collater_of_one_block_without_context():
    sample = ChunkCollater(PAD, 10)([Block(3, torch.tensor([2, 7, 8]), torch.tensor([8, 9]))])
    (batch,) = sample["batches"]
    assert batch["positions"].tolist() == [1, 2]
    assert batch["rows"].tolist() == [0, 1]
    assert sample["id"].tolist() == [3]


def test_only_rows():
    items = [
        {"source": torch.arange(n) + 10 * n, "target": torch.arange(n) + 10 * n + 1}
        for n in (3, 5, 4)
    ]
    blocks = BlockDataset(items, np.array([3, 5, 4]), pad=1)
    sample = ChunkCollater(1, max_tokens=5)([blocks[i] for i in range(3)])
    part = only_rows(sample, 2, 5)
    assert part["target"].tolist() == sample["target"][2:5].tolist() == [33, 51, 52]
    assert part["target_lengths"] == [1, 2, 0] and part["ntokens"] == 3
    assert sorted(torch.cat([batch["rows"] for batch in part["batches"]]).tolist()) == [0, 1, 2]
    assert len(part["batches"]) == 2  # the block without any of these rows is not fed
    for batch in part["batches"]:
        inputs = batch["src_tokens"].flatten()[batch["positions"]]
        assert (inputs + 1).tolist() == part["target"][batch["rows"]].tolist()
