"""Where the kNN model meets the language model: what ``fairseq-eval-lm`` calls for each sample.

A sample here is a chunk of consecutive blocks in several batches (see ``context``): the model runs
batch by batch, then one search serves all its tokens.
"""

import math
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F

from .cache import ContinuousCache
from .context import document_starts
from .errors import UserError
from .interpolation import knn_log_probs, mix
from .key_extractor import KeyExtractor

# Largest logits tensor, in elements; --softmax-batch can only make it smaller.
_MAX_LOGITS = 1 << 25


class Encoded(NamedTuple):
    """What one forward pass over a chunk gives, rows in corpus order.

    log_p_lm (Tensor): shape (N,), float32, log p_lm(target); None if not asked for.
    keys (Tensor): shape (N, D), the model's dtype or what was asked for; None without an extractor.
    """

    log_p_lm: Optional[torch.Tensor]
    keys: Optional[torch.Tensor]


@torch.no_grad()
def encode(
    model,
    sample: dict,
    extractor: Optional[KeyExtractor] = None,
    log_probs: bool = True,
    softmax_batch: int = 0,
    key_type: Optional[torch.dtype] = None,
) -> Encoded:
    """Run a language model over a chunk; the softmax only if *log_probs* are asked for.

    Args:
        model: a fairseq decoder-only language model in evaluation mode.
        sample (dict): from ``context.ChunkCollater``, on the model's device.
        extractor (KeyExtractor): an entered extractor on this model.
        softmax_batch (int): most tokens of one softmax; 0: as many as memory allows.
        key_type (torch.dtype): of the keys; None: the model's.
    """
    targets = sample["target"]
    log_p_lm = targets.new_empty(len(targets), dtype=torch.float32) if log_probs else None
    keys = None
    for batch in sample["batches"]:
        features = model(batch["src_tokens"], src_lengths=batch["src_lengths"], features_only=True)[
            0
        ]
        rows, positions = batch["rows"], batch["positions"]
        if log_probs:
            flat = features.reshape(-1, features.size(-1))[positions]
            log_p_lm[rows] = target_log_probs(model.decoder, flat, targets[rows], softmax_batch)
        if extractor is not None:
            length = batch["src_tokens"].size(1)
            scored = extractor.keys[positions % length, positions // length]
            if keys is None:
                shape = len(targets), scored.size(1)
                keys = scored.new_empty(shape, dtype=key_type or scored.dtype)
            keys[rows] = scored.to(keys.dtype)
    return Encoded(log_p_lm, keys)


def target_log_probs(decoder, features, targets, softmax_batch: int = 0):
    """log p_lm of the targets, without the rest of the distribution.

    Of an adaptive softmax only the head and the clusters that hold a target are computed.

    Args:
        decoder: a fairseq decoder.
        features (Tensor): shape (n, C), its output before the softmax.
        targets (LongTensor): shape (n,).
        softmax_batch (int): most rows of one softmax; 0: as many as memory allows.

    Returns:
        Tensor: shape (n,), float32, natural log.
    """
    softmax = getattr(decoder, "adaptive_softmax", None)
    if softmax is None:
        score, width = _linear_log_probs, decoder.output_projection.weight.size(0)
    else:
        score, width = _adaptive_log_probs, softmax.cutoff[0]
    step = max(1, _MAX_LOGITS // width)
    step = min(softmax_batch or step, step)
    pieces = zip(features.split(step), targets.split(step))
    return torch.cat([score(decoder, piece, target) for piece, target in pieces])


def _linear_log_probs(decoder, features, targets):
    logits = decoder.output_layer(features)
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def _adaptive_log_probs(decoder, features, targets):
    softmax = decoder.adaptive_softmax
    logits, clustered_targets = softmax(features, targets)
    log_p = -F.cross_entropy(logits[0].float(), clustered_targets[0], reduction="none")
    for cluster, (start, stop) in enumerate(zip(softmax.cutoff, softmax.cutoff[1:]), start=1):
        if logits[cluster] is not None:
            within = (targets >= start) & (targets < stop)
            log_p[within] -= F.cross_entropy(
                logits[cluster].float(), clustered_targets[cluster], reduction="none"
            )
    return log_p


def encode_and_map(model, sample: dict, retriever, function, softmax_batch: int = 0):
    """Run a language model over a chunk and use the neighbours of all its targets.

    Args:
        function (callable): takes a slice of the rows and their ``Neighbors``, see
            ``Retriever.map``.

    Returns:
        tuple: ``Encoded``, rows in corpus order, and the results of *function* in order, a list.
    """
    with retriever.extractor(model) as extractor:
        encoded = encode(model, sample, extractor, softmax_batch=softmax_batch)
    return encoded, retriever.map(function, encoded.keys)


def encode_and_search(model, sample: dict, retriever, softmax_batch: int = 0):
    """Run a language model over a chunk and find the neighbours of all its targets.

    Returns:
        tuple: ``Encoded`` and ``Neighbors``, rows in corpus order.
    """
    with retriever.extractor(model) as extractor:
        encoded = encode(model, sample, extractor, softmax_batch=softmax_batch)
    return encoded, retriever.search(encoded.keys)


class CacheReader:
    """A continuous cache that reads the samples of a text as they come, in order.

    Args:
        cache (ContinuousCache): of one size and one theta.
        make_extractor (callable): takes a model, gives the extractor of its states.
        weight (float): of p_cache in the mixture.
        eos (int): id of the end of a line, where documents are to be kept apart; None where not.
    """

    def __init__(
        self,
        cache: ContinuousCache,
        make_extractor: Callable,
        weight: float,
        eos: Optional[int] = None,
    ):
        self.make_extractor = make_extractor
        self.weight = weight
        self._cache = cache
        self._eos = eos
        # an empty line before the text
        self._last = torch.tensor([eos or 0, eos or 0])

    def log_probs(self, states, sample: dict):
        """log p_cache of the targets of a sample, shape (N,), see ``ContinuousCache``."""
        ((log_p,),) = self._cache.log_probs(states, sample["target"], self._resets(sample))
        return log_p

    def _resets(self, sample):
        """Rows at which documents begin, also where the sample begins in the middle of one."""
        if self._eos is None:
            return []
        text = torch.cat([self._last, sample["target"].cpu()])
        self._last = text[-2:]
        after_empty_lines = document_starts(text, self._eos) - 2
        return sorted({*after_empty_lines[after_empty_lines >= 0], *sample["document_starts"]})


class KNNScorer:
    """Scores the targets of a sample, in place of fairseq's ``SequenceScorer``.

    Args:
        softmax_batch (int): most tokens of one softmax; 0: as many as memory allows.
        retriever (Retriever): searches the datastore; None without one.
        knn_lambda (float): weight of p_knn.
        temperature (float): T, divides the distances.
        cache (CacheReader): the continuous cache; None without one.
        bos (int): id of a ``<s>`` that ``--add-bos-token`` put in front of each block and that
            fairseq expects among the scored tokens; None where there is none.

    Attributes:
        impossible (int): targets so far whose probability is 0.
    """

    def __init__(
        self,
        softmax_batch=0,
        retriever=None,
        knn_lambda=0.0,
        temperature=1.0,
        cache: Optional[CacheReader] = None,
        bos=None,
    ):
        self.softmax_batch = softmax_batch
        self.retriever = retriever
        self.knn_lambda = knn_lambda
        self.temperature = temperature
        self.cache = cache
        self.bos = bos
        self.impossible = 0

    @torch.no_grad()
    def generate(self, models, sample: dict, **kwargs) -> list[list[dict]]:
        """Score a sample; the result has the form of fairseq's ``SequenceScorer.generate``.

        ``positional_scores`` are log probabilities, -inf for a target that is impossible. Of a
        sample that is history there is no result: the cache reads it, nothing is scored.

        Raises:
            UserError: for an ensemble of models.
        """
        if len(models) != 1:
            raise UserError(
                f"fairseq_knnlm: an ensemble of {len(models)} models is not supported: a datastore "
                "belongs to one model; pass one checkpoint as --path"
            )
        model = models[0]
        model.eval()
        if sample["history"]:
            self._remember(model, sample)
            return []
        log_p = self._log_probs(model, sample)
        self.impossible += int(log_p.isneginf().sum())
        lengths = sample["target_lengths"]
        return [
            [self._hypothesis(tokens, scores)]
            for tokens, scores in zip(sample["target"].split(lengths), log_p.split(lengths))
        ]

    def _remember(self, model, sample):
        with self.cache.make_extractor(model) as extractor:
            encoded = encode(model, sample, extractor, log_probs=False)
        self.cache.log_probs(encoded.keys, sample)

    def _log_probs(self, model, sample):
        encoded, log_p_knn = self._encode(model, sample)
        if self.cache is None:
            return mix(encoded.log_p_lm, log_p_knn, knn_lambda=self.knn_lambda)
        log_p_cache = self.cache.log_probs(encoded.keys, sample)
        return mix(encoded.log_p_lm, log_p_knn, log_p_cache, self.knn_lambda, self.cache.weight)

    def _encode(self, model, sample):
        """``Encoded`` and log p_knn of the targets, None without a retriever."""
        if self.retriever is not None:
            targets = sample["target"].cpu()

            def score(rows, found):
                aims = targets[rows].to(found.values.device)
                return knn_log_probs(found.distances, found.values, aims, self.temperature)

            encoded, scores = encode_and_map(
                model, sample, self.retriever, score, self.softmax_batch
            )
            return encoded, torch.cat(scores).to(encoded.log_p_lm.device)
        if self.cache is None:
            return encode(model, sample, softmax_batch=self.softmax_batch), None
        with self.cache.make_extractor(model) as extractor:
            return encode(model, sample, extractor, softmax_batch=self.softmax_batch), None

    def _hypothesis(self, tokens, scores) -> dict:
        if self.bos is not None:  # fairseq strips it again
            tokens = torch.cat([tokens.new_tensor([self.bos]), tokens])
            scores = torch.cat([scores.new_zeros(1), scores])
        return {
            "tokens": tokens,
            "score": scores.mean() if len(scores) else scores.new_tensor(-math.inf),
            "attention": None,
            "alignment": None,
            "positional_scores": scores,
        }
