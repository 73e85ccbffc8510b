"""A small corpus in blocks, every token of it known."""

import numpy as np
import torch
from fairseq.data import MonolingualDataset, TokenBlockDataset

from fairseq_knnlm.encoding.blocks import BlockDataset
from helpers import oracle
from helpers.small import make_dictionary

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
