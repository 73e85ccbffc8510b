"""Words of an input that the model does not know: said in one line, since nothing else shows it."""

import logging
from collections.abc import Iterable, Sequence
from typing import Optional

import torch

from ..inspection.as_text import printable

logger = logging.getLogger("fairseq_knnlm.input")

# So many of them are named.
_NAMED = 5


def warn_of_unknown_words(
    dictionary, sentences: Iterable[torch.Tensor], words: Optional[Sequence[str]] = None
) -> None:
    """Count the words of an input that are ``<unk>`` to the model, and say so if there are any.

    Args:
        dictionary: fairseq's, of the input.
        sentences (iterable of LongTensor): token ids, each of shape (n,); ``</s>`` is no word.
        words (sequence of str): all words as they were written, ``</s>`` left out; None: not known.
    """
    ids = torch.cat([sentence.flatten() for sentence in sentences])
    ids = ids[(ids != dictionary.eos()) & (ids != dictionary.pad())]
    unknown = (ids == dictionary.unk()).nonzero().flatten().tolist()
    if not unknown:
        return
    logger.warning(
        f"{len(unknown):,} of {len(ids):,} words of the input are not in the dictionary, the model "
        f"sees {dictionary.unk_word}{_named(unknown, words)}: is it tokenised as the training text "
        "was? (--tokenizer, --moses-no-escape, --bpe)"
    )


def _named(unknown: Sequence[int], words: Optional[Sequence[str]]) -> str:
    """The first different ones of them."""
    if words is None:
        return ""
    different = list(dict.fromkeys(words[place] for place in unknown))
    named = printable(" ".join(different[:_NAMED])) + (" ..." if len(different) > _NAMED else "")
    return f" ({named})"
