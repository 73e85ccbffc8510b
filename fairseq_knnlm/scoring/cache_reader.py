"""The continuous cache of a text that comes in samples."""

from typing import Optional

import torch

from ..encoding.blocks import document_starts
from ..errors import UserError
from ..probability.continuous_cache import ContinuousCache
from .settings import Settings


def make_cache_reader(settings: Settings, eos: Optional[int] = None) -> Optional["CacheReader"]:
    """The cache that settings ask for; None where they ask for none.

    Args:
        settings (Settings): of search, mixture and cache.
        eos (int): id of the end of a line, for a cache that is emptied where documents begin.

    Raises:
        UserError: if it is to join the softmax of the language model, see ``trime_scorer``, or
            to be emptied where only such a one can be.
    """
    if settings.trime_temperature is not None:
        raise UserError(
            "--trime-temperature is for fairseq-eval-lm and fairseq-knnlm-eval: drop it"
        )
    if not settings.cache_size:
        return None
    if settings.cache_reset == "block":
        raise UserError("--knn-cache-reset block is for --trime-temperature, which is missing")
    thetas = None if settings.cache_theta is None else [settings.cache_theta]
    cache = ContinuousCache([settings.cache_size], thetas, settings.cache_metric)
    return CacheReader(cache, eos if settings.cache_reset == "document" else None)


class CacheReader:
    """A continuous cache that reads the samples of a text as they come, in order.

    Args:
        cache (ContinuousCache): of one size and one theta.
        eos (int): id of the end of a line, where documents are to be kept apart; None where not.
    """

    def __init__(self, cache: ContinuousCache, eos: Optional[int] = None):
        self._cache = cache
        self._eos = eos
        # An empty line stands before the text, so that its first line begins a document.
        self._last = None if eos is None else torch.tensor([eos, eos])

    def log_probs(self, states, sample: dict):
        """log p_cache of the targets of a sample, which the cache then remembers.

        Args:
            states (Tensor): shape (N, D), any float dtype.
            sample (dict): from ``encoding.ChunkCollater``, with N targets.

        Returns:
            Tensor: shape (N,), float32, natural log, see ``ContinuousCache.log_probs``.
        """
        ((log_p,),) = self._cache.log_probs(states, sample["target"], self._resets(sample))
        return log_p

    def log_probs_and_top(self, states, sample: dict, count: int):
        """The same with the tokens that the cache finds most probable.

        Args:
            states (Tensor), sample (dict): see ``log_probs``.
            count (int): how many.

        Returns:
            tuple of Tensor: see ``ContinuousCache.log_probs_and_top``.
        """
        return self._cache.log_probs_and_top(states, sample["target"], count, self._resets(sample))

    def _resets(self, sample):
        """Rows at which documents begin, also where the sample begins in the middle of one."""
        if self._eos is None:
            return []
        text = torch.cat([self._last, sample["target"].cpu()])
        self._last = text[-2:]
        after_empty_lines = document_starts(text, self._eos) - 2
        return sorted({*after_empty_lines[after_empty_lines >= 0], *sample["document_starts"]})
