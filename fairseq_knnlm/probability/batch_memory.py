"""A softmax over words and memories at once, whose memories are tokens of the batch itself.

Zhong, Lei and Chen (EMNLP 2022), TRIME: p(w|c) is proportional to

    exp(z_w) + sum over the memories (f(c_j), w_j) with w_j = w of exp(f(c) . f(c_j) / sqrt(D))

where z_w are the logits of the language model and f(c) is its state. Gradients flow through both
sides of a product. The products of a batch with itself grow with the square of its length: they are
made some rows at a time, and made again for the gradients in place of being kept.
"""

import math
from typing import Optional

import torch
from torch.utils.checkpoint import checkpoint

from ..arguments import refuse

# Most products that are in memory at once, 16 MB of each intermediate result.
MAX_PRODUCTS = 1 << 22


def memory_log_sums(
    states, values, pad: int, own: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the memories of each token add to a softmax, in log space.

    Without *own* each row of the batch is a text, and a token sees the tokens before it. With
    *own* all rows are one memory: a token sees the tokens of all other rows, and of its own row
    those before it if that row is allowed to.

    Args:
        states (Tensor): shape (B, T, D), any float dtype, f(c).
        values (LongTensor): shape (B, T), the token that followed each state.
        pad (int): value of positions that are no memory.
        own (BoolTensor): shape (B,), see above; None: only tokens before it.

    Returns:
        tuple of Tensor: shape (B, T), float32, natural log of the sum of exp(f(c) . f(c_j) /
        sqrt(D)) over all memories that a token sees, and over those with its value; -inf where
        there is none.

    Raises:
        UserError: if shapes do not belong together.
    """
    shape = values.shape
    if (
        states.dim() != 3
        or states.shape[:2] != shape
        or not (own is None or own.shape == shape[:1])
    ):
        found = [tuple(part.shape) for part in (states, values, own) if part is not None]
        refuse(
            "memory_log_sums",
            [f"states, values and own must have shape (B, T, D), (B, T) and (B,), got {found}"],
        )
    length = shape[1]
    if own is not None:
        states, values = states.reshape(1, -1, states.size(-1)), values.reshape(1, -1)
    # Half precision has too few digits for sums of exponentials, and a range that products leave.
    states = states.float()
    queries = states / math.sqrt(states.size(-1))
    count = values.size(1)
    step = max(1, MAX_PRODUCTS // (len(values) * count))
    pieces = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        # no token sees a later one of its own text
        seen = slice(0, rows.stop if own is None else count)
        inputs = queries[:, rows], states[:, seen], values[:, rows], values[:, seen]
        options = {"first": start, "pad": pad, "own": own, "length": length}
        if step < count and torch.is_grad_enabled():
            remade = {"use_reentrant": False, "preserve_rng_state": False}
            pieces.append(checkpoint(_sums_of_rows, *inputs, **options, **remade))
        else:
            pieces.append(_sums_of_rows(*inputs, **options))
    every, matching = (torch.cat(parts, dim=1).view(shape) for parts in zip(*pieces))
    return every, matching


def joint_log_probs(log_p_lm, log_normalizer, every, matching) -> torch.Tensor:
    """Log-probability of the targets by one softmax over words and memories.

    With Z = exp(log_normalizer): (Z p_lm + exp(matching)) / (Z + exp(every)). Of an adaptive
    softmax Z is that of its head, as in the paper.

    Args:
        log_p_lm (Tensor): shape (N,), float32, natural log, by the language model.
        log_normalizer (Tensor): shape (N,), float32, logsumexp of its logits.
        every, matching (Tensor): shape (N,), float32, see ``memory_log_sums``.

    Returns:
        Tensor: shape (N,), float32, natural log.

    Raises:
        UserError: if the shapes are not one.
    """
    shapes = [tuple(part.shape) for part in (log_p_lm, log_normalizer, every, matching)]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        refuse("joint_log_probs", [f"all arguments must have one shape (N,), got {shapes}"])
    numerator = torch.logaddexp(log_p_lm + log_normalizer, matching)
    return numerator - torch.logaddexp(log_normalizer, every)


def exponential_sums(queries, states, targets, values, hidden):
    """Sums of exp(query . state), in log space.

    Args:
        queries (Tensor): shape (B, N, D), float32, divided by what divides the products.
        states (Tensor): shape (B, M, D), float32.
        targets (LongTensor): shape (B, N), of the queries.
        values (LongTensor): shape (B, M), of the states.
        hidden (BoolTensor): shape (B or 1, N, M), what a query does not see.

    Returns:
        tuple of Tensor: shape (B, N), natural log, over all states that a query sees and over those
        with its target; -inf where there is none.
    """
    with torch.autocast(queries.device.type, enabled=False):  # --amp would round the products
        products = torch.bmm(queries, states.transpose(1, 2))
    products = products.masked_fill(hidden, -math.inf)
    differs = targets.unsqueeze(2) != values.unsqueeze(1)
    every = products.logsumexp(dim=2)
    return every, products.masked_fill(differs, -math.inf).logsumexp(dim=2)


def _sums_of_rows(queries, states, targets, values, first: int, pad: int, own, length: int):
    """See ``memory_log_sums``, for the rows from *first*; with *own* segments have *length*."""
    row = torch.arange(first, first + targets.size(1), device=values.device).unsqueeze(1)
    column = torch.arange(values.size(1), device=values.device)
    hidden = column >= row
    if own is not None:
        same = row // length == column // length
        hidden = same & (hidden | ~own[row // length])
    hidden = hidden | (values == pad).unsqueeze(1)
    return exponential_sums(queries, states, targets, values, hidden)
