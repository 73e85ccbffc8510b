"""Blocks and their left context, against fairseq's own windows and against the text itself."""

import pickle

import numpy as np
import oracle
import pytest
import torch
from fairseq.data import LMContextWindowDataset, MonolingualDataset, TokenBlockDataset
from helpers import make_dictionary

from fairseq_knnlm.config import KNNLMConfig
from fairseq_knnlm.context import (
    Block,
    BlockDataset,
    ChunkCollater,
    document_starts,
    plan_batches,
    plan_chunks,
    refuse_oversized,
    shard,
)
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.task import KNNLMTask

PAD, EOS, BOS = 1, 2, 0
SENTENCES = [5, 3, 1, 1, 23, 2, 8, 1, 4, 4, 12, 7, 1, 3, 6, 1, 2, 9, 15, 2]  # 1: an empty line
TOKENS_PER_SAMPLE = 8


def make_corpus():
    """Sentences of tokens that each occur once, but for the end of sentence."""
    starts = 10 + np.cumsum([0] + SENTENCES[:-1])
    return [
        torch.tensor([*range(start, start + length - 1), EOS])
        for start, length in zip(starts, SENTENCES)
    ]


def make_dataset(break_mode, bos=False):
    """fairseq's blocks of the corpus, as its language modelling task makes them."""
    dictionary = make_dictionary(sum(SENTENCES) + 10)
    with oracle.numpy_compat():
        blocks = TokenBlockDataset(
            make_corpus(), np.array(SENTENCES), TOKENS_PER_SAMPLE, PAD, EOS, break_mode, True
        )
    return MonolingualDataset(
        blocks, blocks.sizes, dictionary, targets=["future"], add_bos_token=bos
    )


def make_blocks(break_mode, context_window, bos=False):
    dataset = make_dataset(break_mode, bos)
    max_length = TOKENS_PER_SAMPLE + context_window
    return BlockDataset(dataset, dataset.sizes, PAD, context_window, max_length, bos=bos)


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("context_window", [1, 3, 8, 9, 40, 500])
@pytest.mark.parametrize("break_mode", ["none", "complete", "eos"])
def test_equals_one_worker_of_fairseq(break_mode, context_window, bos):
    dataset = make_dataset(break_mode, bos)
    windows = LMContextWindowDataset(dataset, TOKENS_PER_SAMPLE, context_window, PAD)
    blocks = make_blocks(break_mode, context_window, bos)
    assert len(blocks) == len(windows) > 5
    for index in range(len(windows)):
        sample = windows.collater([windows[index]])
        source, target = sample["net_input"]["src_tokens"][0], sample["target"][0]
        scored = target[sample["start_indices"][0] + bos :]
        block = blocks[index]
        assert block.source.tolist() == source[source != PAD].tolist()
        assert block.target.tolist() == scored[scored != PAD].tolist()
        assert blocks.lengths[index] == len(block.source)


@pytest.mark.parametrize("context_window", [0, 1, 7, 30])
@pytest.mark.parametrize("break_mode", ["none", "complete", "eos"])
def test_source_is_the_text_before_each_target(break_mode, context_window):
    text = np.concatenate([[EOS], *(sentence.numpy() for sentence in make_corpus())])
    blocks, before = make_blocks(break_mode, context_window), 0
    for index in range(len(blocks)):
        target = blocks[index].target.numpy()
        room = max(TOKENS_PER_SAMPLE + context_window - len(target), 0)
        start = max(before - min(context_window, room), 0)
        after = before + len(target)
        assert target.tolist() == text[before + 1 : after + 1].tolist()
        assert blocks[index].source.tolist() == text[start:after].tolist()
        before = after
    assert before == sum(SENTENCES)


def test_blocks_are_fetched_in_any_order():
    blocks, again = make_blocks("none", 20), make_blocks("none", 20)
    for index in [7, 2, 7, 0, len(blocks) - 1]:
        assert torch.equal(again[index].source, blocks[index].source)


@pytest.mark.parametrize("context_window", [0, 3, 10, 100])
def test_documents_do_not_see_each_other(context_window):
    config = KNNLMConfig(tokens_per_sample=TOKENS_PER_SAMPLE, sample_break_mode="complete_doc")
    task = KNNLMTask(config, make_dictionary(sum(SENTENCES) + 10))
    blocks = task.blocks(make_dataset("complete_doc"), context_window)
    documents = [[EOS]]  # what is fed for each of them
    for sentence in make_corpus():
        if len(sentence) == 1:
            documents.append([EOS])
        else:
            documents[-1] += sentence.tolist()
    blocks_seen = iter(range(len(blocks)))
    for document in [document for document in documents if len(document) > 1]:
        before = 0
        while before < len(document) - 1:
            block = blocks[next(blocks_seen)]
            after = before + len(block.target)
            room = max(TOKENS_PER_SAMPLE + context_window - len(block.target), 0)
            start = max(before - min(context_window, room), 0)
            assert block.target.tolist() == document[before + 1 : after + 1]
            assert block.source.tolist() == document[start:after]
            before = after
    assert next(blocks_seen, None) is None


def test_oversized_blocks_are_refused_and_named():
    blocks = make_blocks("complete", 4)  # a sentence has 23 tokens
    refuse_oversized(blocks, max_positions=23, max_tokens=23)
    with pytest.raises(UserError, match="23 tokens .* the model takes 22.*--tokens-per-sample"):
        refuse_oversized(blocks, max_positions=22, max_tokens=23)
    with pytest.raises(UserError, match="23 tokens .* --max-tokens 22"):
        refuse_oversized(blocks, max_positions=23, max_tokens=22)


def test_left_context_counts_as_fed():
    with pytest.raises(UserError, match="12 tokens"):
        refuse_oversized(make_blocks("none", 4), max_positions=11, max_tokens=1000)


def test_the_extra_bos_is_fed_beyond_the_limit_as_in_training():
    longest = make_blocks("none", 0).lengths.max()
    refuse_oversized(make_blocks("none", 0, bos=True), max_positions=longest, max_tokens=1000)
    with pytest.raises(UserError, match="the model takes"):
        refuse_oversized(make_blocks("none", 0, bos=True), longest - 1, max_tokens=1000)


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no block"):
        refuse_oversized(BlockDataset([], np.array([]), PAD), 10, 10)


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


def test_documents_begin_after_empty_lines():
    text = [5, 6, EOS, EOS, 7, EOS, 8, EOS, EOS, EOS, 9, EOS, EOS]
    assert document_starts(text, EOS).tolist() == [0, 4, 10]
    assert document_starts([EOS, 5, EOS], EOS).tolist() == [0, 1]
    assert document_starts([5, 6, 7], EOS).tolist() == [0]
