"""A part of a sample."""

import numpy as np
import torch

from fairseq_knnlm.encoding.blocks import BlockDataset
from fairseq_knnlm.encoding.samples import ChunkCollater, only_rows


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
