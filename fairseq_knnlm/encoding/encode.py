"""One pass of a language model over a chunk of text: log p of its targets, and their keys.

The softmax is computed only where log p is asked for, and then only of the targets.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..progress import track
from .confidence import of_logits
from .key_extractor import KeyExtractor

# Largest logits tensor, in elements; --softmax-batch can only make it smaller.
_MAX_LOGITS = 1 << 25


class Encoded(NamedTuple):
    """What one forward pass over a chunk gives, rows in corpus order; None: not asked for.

    log_p_lm (Tensor): shape (N,), float32, log p_lm(target), natural log.
    keys (Tensor): shape (N, D), the model's dtype or what was asked for.
    log_normalizer (Tensor): shape (N,), float32, logsumexp of the logits: with another set of
        logits, a memory's say, it joins p_lm to one softmax over both (Zhong et al., 2022). Of an
        adaptive softmax, of the logits of its head.
    top_log_p_lm, top_ids (Tensor): shape (N, n), float32 and int64, the n most probable tokens,
        the most probable first, and their log p_lm.
    confidence (Tensor): shape (N, 2), float32, log-maximum and entropy of p_lm, of an adaptive
        softmax of its head, see ``confidence.of_logits``.
    """

    log_p_lm: Optional[torch.Tensor]
    keys: Optional[torch.Tensor]
    log_normalizer: Optional[torch.Tensor] = None
    top_log_p_lm: Optional[torch.Tensor] = None
    top_ids: Optional[torch.Tensor] = None
    confidence: Optional[torch.Tensor] = None


@torch.no_grad()
def encode(
    model,
    sample: dict,
    extractor: Optional[KeyExtractor] = None,
    log_probs: bool = True,
    softmax_batch: int = 0,
    key_dtype: Optional[torch.dtype] = None,
    log_normalizer: bool = False,
    top: int = 0,
    confidence: bool = False,
) -> Encoded:
    """Run a language model over a chunk.

    Args:
        model: a fairseq decoder-only language model in evaluation mode.
        sample (dict): from ``samples.ChunkCollater``, on the model's device.
        extractor (KeyExtractor): an entered extractor on this model; None: no keys.
        log_probs (bool): whether log p_lm is wanted; without it no softmax is computed.
        softmax_batch (int): most tokens of one softmax; 0: as many as memory allows.
        key_dtype (torch.dtype): of the keys; None: the model's.
        log_normalizer (bool): whether it is wanted beside log p_lm.
        top (int): how many of the most probable tokens are wanted beside log p_lm, at most V.
        confidence (bool): whether maximum and entropy of p_lm are wanted beside log p_lm.

    Returns:
        Encoded: rows in corpus order.
    """
    targets = sample["target"]
    encoded = _empty(targets, log_normalizer, top, confidence) if log_probs else Encoded(None, None)
    keys = None
    for batch in track("model", sample["batches"], len(sample["batches"])):
        inputs, lengths = batch["src_tokens"], batch["src_lengths"]
        features = model(inputs, src_lengths=lengths, features_only=True)[0]
        if log_probs:
            _score(model.decoder, features, batch, targets, softmax_batch, encoded)
        if extractor is not None:
            states = _states(extractor, batch)
            if keys is None:
                shape = len(targets), states.size(1)
                keys = states.new_empty(shape, dtype=key_dtype or states.dtype)
            keys[batch["rows"]] = states.to(keys.dtype)
    return encoded._replace(keys=keys)


def _empty(targets, log_normalizer: bool, top: int, confidence: bool) -> Encoded:
    """Memory for what the softmax gives of all rows, as far as it is wanted."""

    def new(*shape, dtype=torch.float32):
        return targets.new_empty(len(targets), *shape, dtype=dtype)

    return Encoded(
        log_p_lm=new(),
        keys=None,
        log_normalizer=new() if log_normalizer else None,
        top_log_p_lm=new(top) if top else None,
        top_ids=new(top, dtype=torch.int64) if top else None,
        confidence=new(2) if confidence else None,
    )


def _score(decoder, features, batch: dict, targets, softmax_batch: int, encoded: Encoded) -> None:
    """Write what the softmax gives of a batch into its rows of *encoded*.

    Args:
        decoder: a fairseq decoder.
        features (Tensor): shape (B, T, C), its output before the softmax.
        batch (dict): of the sample.
        targets (LongTensor): shape (N,), of the sample.
        softmax_batch (int): see ``encode``.
        encoded (Encoded): from ``_empty``.
    """
    rows = batch["rows"]
    flat = features.reshape(-1, features.size(-1))[batch["positions"]]  # (B, T, C) to (n, C)
    wanted = (part is not None for part in (encoded.log_normalizer, encoded.confidence))
    scored = target_log_probs(decoder, flat, targets[rows], softmax_batch, *wanted)
    parts = encoded.log_p_lm, encoded.log_normalizer, encoded.confidence
    for part, of_batch in zip(parts, scored):
        if part is not None:
            part[rows] = of_batch
    if encoded.top_ids is not None:
        top = encoded.top_ids.size(1)
        encoded.top_log_p_lm[rows], encoded.top_ids[rows] = most_probable(
            decoder, flat, top, softmax_batch
        )


def _states(extractor: KeyExtractor, batch: dict) -> torch.Tensor:
    """What the extractor caught of the scored positions of a batch, shape (n, D)."""
    positions, length = batch["positions"], batch["src_tokens"].size(1)
    return extractor.keys[positions % length, positions // length]  # (T, B, D) to (n, D)


def refuse_not_finite(encoded: Encoded) -> None:
    """Refuse what a broken model gives, before anything is computed from it.

    Args:
        encoded (Encoded): from ``encode``.

    Raises:
        UserError: if a log-probability or a number of a key is infinite or not a number.
    """
    for what, numbers in (("log-probability", encoded.log_p_lm), ("hidden state", encoded.keys)):
        if numbers is not None and not torch.isfinite(numbers).all():
            rows = (~torch.isfinite(numbers)).view(len(numbers), -1).any(dim=1)
            raise UserError(
                f"the model gives no finite {what} for {int(rows.sum()):,} of {len(rows):,} "
                "tokens: the checkpoint of --path is broken, or overflows in half precision (try "
                "without --fp16)"
            )


def learned_positions(model) -> Optional[int]:
    """How many positions a model has a vector for, its longest input; None where it computes them.

    Args:
        model: a fairseq decoder-only language model.
    """
    embedding = model.decoder.embed_positions
    return embedding.max_positions if isinstance(embedding, torch.nn.Embedding) else None


def target_log_probs(
    decoder,
    features,
    targets,
    softmax_batch: int = 0,
    log_normalizer: bool = False,
    confidence: bool = False,
) -> tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """log p_lm of the targets, without the rest of the distribution.

    Of an adaptive softmax only the head and the clusters that hold a target are computed.

    Args:
        decoder: a fairseq decoder.
        features (Tensor): shape (n, C), its output before the softmax.
        targets (LongTensor): shape (n,).
        softmax_batch (int): most rows of one softmax; 0: as many as memory allows.
        log_normalizer, confidence (bool): whether they are wanted, see ``Encoded``.

    Returns:
        tuple of Tensor: log p_lm, shape (n,), float32, natural log; the log-normaliser, of the same
        shape; and maximum and entropy, shape (n, 2). None for what is not wanted.
    """
    softmax = getattr(decoder, "adaptive_softmax", None)
    if softmax is None:
        score, width = _linear_log_probs, decoder.output_projection.weight.size(0)
    else:
        score, width = _adaptive_log_probs, softmax.cutoff[0]
    step = _rows_at_a_time(width, softmax_batch)
    log_p, log_z, sure = [], [], []
    for piece, target in zip(features.split(step), targets.split(step)):
        scores, logits = score(decoder, piece, target)
        log_p.append(scores)
        if log_normalizer:
            log_z.append(logits.float().logsumexp(dim=-1))
        if confidence:
            sure.append(of_logits(logits))
    return tuple(torch.cat(parts) if parts else None for parts in (log_p, log_z, sure))


def most_probable(decoder, features, count: int, softmax_batch: int = 0):
    """The tokens that a language model finds most probable; the whole softmax is computed.

    Args:
        decoder: a fairseq decoder.
        features (Tensor): shape (n, C), its output before the softmax.
        count (int): how many tokens, at most V.
        softmax_batch (int): most rows of one softmax; 0: as many as memory allows.

    Returns:
        tuple of Tensor: log p_lm, shape (n, count), float32, natural log, highest first, and the
        tokens' ids, int64, of the same shape.
    """
    log_probs, ids = [], []
    for piece in features.split(_rows_at_a_time(len(decoder.dictionary), softmax_batch)):
        logits = decoder.output_layer(piece[None])  # (n, C) to (1, n, V)
        distribution = decoder.get_normalized_probs((logits, None), log_probs=True)[0]
        largest = distribution.float().topk(count, dim=-1)
        log_probs.append(largest.values)
        ids.append(largest.indices)
    return torch.cat(log_probs), torch.cat(ids)


def _rows_at_a_time(width: int, softmax_batch: int) -> int:
    """How many rows one softmax takes, each of *width* logits."""
    step = max(1, _MAX_LOGITS // width)
    return min(softmax_batch or step, step)


def _linear_log_probs(decoder, features, targets):
    """log p of the targets, and the logits that it is normalised over."""
    logits = decoder.output_layer(features)
    return -F.cross_entropy(logits.float(), targets, reduction="none"), logits


def _adaptive_log_probs(decoder, features, targets):
    """As ``_linear_log_probs``; the logits are those of the head."""
    softmax = decoder.adaptive_softmax
    logits, clustered_targets = softmax(features, targets)
    log_p = -F.cross_entropy(logits[0].float(), clustered_targets[0], reduction="none")
    for cluster, (start, stop) in enumerate(zip(softmax.cutoff, softmax.cutoff[1:]), start=1):
        if logits[cluster] is not None:
            within = (targets >= start) & (targets < stop)
            log_p[within] -= F.cross_entropy(
                logits[cluster].float(), clustered_targets[cluster], reduction="none"
            )
    return log_p, logits[0]
