"""Evaluation with one softmax over words and memories, as a model of TRIME was trained.

Zhong, Lei and Chen (EMNLP 2022). The memories are the last tokens of the text; with a
datastore of inner products those that are retrieved join them, and are then mixed in once more.
"""

import math
from typing import TYPE_CHECKING, Optional

import torch

from ..probability.batch_memory import joint_log_probs
from ..probability.knn import knn_log_probs
from ..probability.mixture import mix
from ..probability.text_memory import TextMemory
from .cache_reader import CacheReader
from .recorder import TokenRecorder
from .scorer import KNNScorer
from .settings import Settings

if TYPE_CHECKING:  # FAISS is loaded where a datastore is opened
    from ..search.retriever import Retriever


class MemoryReader(CacheReader):
    """A memory that reads the samples of a text as they come, in order.

    Args:
        memory (TextMemory): what it remembers.
        eos (int): id of the end of a line, where documents are to be kept apart; None where not.
        by_block (bool): whether blocks are kept apart.
    """

    def __init__(self, memory: TextMemory, eos: Optional[int] = None, by_block: bool = False):
        super().__init__(memory, eos)
        self._by_block = by_block

    def log_probs(self, states, sample: dict):
        """The sums of ``TextMemory.log_sums`` for a sample, which the memory then remembers.

        Args:
            states (Tensor): shape (N, D), any float dtype.
            sample (dict): from ``encoding.ChunkCollater``, with N targets.
        """
        return self._cache.log_sums(states, sample["target"], self._resets(sample))

    def _resets(self, sample):
        if not self._by_block:
            return super()._resets(sample)
        ends = torch.tensor(sample["target_lengths"]).cumsum(0)
        return [0, *ends[:-1].tolist()]


class TrimeScorer(KNNScorer):
    """Scores targets by one softmax over words and memories, see ``KNNScorer`` for the rest.

    Args:
        retriever (Retriever): searches the datastore; None without one.
        settings (Settings): with a ``cache_size`` and a ``trime_temperature``.
        key (dict): ``type`` and ``layer`` of the states.
        eos (int): id of the end of a line, for a memory that is emptied where documents begin.
        softmax_batch (int), bos (int), recorder (TokenRecorder): see ``KNNScorer``.
    """

    def __init__(
        self,
        retriever: Optional["Retriever"],
        settings: Settings,
        key: dict,
        eos: Optional[int] = None,
        softmax_batch: int = 0,
        bos: Optional[int] = None,
        recorder: Optional[TokenRecorder] = None,
    ):
        reset = settings.cache_reset
        reader = MemoryReader(
            TextMemory(settings.cache_size, settings.trime_temperature),
            eos if reset == "document" else None,
            reset == "block",
        )
        super().__init__(retriever, settings, reader, key, softmax_batch, bos, recorder)

    def _log_probs(self, model, sample: dict) -> torch.Tensor:
        encoded, targets = self._encode(model, sample, log_normalizer=True), sample["target"]
        log_p_knn = None
        every, matching = self._cache.log_probs(encoded.keys, sample)
        log_p_memory = matching - every
        if self._retriever is not None:
            log_p_knn, *retrieved = self._retrieve(encoded.keys, targets)
            every, matching = map(torch.logaddexp, (every, matching), retrieved)
        log_p = joint_log_probs(encoded.log_p_lm, encoded.log_normalizer, every, matching)
        log_p = mix(log_p, log_p_knn, knn_lambda=self._settings.knn_lambda)
        if self._recorder is not None:
            self._recorder.add(targets, encoded.log_p_lm, log_p_knn, log_p_memory, log_p)
        return log_p

    def _retrieve(self, queries, targets):
        """log p_knn, and what neighbours add to the softmax; nothing where they are not by ip.

        Returns:
            tuple of Tensor: shape (N,), float32, natural log: log p_knn of the targets, the sum
            over all neighbours, and over those that have the target.
        """
        log_p_knn = queries.new_empty(len(targets), dtype=torch.float32)
        every, matching = (torch.full_like(log_p_knn, -math.inf) for _ in range(2))
        by_product = self._retriever.manifest["metric"] == "ip"
        scale = self._settings.trime_temperature * math.sqrt(queries.size(1))
        for rows, neighbors in self._retriever.batches(queries):
            distances, values = neighbors.distances, neighbors.values
            wanted = targets[rows].to(values.device)
            log_p_knn[rows] = knn_log_probs(
                distances, values, wanted, self._settings.temperature
            ).to(log_p_knn.device)
            if by_product:  # their distances are minus the inner products
                weights = distances.float() / -scale
                differs = values != wanted.unsqueeze(1)
                every[rows] = weights.logsumexp(dim=1).to(every.device)
                matched = weights.masked_fill(differs, -math.inf).logsumexp(dim=1)
                matching[rows] = matched.to(every.device)
        return log_p_knn, every, matching
