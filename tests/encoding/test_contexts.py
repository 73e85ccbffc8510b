"""The last tokens before each target."""

import torch

from fairseq_knnlm.encoding import Block, ChunkCollater, only_rows
from fairseq_knnlm.encoding.contexts import latest_tokens


def make_sample():
    """Two blocks in batches of one, the first of them with left context."""
    blocks = [
        Block(0, torch.tensor([2, 11, 12, 13, 14]), torch.tensor([13, 14, 15])),
        Block(1, torch.tensor([15, 16, 17, 18, 19, 20]), torch.tensor([16, 17, 18, 19, 20, 21])),
    ]
    return ChunkCollater(pad=1, max_tokens=6)(blocks)


EXPECTED = [
    [12, 11, 2],
    [13, 12, 11],
    [14, 13, 12],
    [15, -1, -1],
    [16, 15, -1],
    [17, 16, 15],
    [18, 17, 16],
    [19, 18, 17],
    [20, 19, 18],
]


def test_they_reach_into_the_left_context_but_not_into_another_block():
    assert latest_tokens(make_sample(), 3).tolist() == EXPECTED
    assert latest_tokens(make_sample(), 1).tolist() == [row[:1] for row in EXPECTED]


def test_of_some_rows():
    assert latest_tokens(only_rows(make_sample(), 2, 5), 3).tolist() == EXPECTED[2:5]


def test_padding_is_never_seen():
    blocks = [
        Block(0, torch.tensor([5, 6]), torch.tensor([6, 7])),
        Block(1, torch.tensor([5]), torch.tensor([6])),
    ]
    sample = ChunkCollater(pad=1, max_tokens=8)(blocks)
    assert latest_tokens(sample, 2).tolist() == [[5, -1], [6, 5], [5, -1]]
