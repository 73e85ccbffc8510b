"""Words that are several tokens (``--remove-bpe``), counted as ``fairseq-eval-lm`` counts them.

In the form of subword-nmt (``@@``, the default) a token that ends with the marker belongs to the
same word as the one behind it, unless it is the last of its block. In that of sentencepiece, which
``fairseq-eval-lm`` itself does not know, a word begins at a piece with the marker in front, at
``</s>``, behind one, and where a block begins. The log-probability of a word is the sum over its
tokens, and perplexity is of words.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import UserError

SENTENCEPIECE = "sentencepiece"
# What --remove-bpe and --post-process may be: the first two are those of fairseq-eval-lm.
POST_PROCESSES = ("@@ ", "subword_nmt", SENTENCEPIECE)
# In front of the first piece of a word.
PIECE_MARKER = "\N{LOWER ONE EIGHTH BLOCK}"
# Behind every piece of a word but the last.
CONTINUED_MARKER = "@@"


class Words:
    """Says where words begin in a text of pieces.

    Args:
        dictionary: fairseq's, of the text.
        post_process (str): what ``--remove-bpe`` says.

    Raises:
        UserError: for a form that is not known.
    """

    def __init__(self, dictionary, post_process: str):
        refuse_other_forms(post_process)
        symbols = [dictionary[i] for i in range(len(dictionary))]
        is_eos = np.arange(len(symbols)) == dictionary.eos()
        # Whether a word begins at a token of this type, and whether one does behind it.
        if post_process == SENTENCEPIECE:
            marked = np.array([symbol.startswith(PIECE_MARKER) for symbol in symbols])
            self._opens, self._closes = marked | is_eos, is_eos
        else:
            continued = np.array([symbol.endswith(CONTINUED_MARKER) for symbol in symbols])
            self._opens, self._closes = np.zeros_like(is_eos), ~continued

    def starts(self, targets: torch.Tensor, lengths: Sequence[int]) -> np.ndarray:
        """Rows at which words begin.

        Args:
            targets (LongTensor): shape (N,), the tokens of some blocks, in order.
            lengths (sequence of int): of each block, together N.

        Returns:
            ndarray: shape (W,), int64, ascending from 0.
        """
        targets = targets.cpu().numpy()
        begins = self._opens[targets]
        begins[1:] |= self._closes[targets[:-1]]
        blocks = np.cumsum([0, *lengths])
        begins[blocks[blocks < len(targets)]] = True
        return np.flatnonzero(begins)


def refuse_other_forms(post_process: str) -> None:
    """Refuse a form of pieces that is not known.

    Args:
        post_process (str): what ``--remove-bpe`` says.

    Raises:
        UserError: naming those that are.
    """
    if post_process not in POST_PROCESSES:
        raise UserError(
            f"--remove-bpe (--post-process) must be one of {POST_PROCESSES}, got {post_process!r}"
        )


def log_probs_of_words(log_probs, starts: np.ndarray) -> np.ndarray:
    """Log-probability of each word.

    Args:
        log_probs (array): shape (N,), natural log, of the tokens.
        starts (ndarray): shape (W,), from ``Words.starts``.

    Returns:
        ndarray: shape (W,), float64.
    """
    return np.add.reduceat(np.asarray(log_probs, dtype=np.float64), starts)
