"""Samples: the blocks of a chunk in batches, as the model takes them.

A *chunk* (see ``chunks``) is the unit in which keys are written and neighbours searched. Within a
chunk, blocks of similar length share a *batch*, the unit of a forward pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Optional, TypeVar

import numpy as np
import torch

from ..arguments import check_arguments, or_none
from ..fields import whole
from .blocks import Block, BlockDataset

# A tensor, or dicts and lists of them.
Sample = TypeVar("Sample")


def plan_batches(lengths: Sequence[int], max_tokens: int, max_sentences: Optional[int]):
    """Group the blocks of a chunk into batches of similar length.

    Args:
        lengths: fed tokens of each block.
        max_tokens (int): most tokens of a batch, padding included.
        max_sentences (int): most blocks of a batch, or None.

    Returns:
        list of list of int: positions in *lengths*, each once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches: list[list[int]] = []
    capacity = 0
    for position in order.tolist():
        if not batches or len(batches[-1]) >= capacity:
            batches.append([])
            capacity = max(1, max_tokens // max(1, int(lengths[position])))
            capacity = min(capacity, max_sentences or capacity)
        batches[-1].append(position)
    return batches


class ChunkCollater:
    """Makes one fairseq sample of the blocks of a chunk; picklable, for data loader workers.

    The sample has what ``fairseq-eval-lm`` reads (``id``, ``ntokens``, ``net_input``) and

    - ``target`` (LongTensor): shape (N,), the targets of all blocks in corpus order;
    - ``target_lengths``: N of each block, a list;
    - ``document_starts``: rows of ``target`` at which blocks begin that begin a document, a list;
    - ``history`` (bool): whether it is there only for what comes after it to look back on;
    - ``batches``: dicts of ``src_tokens`` (B, T) and ``src_lengths`` (B,), padded on the right;
      ``positions`` (n,), the scored positions of the batch flattened to B * T; ``rows`` (n,),
      where they stand in ``target``.

    Args:
        pad (int): padding token id.
        max_tokens, max_sentences (int): see ``plan_batches``.
        first_block (int): index of the first block that is scored; those before are history.

    Raises:
        UserError: if an argument cannot be.
    """

    def __init__(
        self,
        pad: int,
        max_tokens: int,
        max_sentences: Optional[int] = None,
        first_block: int = 0,
    ):
        check_arguments(
            "ChunkCollater",
            pad=(pad, whole(0)),
            max_tokens=(max_tokens, whole(1)),
            max_sentences=(max_sentences, or_none(whole(1))),
            first_block=(first_block, whole(0)),
        )
        self.pad = pad
        self.max_tokens = max_tokens
        self.max_sentences = max_sentences
        self.first_block = first_block

    def __call__(self, blocks: list[Block]) -> dict:
        if not blocks:  # fairseq pads unequal shards with empty batches
            return {}
        target_lengths = [len(block.target) for block in blocks]
        first_rows = np.concatenate([[0], np.cumsum(target_lengths)[:-1]])
        plan = plan_batches(
            [len(block.source) for block in blocks], self.max_tokens, self.max_sentences
        )
        history = blocks[0].index < self.first_block
        return {
            "id": torch.tensor([block.index for block in blocks]),
            "ntokens": 0 if history else sum(target_lengths),
            "net_input": {},
            "target": torch.cat([block.target for block in blocks]),
            "target_lengths": target_lengths,
            "document_starts": [
                int(row) for row, block in zip(first_rows, blocks) if block.starts_document
            ],
            "history": history,
            "batches": [
                self._batch([blocks[i] for i in members], first_rows[members]) for members in plan
            ],
        }

    def _batch(self, blocks: list[Block], first_rows) -> dict:
        length = max(len(block.source) for block in blocks)
        src_tokens = torch.full((len(blocks), length), self.pad, dtype=torch.long)
        positions, rows = [], []
        for i, (block, row) in enumerate(zip(blocks, first_rows)):
            fed, scored = len(block.source), len(block.target)
            src_tokens[i, :fed] = block.source
            positions.append(torch.arange(i * length + fed - scored, i * length + fed))
            rows.append(torch.arange(row, row + scored))
        return {
            "src_tokens": src_tokens,
            "src_lengths": torch.tensor([len(block.source) for block in blocks]),
            "positions": torch.cat(positions),
            "rows": torch.cat(rows),
        }


def make_samples(
    blocks: BlockDataset,
    chunks: Iterable[range],
    max_tokens: int,
    max_sentences: Optional[int] = None,
) -> Iterator[dict]:
    """The samples of some chunks, made one after another in this process.

    Args:
        blocks (BlockDataset): the text.
        chunks (iterable of range): blocks of each sample, see ``chunks.plan_chunks``.
        max_tokens (int): most tokens of a batch, padding included.
        max_sentences (int): most blocks of a batch, or None.

    Yields:
        dict: see ``ChunkCollater``.
    """
    collate = ChunkCollater(blocks.pad, max_tokens, max_sentences)
    for chunk in chunks:
        yield collate([blocks[index] for index in chunk])


def sample_of(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], pad: int = 1
) -> dict:
    """A sample of texts that are each read as a whole, in one batch.

    Args:
        sources (sequence of LongTensor): what each text is read as. The token in front of the first
            target is ``</s>``: of a text that ends with it, the text rolled by 1.
        targets (sequence of LongTensor): the tokens that are predicted; each by the source in its
            place.
        pad (int): padding token id; by default that of fairseq's dictionaries.

    Returns:
        dict: see ``ChunkCollater``, on the device of *sources*.
    """
    longest = max(map(len, sources))
    blocks = [Block(i, *pair) for i, pair in enumerate(zip(sources, targets))]
    return to_device(ChunkCollater(pad, longest * len(blocks))(blocks), sources[0].device)


def to_device(sample: Sample, device: torch.device) -> Sample:
    """A sample with all its tensors on a device.

    Args:
        sample: a tensor, or dicts and lists of them.
        device (torch.device): where they are wanted.
    """
    if isinstance(sample, torch.Tensor):
        return sample.to(device)
    if isinstance(sample, dict):
        return {name: to_device(part, device) for name, part in sample.items()}
    if isinstance(sample, list):
        return [to_device(part, device) for part in sample]
    return sample


def only_rows(sample: dict, start: int, stop: int) -> dict:
    """A sample with some of its targets: batches that hold none of them are left out.

    Args:
        sample (dict): from ``ChunkCollater``.
        start, stop (int): rows of ``target``.

    Returns:
        dict: of the same form; ``target_lengths`` counts what is left of each block.

    Raises:
        UserError: if there are no such rows.
    """
    count = len(sample["target"])
    check_arguments("only_rows", start=(start, whole(0, count)))
    check_arguments("only_rows", stop=(stop, whole(start, count)))
    batches = []
    for batch in sample["batches"]:
        wanted = (batch["rows"] >= start) & (batch["rows"] < stop)
        if wanted.any():
            rows, positions = batch["rows"][wanted] - start, batch["positions"][wanted]
            batches.append({**batch, "rows": rows, "positions": positions})
    ends = np.cumsum(sample["target_lengths"]).clip(start, stop)
    return {
        **sample,
        "ntokens": stop - start,
        "target": sample["target"][start:stop],
        "document_starts": [
            row - start for row in sample["document_starts"] if start <= row < stop
        ],
        "target_lengths": np.diff(ends, prepend=start).tolist(),
        "batches": batches,
    }
