"""Blocks of text with their left context: stateless, in corpus order, shardable.

fairseq scores a corpus in blocks, and ``LMContextWindowDataset`` carries the previous block along
in mutable state: with several workers or shards its context is silently another block's. Here
every block fetches its own left context from the corpus, so that any worker, batch size or shard
sees the same tokens.
"""

from typing import NamedTuple, Optional

import numpy as np
import torch

from ..arguments import check_arguments, or_none
from ..errors import UserError
from ..fields import Kind, whole


class Block(NamedTuple):
    """One block of text.

    index (int): its place among the blocks of the text.
    source (LongTensor): shape (T,), input tokens, left context first.
    target (LongTensor): shape (n,), the tokens to predict, n <= T; the last n inputs predict them.
    starts_document (bool): whether it is known to begin a document.
    """

    index: int
    source: torch.Tensor
    target: torch.Tensor
    starts_document: bool = False


class BlockDataset(torch.utils.data.Dataset):
    """The blocks of a fairseq ``MonolingualDataset``, each with its own left context.

    Args:
        dataset: items are dicts of ``source`` and ``target``, as fairseq's language modelling
            task makes them, in corpus order.
        sizes (ndarray): shape (M,), target tokens of each block.
        pad (int): padding token id.
        context_window (int): tokens of left context, the inputs of the blocks before.
        max_length (int): the context of a longer block is shortened to feed no more than this.
        document_starts (ndarray): shape (M,), bool, blocks whose left context must not reach
            into the block before; None where text runs on.
        bos (bool): items begin with an extra ``<s>`` in source and target (``--add-bos-token``),
            which is fed but not a target.

    Raises:
        UserError: if an argument cannot be.
    """

    def __init__(
        self,
        dataset,
        sizes: np.ndarray,
        pad: int,
        context_window: int = 0,
        max_length: Optional[int] = None,
        document_starts: Optional[np.ndarray] = None,
        bos: bool = False,
    ):
        _refuse_impossible(dataset, sizes, pad, context_window, max_length, document_starts)
        self.dataset = dataset
        self.pad = pad
        self.bos = bos
        self.sizes = np.asarray(sizes, dtype=np.int64)
        fed = self.sizes + int(bos)
        ends = np.cumsum(fed)
        starts = ends - fed
        if document_starts is None:
            document_starts = np.zeros(len(fed), dtype=bool)
        document_starts = np.array(document_starts, dtype=bool)
        document_starts[:1] = True
        self._document_starts = document_starts
        first_block = np.maximum.accumulate(np.where(document_starts, np.arange(len(fed)), 0))
        self._context_sizes = np.minimum(context_window, starts - starts[first_block])
        if max_length is not None:
            room = np.maximum(max_length - fed, 0)
            self._context_sizes = np.minimum(self._context_sizes, room)
        self.lengths = fed + self._context_sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index: int) -> Block:
        item = self.dataset[index]
        target = item["target"][int(self.bos) :]
        source = torch.cat(self._context(index) + [item["source"]])
        return Block(index, source, target, bool(self._document_starts[index]))

    def _context(self, index: int) -> list[torch.Tensor]:
        missing = int(self._context_sizes[index])
        pieces: list[torch.Tensor] = []
        while missing > 0:
            index -= 1
            pieces.append(self.dataset[index]["source"][-missing:])
            missing -= len(pieces[-1])
        return pieces[::-1]


def _refuse_impossible(dataset, sizes, pad, context_window, max_length, document_starts) -> None:
    def one_each(flags):
        return np.shape(flags) == (len(dataset),)

    entries = f"of one entry for each of the {len(dataset)} blocks"
    check_arguments(
        "BlockDataset",
        sizes=(sizes, Kind(f"whole numbers, {entries}", one_each)),
        pad=(pad, whole(0)),
        context_window=(context_window, whole(0)),
        max_length=(max_length, or_none(whole(1))),
        document_starts=(document_starts, or_none(Kind(f"true or false, {entries}", one_each))),
    )


def refuse_oversized(
    blocks: BlockDataset, max_positions: int, max_tokens: int, positions: Optional[int] = None
) -> None:
    """Refuse a corpus with a block that cannot be fed; nothing is ever skipped or cut.

    Args:
        blocks (BlockDataset): the corpus.
        max_positions (int): longest input that the model takes, without the extra ``<s>``.
        max_tokens (int): longest batch, ``--max-tokens``.
        positions (int): how many positions the model has learned, see ``encode.learned_positions``;
            None: it computes them.

    Raises:
        UserError: naming the longest block and the flags to change.
    """
    if len(blocks) == 0:
        raise UserError("the split holds no block of text; check the data directory")
    longest = int(blocks.lengths.max())
    index = int(blocks.lengths.argmax())
    fed = f"block {index} feeds {longest} tokens (left context included)"
    # as in training, where fairseq does not count the extra <s> either
    if longest - int(blocks.bos) > max_positions:
        raise UserError(
            f"{fed}, the model takes {max_positions}: pass --tokens-per-sample "
            f"{max_positions} or less, --context-window included, or another --sample-break-mode"
        )
    if positions is not None and longest > positions:
        raise UserError(
            f"{fed}, the extra <s> of --add-bos-token is one of them, and the model has learned "
            f"{positions} positions: pass --tokens-per-sample {positions - 1} or less, "
            "--context-window included"
        )
    if longest > max_tokens:
        raise UserError(f"{fed}, more than --max-tokens {max_tokens}: raise --max-tokens")


def document_starts(targets, eos: int) -> np.ndarray:
    """Rows at which documents begin: after an empty line, which is an eos right after an eos.

    Args:
        targets (array): shape (N,), the tokens of a text in order.
        eos (int): id of the end of a line.

    Returns:
        ndarray: shape (M,), int64, ascending, the first of them 0.
    """
    ends = np.asarray(targets) == eos
    empty = ends & np.append(True, ends[:-1])
    return np.append(0, np.flatnonzero(empty[:-1] & ~empty[1:]) + 1)
