"""How sure a language model is of the next token: the most that any token gets, and the entropy.

Both are of the distribution whose logits are there anyway, because log p_lm is normalised over
them: of the whole vocabulary, or of the head of an adaptive softmax, where the words of a cluster
together count as one.
"""

import torch


def of_logits(logits: torch.Tensor) -> torch.Tensor:
    """Maximum and entropy of a softmax.

    Args:
        logits (Tensor): shape (n, W).

    Returns:
        Tensor: shape (n, 2), float32: ln of the largest probability, <= 0, and the entropy in nats,
        in [0, ln W].
    """
    logits = logits.float()
    weights = logits.softmax(dim=1)
    # ln of the largest is also what the largest logit is above the log-normaliser.
    highest = weights.amax(dim=1).log()
    mean = torch.linalg.vecdot(weights, logits)
    entropy = logits.amax(dim=1) - highest - mean
    return torch.stack([highest, entropy.clamp_(min=0.0)], dim=1)


def of_log_probs(log_probs: torch.Tensor, softmax=None) -> torch.Tensor:
    """The same of a whole distribution.

    Args:
        log_probs (Tensor): shape (n, V), natural log.
        softmax: the adaptive softmax that it is of, or None.

    Returns:
        Tensor: as of ``of_logits``.
    """
    # 0 times -inf would be no number.
    log_probs = log_probs.float().clamp(min=torch.finfo(torch.float32).min)
    if softmax is None:
        return of_logits(log_probs)
    head, *ends = softmax.cutoff
    bounds = zip([head, *ends], ends)
    clusters = [log_probs[:, start:end].logsumexp(dim=1, keepdim=True) for start, end in bounds]
    return of_logits(torch.cat([log_probs[:, :head], *clusters], dim=1))
