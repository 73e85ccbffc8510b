"""Blocks of text with their left context: stateless, in corpus order, shardable.

fairseq scores a corpus in blocks, and ``LMContextWindowDataset`` carries the previous block along
in mutable state: with several workers or shards its context is silently another block's. Here
every block fetches its own left context from the corpus, so that any worker, batch size or shard
sees the same tokens.

Blocks are grouped twice. A *chunk* is a run of consecutive blocks, the unit in which keys are
written and neighbours searched; it depends on the corpus alone. Within a chunk, blocks of similar
length share a *batch*, the unit of a forward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from .errors import UserError


class Block(NamedTuple):
    """One block of text.

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


def refuse_oversized(blocks: BlockDataset, max_positions: int, max_tokens: int) -> None:
    """Refuse a corpus with a block that cannot be fed; nothing is ever skipped or cut.

    Args:
        max_positions (int): longest input that the model takes.
        max_tokens (int): longest batch, ``--max-tokens``.

    Raises:
        UserError: naming the longest block and the flags to change.
    """
    if len(blocks) == 0:
        raise UserError("fairseq_knnlm: the split holds no block of text; check the data directory")
    longest = int(blocks.lengths.max())
    index = int(blocks.lengths.argmax())
    fed = f"block {index} feeds {longest} tokens (left context included)"
    # as in training, where fairseq does not count the extra <s> either
    if longest - int(blocks.bos) > max_positions:
        raise UserError(
            f"fairseq_knnlm: {fed}, the model takes {max_positions}: pass --tokens-per-sample "
            f"{max_positions} or less, --context-window included, or another --sample-break-mode"
        )
    if longest > max_tokens:
        raise UserError(
            f"fairseq_knnlm: {fed}, more than --max-tokens {max_tokens}: raise --max-tokens"
        )


def plan_chunks(sizes: np.ndarray, chunk_tokens: int) -> list[range]:
    """Cut the blocks into runs of about *chunk_tokens* target tokens, at least one block each.

    Returns:
        list of range: block indices of each chunk, together every block once, in order.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    chunks, start, tokens_before = [], 0, 0
    while start < len(ends):
        stop = int(np.searchsorted(ends, tokens_before + chunk_tokens, side="right"))
        stop = max(stop, start + 1)
        chunks.append(range(start, stop))
        tokens_before = int(ends[stop - 1])
        start = stop
    return chunks


def split_evenly(sizes: np.ndarray, count: int) -> list[range]:
    """Cut the blocks into *count* runs of about equally many target tokens, fewer of few blocks.

    Returns:
        list of range: block indices of each chunk, together every block once, in order.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, [total * number // count for number in range(1, count)]) + 1
    bounds = sorted({0, *cuts.clip(max=len(ends)).tolist(), len(ends)})
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:])]


def shard(chunks: Sequence[range], num_shards: int, shard_id: int) -> list[range]:
    """The contiguous share of the chunks that shard *shard_id* of *num_shards* takes."""
    bounds = np.linspace(0, len(chunks), num_shards + 1).round().astype(int)
    return list(chunks[bounds[shard_id] : bounds[shard_id + 1]])


def blocks_before(sizes: np.ndarray, first: int, tokens: int) -> range:
    """The blocks before block *first* that hold the last *tokens* target tokens before it."""
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    before = int(ends[first - 1]) if first else 0
    return range(int(np.searchsorted(ends, before - tokens, side="right")), first)


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
    """

    def __init__(
        self,
        pad: int,
        max_tokens: int,
        max_sentences: Optional[int] = None,
        first_block: int = 0,
    ):
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


def only_rows(sample: dict, start: int, stop: int) -> dict:
    """A sample with some of its targets: batches that hold none of them are left out.

    Args:
        sample (dict): from ``ChunkCollater``.
        start, stop (int): rows of ``target``.

    Returns:
        dict: of the same form; ``target_lengths`` counts what is left of each block.
    """
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
