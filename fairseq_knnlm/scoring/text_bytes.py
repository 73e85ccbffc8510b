"""How many bytes a text has, which bits per byte are of: rebuilt from the dictionary's symbols.

Perplexities of two tokenisations cannot be compared, bits of the same bytes can. The text is what
fairseq's ``post_process`` makes of the symbols of each line, in UTF-8, and one byte for the end of
the line.
"""

import re
from typing import Optional

import numpy as np
import torch

from .words import CONTINUED_MARKER, PIECE_MARKER, SENTENCEPIECE, refuse_other_forms

# A piece that sentencepiece writes for one byte of a character that it has no piece of.
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class TextBytes:
    """Counts the bytes of a text of pieces that comes in parts.

    Args:
        dictionary: fairseq's, of the text.
        post_process (str): what ``--remove-bpe`` says: how pieces become text.

    Raises:
        UserError: for a form that is not known.
    """

    def __init__(self, dictionary, post_process: str):
        refuse_other_forms(post_process)
        symbols = [dictionary[i] for i in range(len(dictionary))]
        eos = dictionary.eos()
        is_eos = np.arange(len(symbols)) == eos
        if post_process == SENTENCEPIECE:
            sizes = list(map(_bytes_of_piece, symbols))
            starts_word = np.array([symbol.startswith(PIECE_MARKER) for symbol in symbols])
            # The space in front of the first word of a line is no part of the line.
            self._space, self._beside = starts_word, is_eos
        else:
            sizes = list(map(_bytes_of_word_or_part, symbols))
            ends_word = np.array([not symbol.endswith(CONTINUED_MARKER) for symbol in symbols])
            # The space behind its last word is none either.
            self._space, self._beside = is_eos, ends_word & ~is_eos
        self._sizes = np.array(sizes)
        self._sizes[eos] = 1
        self._without_spelling = [dictionary.unk(), dictionary.bos(), dictionary.pad()]
        self._last, self._total = eos, 0
        self._is_known = True

    def add(self, targets: torch.Tensor) -> None:
        """Count the next part of the text.

        Args:
            targets (LongTensor): shape (N,), token ids, in order.
        """
        tokens = targets.cpu().numpy()
        if not len(tokens):
            return
        if np.isin(tokens, self._without_spelling).any():
            self._is_known = False
        before = np.concatenate([[self._last], tokens[:-1]])
        no_spaces = self._space[tokens] & self._beside[before]
        self._total += int(self._sizes[tokens].sum()) - int(no_spaces.sum())
        self._last = tokens[-1]

    @property
    def total(self) -> Optional[int]:
        """Bytes so far; None where a token stands for many words (``<unk>``)."""
        return self._total if self._is_known else None


def _bytes_of_piece(symbol: str) -> int:
    if _BYTE_PIECE.fullmatch(symbol):
        return 1
    return len(symbol.replace(PIECE_MARKER, " ").encode())


def _bytes_of_word_or_part(symbol: str) -> int:
    """Of a word with the space behind it, or of a part of one without the marker."""
    if symbol.endswith(CONTINUED_MARKER):
        return len(symbol.encode()) - len(CONTINUED_MARKER)
    return len(symbol.encode()) + 1
