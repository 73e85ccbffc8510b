"""The text that a command looks at: lines that someone wrote, or a part of a split."""

import contextlib
import os
import sys
import tempfile
import types

import numpy as np
from fairseq.data import indexed_dataset
from fairseq.tokenizer import tokenize_line

from ..errors import UserError


def read_lines(path: str) -> list[str]:
    """The lines of a text file; ``-`` is standard input.

    Raises:
        UserError: if there is none, it cannot be read, is not UTF-8, or has no word.
    """
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"fairseq_knnlm: --input {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"fairseq_knnlm: --input {name} is no UTF-8 text: byte {error.start} cannot be read"
        ) from None
    if not text.strip():
        raise UserError(f"fairseq_knnlm: --input {name} is empty: there is no word to look at")
    lines = text.split("\n")  # as fairseq-preprocess cuts them
    return lines if lines[-1] else lines[:-1]


@contextlib.contextmanager
def loaded_text(task, lines: list[str], name: str, split_words=tokenize_line):
    """Lines as a split of the task, made as ``fairseq-preprocess`` and the task make any other.

    Args:
        task: a ``KNNLMTask``.
        lines: of text.
        name (str): what to call the text in an error.
        split_words (callable): takes a line, gives the words that the model is to see.

    Yields:
        tuple: the loaded split, and for each of its target tokens the word as it was written.

    Raises:
        UserError: if the model knows none of the words.
    """
    dictionary, data = task.source_dictionary, task.args.data
    sentences = [split_words(line) for line in lines]
    ids = [
        dictionary.encode_line(" ".join(words), tokenize_line, add_if_not_exist=False).long()
        for words in sentences
    ]
    _refuse_unknown(dictionary, ids, name)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "passage")
        builder = indexed_dataset.make_builder(f"{path}.bin", "mmap", len(dictionary))
        for sentence in ids:
            builder.add_item(sentence)
        builder.finalize(f"{path}.idx")
        task.args.data = folder
        try:
            task.load_dataset("passage")
        finally:
            task.args.data = data
        dataset = task.dataset("passage")
        words = [word for sentence in sentences for word in [*sentence, dictionary.eos_word]]
        # empty lines between documents may belong to no block
        kept = (words[start:stop] for start, stop in dataset.dataset.slice_indices.tolist())
        yield dataset, [word for block in kept for word in block]


def _refuse_unknown(dictionary, ids, name: str) -> None:
    found = np.concatenate([sentence.numpy()[:-1] for sentence in ids])
    if (found == dictionary.unk()).all():
        raise UserError(
            f"fairseq_knnlm: none of the {len(found)} words of --input {name} is in the dictionary "
            "of the data: the text must be tokenised as the training text was (see --tokenizer and "
            "--bpe)"
        )


class SomeBlocks:
    """The blocks of a loaded split that hold some of its target tokens, and their left context.

    Args:
        dataset: a loaded split.
        start, stop (int): target tokens, counted from 0 in corpus order.
        context_window (int): tokens of left context.

    Attributes:
        first (int): the target token that the first of these blocks begins with, <= start.
    """

    def __init__(self, dataset, start: int, stop: int, context_window: int):
        ends = np.cumsum(np.asarray(dataset.sizes, dtype=np.int64))
        starts = ends - dataset.sizes
        block = int(np.searchsorted(ends, start, side="right"))
        reached = max(0, int(starts[block]) - context_window)
        self._first_block = int(np.searchsorted(ends, reached, side="right"))
        blocks = slice(self._first_block, int(np.searchsorted(ends, stop)) + 1)
        self.first = int(starts[self._first_block])
        self.sizes = dataset.sizes[blocks]
        self.dataset = types.SimpleNamespace(slice_indices=dataset.dataset.slice_indices[blocks])
        self._whole = dataset

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict:
        return self._whole[self._first_block + index]
