"""The text that a command looks at: lines that someone wrote, or a part of a split."""

import contextlib
import os
import sys
import tempfile
import types

import numpy as np
from fairseq.data import indexed_dataset
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tokenizer import tokenize_line
from omegaconf import OmegaConf

from ..errors import UserError
from ..plugin.compat import numpy_compat
from ..plugin.unknown_words import warn_of_unknown_words

# Name of the split that a text becomes.
_SPLIT = "passage"


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
        raise UserError(f"--input {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--input {name} is no UTF-8 text: byte {error.start} cannot be read"
        ) from None
    if not text.strip():
        raise UserError(f"--input {name} is empty: there is no word to look at")
    lines = text.split("\n")  # fairseq-preprocess cuts lines there, and nowhere else
    return lines if lines[-1] else lines[:-1]


@contextlib.contextmanager
def loaded_text(task, lines: list[str], name: str, split_words=tokenize_line):
    """Lines as a split, made as ``fairseq-preprocess`` and the task make any other.

    Args:
        task: a ``KNNLMTask``.
        lines (list of str): of text.
        name (str): what to call the text in an error.
        split_words (callable): takes a line, gives the words that the model is to see.

    Yields:
        tuple: the loaded split, and for each of its target tokens the word as it was written.

    Raises:
        UserError: if the model knows none of the words.
    """
    dictionary = task.source_dictionary
    sentences = [split_words(line) for line in lines]
    ids = [
        dictionary.encode_line(" ".join(words), tokenize_line, add_if_not_exist=False).long()
        for words in sentences
    ]
    _refuse_unknown(dictionary, ids, name)
    warn_of_unknown_words(dictionary, ids, [word for words in sentences for word in words])
    with tempfile.TemporaryDirectory() as folder:
        builder = indexed_dataset.make_builder(
            os.path.join(folder, f"{_SPLIT}.bin"), "mmap", len(dictionary)
        )
        for sentence in ids:
            builder.add_item(sentence)
        builder.finalize(os.path.join(folder, f"{_SPLIT}.idx"))
        dataset = _load(task, folder)
        words = [word for sentence in sentences for word in [*sentence, dictionary.eos_word]]
        # Empty lines between documents may belong to no block.
        kept = (words[start:stop] for start, stop in dataset.dataset.slice_indices.tolist())
        yield dataset, [word for block in kept for word in block]


def _load(task, folder: str):
    """The split in a folder, cut in blocks by the settings of a task; the task stays as it is."""
    args = OmegaConf.merge(task.args, {"data": folder})
    reader = LanguageModelingTask(args, task.dictionary, task.output_dictionary, task.targets)
    with numpy_compat():
        reader.load_dataset(_SPLIT)
    return reader.dataset(_SPLIT)


def _refuse_unknown(dictionary, sentences: list, name: str) -> None:
    ids = np.concatenate([sentence.numpy()[:-1] for sentence in sentences])
    if (ids == dictionary.unk()).all():
        raise UserError(
            f"none of the {len(ids):,} words of --input {name} is in the dictionary "
            "of the data: the text must be tokenised as the training text was (see --tokenizer and "
            "--bpe)"
        )


class BlockRange:
    """The blocks of a loaded split that hold a range of its target tokens, and their left context.

    Args:
        dataset: a loaded split.
        start, stop (int): the target tokens, counted from 0 in corpus order; *stop* is not among
            them.
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
