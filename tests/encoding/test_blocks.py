"""Blocks and their left context, against fairseq's own windows and against the text itself."""

import numpy as np
import pytest
import torch
from fairseq.data import LMContextWindowDataset
from helpers.blocks import (
    EOS,
    PAD,
    SENTENCES,
    TOKENS_PER_SAMPLE,
    make_blocks,
    make_corpus,
    make_dataset,
)
from helpers.small import make_dictionary

from fairseq_knnlm.encoding.blocks import BlockDataset, document_starts, refuse_oversized
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin.config import KNNLMConfig
from fairseq_knnlm.plugin.task import KNNLMTask


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
    flags = KNNLMConfig(tokens_per_sample=TOKENS_PER_SAMPLE, sample_break_mode="complete_doc")
    task = KNNLMTask(flags, make_dictionary(sum(SENTENCES) + 10))
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


def test_the_extra_bos_needs_a_position_where_positions_are_learned():
    blocks = make_blocks("none", 0, bos=True)
    longest = blocks.lengths.max()
    refuse_oversized(blocks, longest, max_tokens=1000, positions=longest)
    with pytest.raises(UserError, match=f"learned {longest - 1} positions: pass --tokens-per-sa"):
        refuse_oversized(blocks, longest, max_tokens=1000, positions=longest - 1)


def test_the_first_block_begins_a_document_and_the_callers_array_is_left_alone():
    dataset = make_dataset("none")
    unknown = BlockDataset(dataset, dataset.sizes, PAD, 3)  # no limit of length
    assert [unknown[index].starts_document for index in range(3)] == [True, False, False]
    starts = np.zeros(len(dataset), dtype=bool)
    starts[2] = True
    for given in (starts, starts.tolist()):
        blocks = BlockDataset(dataset, dataset.sizes, PAD, 500, document_starts=given)
        flags = [blocks[index].starts_document for index in range(4)]
        assert flags == [True, False, True, False]
        assert blocks[1].source.tolist()[0] == EOS and len(blocks[1].source) == blocks.lengths[1]
    assert starts.sum() == 1
    assert blocks.pad == PAD


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no block"):
        refuse_oversized(BlockDataset([], np.array([]), PAD), 10, 10)


def test_documents_begin_after_empty_lines():
    text = [5, 6, EOS, EOS, 7, EOS, 8, EOS, EOS, EOS, 9, EOS, EOS]
    assert document_starts(text, EOS).tolist() == [0, 4, 10]
    assert document_starts([EOS, 5, EOS], EOS).tolist() == [0, 1]
    assert document_starts([5, 6, 7], EOS).tolist() == [0]
