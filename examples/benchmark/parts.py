"""Data directories that hold the beginning of a split of another one."""

import shutil

import numpy as np
from fairseq.data import indexed_dataset


def write_part(data, destination, split="train", share=1.0, tokens=None, at_least=0):
    """Make a data directory of the first lines of one split of *data*.

    Args:
        data (Path): made by fairseq-preprocess.
        destination (Path): directory to make.
        split (str): the split.
        share (float): of the lines, in (0, 1].
        tokens (int): only as many lines as hold this many tokens; None: no such limit.
        at_least (int): tokens that are written at least; the lines are repeated until they are.
    """
    destination.mkdir(parents=True)
    shutil.copy(data / "dict.txt", destination)
    whole = indexed_dataset.make_dataset(str(data / split), impl="mmap")
    count = int(len(whole) * share)
    if tokens is not None:
        count = min(count, int(np.searchsorted(np.cumsum(whole.sizes), tokens)) + 1)
    builder = indexed_dataset.MMapIndexedDatasetBuilder(
        str(destination / f"{split}.bin"), dtype=whole._index.dtype
    )
    for _ in range(max(1, -(-at_least // int(whole.sizes[:count].sum())))):
        for number in range(count):
            builder.add_item(whole[number])
    builder.finalize(str(destination / f"{split}.idx"))
