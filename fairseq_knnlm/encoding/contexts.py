"""The last tokens before each position, as the model sees them."""

import torch


def latest_tokens(sample: dict, count: int) -> torch.Tensor:
    """The last tokens of the context of each target, the latest first.

    They are looked up in what the model is fed: nothing reaches back beyond its block and its left
    context, so that they do not depend on how a text is cut into samples.

    Args:
        sample (dict): from ``samples.ChunkCollater``, with N targets.
        count (int): how many of them.

    Returns:
        LongTensor: shape (N, count), on the device of *sample*; -1 where the model sees no more.
    """
    contexts = sample["target"].new_full((len(sample["target"]), count), -1)
    for batch in sample["batches"]:
        tokens, positions, rows = batch["src_tokens"], batch["positions"], batch["rows"]
        places = positions % tokens.size(1)
        for back in range(count):
            seen = places >= back
            contexts[rows[seen], back] = tokens.reshape(-1)[positions[seen] - back]
    return contexts
