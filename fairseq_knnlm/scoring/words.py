"""Words that are several tokens (``--remove-bpe``), counted as ``fairseq-eval-lm`` counts them.

A token that ends with the marker belongs to the same word as the one behind it, unless it is the
last of its block. The log-probability of a word is the sum over its tokens, and perplexity is of
words.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import UserError

# What fairseq-eval-lm takes for --remove-bpe and --post-process.
_POST_PROCESSES = ("@@ ", "subword_nmt")


def continued_ids(dictionary, post_process: str) -> torch.Tensor:
    """Tokens that are not the end of their word.

    Args:
        dictionary: fairseq's, of the text.
        post_process (str): what ``--remove-bpe`` says.

    Returns:
        LongTensor: their ids.

    Raises:
        UserError: for what ``fairseq-eval-lm`` does not know either.
    """
    if post_process not in _POST_PROCESSES:
        raise UserError(
            f"--post-process must be one of {_POST_PROCESSES}, as of fairseq-eval-lm, got "
            f"{post_process!r}"
        )
    marker = post_process.rstrip()
    ids = [i for i in range(len(dictionary)) if dictionary[i].endswith(marker)]
    return torch.tensor(ids, dtype=torch.long)


def word_starts(
    targets: torch.Tensor, lengths: Sequence[int], continued: torch.Tensor
) -> np.ndarray:
    """Rows at which words begin.

    Args:
        targets (LongTensor): shape (N,), the tokens of some blocks, in order.
        lengths (sequence of int): of each block, together N.
        continued (LongTensor): from ``continued_ids``.

    Returns:
        ndarray: shape (W,), int64, ascending from 0.
    """
    begins = ~torch.isin(targets, continued).cpu().numpy()
    # What stands behind a token begins a word if that token ends one.
    begins = np.concatenate([[True], begins[:-1]])[: len(targets)]
    ends_of_blocks = np.cumsum(np.asarray(lengths, dtype=np.int64))
    begins[ends_of_blocks[ends_of_blocks < len(targets)]] = True
    return np.flatnonzero(begins)


def log_probs_of_words(log_probs, starts: np.ndarray) -> np.ndarray:
    """Log-probability of each word.

    Args:
        log_probs (array): shape (N,), natural log, of the tokens.
        starts (ndarray): shape (W,), from ``word_starts``.

    Returns:
        ndarray: shape (W,), float64.
    """
    return np.add.reduceat(np.asarray(log_probs, dtype=np.float64), starts)
