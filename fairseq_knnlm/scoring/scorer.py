"""Where the neighbours meet the language model: what ``fairseq-eval-lm`` calls for each sample.

A sample here is a chunk of consecutive blocks in several batches (see ``encoding``): the model runs
batch by batch, then one search serves all its tokens.
"""

import math
from typing import TYPE_CHECKING, Optional

import torch

from ..encoding.encode import Encoded, encode, refuse_not_finite
from ..encoding.key_extractor import extractor_of
from ..gating.gated_search import Gated, GatedSearch, looked
from ..probability.knn import knn_log_probs
from ..probability.mixture import mix
from .cache_reader import CacheReader, make_cache_reader
from .compatibility import refuse_ensemble
from .recorder import TokenRecorder
from .settings import Settings, refuse_impossible, with_temperature

if TYPE_CHECKING:  # FAISS is loaded where a datastore is opened: training needs none
    from ..search.retriever import Retriever


def make_scorer(
    retriever: Optional["Retriever"],
    settings: Settings,
    key: Optional[dict] = None,
    eos: Optional[int] = None,
    softmax_batch: int = 0,
    bos: Optional[int] = None,
    recorder: Optional[TokenRecorder] = None,
    gated: Optional[GatedSearch] = None,
) -> "KNNScorer":
    """The scorer that settings ask for.

    Args:
        retriever (Retriever): searches the datastore; None without one.
        settings (Settings): of search, mixture and cache.
        key (dict): ``type`` and ``layer`` of the states that the cache compares; None: the
            retriever's.
        eos (int): id of the end of a line, for a cache that is emptied where documents begin.
        softmax_batch (int): most tokens of one softmax; 0: as many as memory allows.
        bos (int), recorder (TokenRecorder), gated (GatedSearch): see ``KNNScorer``.

    Raises:
        UserError: if a setting cannot be.
    """
    cache = make_cache_reader(settings, eos)
    if key is None and retriever is not None:
        key = retriever.key
    if settings.knn_lambda == 0.0 and gated is None:
        retriever = None  # lambda = 0 needs no neighbours
    return KNNScorer(retriever, settings, cache, key, softmax_batch, bos, recorder, gated)


class KNNScorer:
    """Scores the targets of a sample, in place of fairseq's ``SequenceScorer``.

    Args:
        retriever (Retriever): searches the datastore; None without one.
        settings (Settings): the weights and the temperature.
        cache (CacheReader): the continuous cache; None without one.
        key (dict): ``type`` and ``layer`` of the queries and of the cache's states; None: the
            retriever's.
        softmax_batch (int): most tokens of one softmax; 0: as many as memory allows.
        bos (int): id of a ``<s>`` that ``--add-bos-token`` put in front of each block and that
            fairseq expects among the scored tokens; None where there is none.
        recorder (TokenRecorder): keeps what is computed of every target; None: nobody does.
        gated (GatedSearch): searches in place of the retriever and weighs each token; None: the
            weights of *settings* are those of all tokens.

    Attributes:
        impossible (int): targets so far whose probability is 0.

    Raises:
        UserError: if a setting cannot be.
        UserError: if the temperature is left to a datastore that records none.
    """

    def __init__(
        self,
        retriever: Optional["Retriever"] = None,
        settings: Settings = Settings(),  # noqa: B008 (immutable)
        cache: Optional[CacheReader] = None,
        key: Optional[dict] = None,
        softmax_batch: int = 0,
        bos: Optional[int] = None,
        recorder: Optional[TokenRecorder] = None,
        gated: Optional[GatedSearch] = None,
    ):
        refuse_impossible("KNNScorer", settings)
        self._retriever = retriever
        if retriever is not None:
            settings = with_temperature(settings, retriever.datastores[0])
        self._settings = settings
        self._cache = cache
        self._key = retriever.key if key is None and retriever is not None else key
        self._softmax_batch = softmax_batch
        self._bos = bos
        self._recorder, self._gated = recorder, gated
        self.impossible = 0

    @torch.no_grad()
    def generate(self, models, sample: dict, **kwargs) -> list[list[dict]]:
        """Score a sample; the result has the form of fairseq's ``SequenceScorer.generate``.

        Args:
            models (list): of one fairseq decoder-only language model.
            sample (dict): from ``encoding.ChunkCollater``, on the model's device.
            kwargs: what fairseq passes besides; of no use here.

        Returns:
            list of list of dict: one hypothesis a block. ``positional_scores`` are log
            probabilities, -inf for a target that is impossible. Of a sample that is history there
            is none: the cache reads it, and nothing is scored.

        Raises:
            UserError: for an ensemble of models, or one that gives what is not finite.
        """
        refuse_ensemble(len(models))
        model = models[0]
        model.eval()
        if sample["history"]:
            self._cache.log_probs(self._encode(model, sample, log_probs=False).keys, sample)
            return []
        log_p = self._log_probs(model, sample)
        self.impossible += int(log_p.isneginf().sum())
        lengths = sample["target_lengths"]
        return [
            [self._hypothesis(tokens, scores)]
            for tokens, scores in zip(sample["target"].split(lengths), log_p.split(lengths))
        ]

    def _log_probs(self, model, sample: dict) -> torch.Tensor:
        """log p of the targets by the mixture, shape (N,), float32."""
        encoded = self._encode(model, sample)
        log_p_knn = log_p_cache = None
        weights = self._settings.knn_lambda, self._settings.cache_lambda
        if self._gated is not None:
            log_p_knn, *weights = self._gated_log_p_knn(encoded, sample)
        elif self._retriever is not None:
            log_p_knn = self._log_p_knn(encoded.keys, sample["target"])
        if self._cache is not None:
            log_p_cache = self._cache.log_probs(encoded.keys, sample)
        log_p = mix(encoded.log_p_lm, log_p_knn, log_p_cache, *weights)
        if self._recorder is not None:
            knn_lambda = None
            if self._gated is not None:
                knn_lambda = weights[0]
                if (
                    log_p_knn is None
                ):  # no token of this chunk was searched for, those of others may be
                    log_p_knn = torch.full_like(encoded.log_p_lm, math.nan)
            self._recorder.add(
                sample["target"], encoded.log_p_lm, log_p_knn, log_p_cache, log_p, knn_lambda
            )
        return log_p

    def _encode(self, model, sample: dict, **wanted: bool):
        """Encode a sample; *wanted*: what of it beside log p_lm, as ``encode`` names it."""
        options = {"softmax_batch": self._softmax_batch, **wanted}
        options["confidence"] = self._gated is not None and self._gated.gate.looks_before
        if self._retriever is None and self._cache is None:
            encoded = encode(model, sample, **options)
        else:
            with extractor_of(model, self._key) as extractor:
                encoded = encode(model, sample, extractor, **options)
        refuse_not_finite(encoded)
        return encoded

    def _gated_log_p_knn(self, encoded: Encoded, sample: dict) -> Gated:
        """log p_knn of the targets where a gate wants a search, and the weights of each token."""
        targets = sample["target"]

        def log_probs(rows, neighbors, temperature):
            distances, values, _ = neighbors
            return knn_log_probs(distances, values, targets[rows], temperature)

        before = looked(self._gated.gate, encoded, sample)
        return self._gated.search(encoded.keys, before, log_probs)

    def _log_p_knn(self, queries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p_knn of the targets, shape (N,), float32, on their device."""
        log_p_knn = queries.new_empty(len(targets), dtype=torch.float32)
        for rows, neighbors in self._retriever.batches(queries):
            log_p_knn[rows] = knn_log_probs(
                neighbors.distances,
                neighbors.values,
                targets[rows].to(neighbors.values.device),
                self._settings.temperature,
            ).to(log_p_knn.device)
        return log_p_knn

    def _hypothesis(self, tokens, scores) -> dict:
        if self._bos is not None:  # fairseq strips it again
            tokens = torch.cat([tokens.new_tensor([self._bos]), tokens])
            scores = torch.cat([scores.new_zeros(1), scores])
        return {
            "tokens": tokens,
            "score": scores.mean() if len(scores) else scores.new_tensor(-math.inf),
            "attention": None,
            "alignment": None,
            "positional_scores": scores,
        }
