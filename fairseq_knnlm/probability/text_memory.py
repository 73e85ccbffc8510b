"""The last tokens of a text as the memory of one softmax over words and memories.

Zhong, Lei and Chen (EMNLP 2022): what ``batch_memory`` is to the batches of training,
for a text that is evaluated from front to back. A continuous cache has a distribution and a weight
of its own; here how much the memory has to say is part of the sums.
"""

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch

from ..arguments import check_arguments
from ..fields import POSITIVE, whole
from ..progress import track
from .batch_memory import exponential_sums

# Positions that are compared with their past by one product of matrices, which then fits in a
# processor's cache.
_ROWS = 256


class TextMemory:
    """The last hidden states of a text and the tokens that followed.

    The text comes in pieces of any length, and gives the same whatever they are.

    Args:
        size (int): positions looked back on, >= 1.
        temperature (float): tau > 0, divides the inner products beside sqrt(D).

    Raises:
        UserError: if an argument cannot be.
    """

    def __init__(self, size: int, temperature: float = 1.0):
        check_arguments("TextMemory", size=(size, whole(1)), temperature=(temperature, POSITIVE))
        self._size, self._temperature = size, temperature
        self._states: Optional[torch.Tensor] = None
        self._values: Optional[torch.Tensor] = None

    def log_sums(
        self, states, targets, resets: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What memory adds to the softmax of the next piece of the text, which it then remembers.

        Args:
            states (Tensor): shape (N, D), any float dtype, f(c).
            targets (LongTensor): shape (N,), the tokens that follow, on the same device.
            resets (sequence of int): rows before which everything is forgotten, ascending.

        Returns:
            tuple of Tensor: shape (N,), float32, natural log of the sum of exp(f(c) . f(c_j) /
            (tau sqrt(D))) over all positions looked back on, and over those whose token is the
            target; -inf where there is none.
        """
        if not len(targets):
            return states.new_empty(0).float(), states.new_empty(0).float()
        past = 0 if self._states is None else len(self._states)
        first = self._first_seen(past, len(targets), resets).to(targets.device)
        states, values = self._with_past(states.float(), targets)
        queries = states / (self._temperature * math.sqrt(states.size(1)))
        pieces = []
        starts = range(past, len(values), _ROWS)
        for start in track("memory", starts, len(starts)):
            stop = min(start + _ROWS, len(values))
            lowest = first[start - past : stop - past]
            seen = slice(int(lowest.min()), stop)
            column = torch.arange(seen.start, seen.stop, device=values.device)
            row = torch.arange(start, stop, device=values.device).unsqueeze(1)
            hidden = (column >= row) | (column < lowest.unsqueeze(1))
            inputs = queries[start:stop], states[seen], values[start:stop], values[seen], hidden
            pieces.append(exponential_sums(*(part.unsqueeze(0) for part in inputs)))
        # The next row looks back no further than the last one did.
        kept = slice(max(int(first[-1]), len(values) - self._size), None)
        self._states, self._values = states[kept].clone(), values[kept].clone()
        return tuple(torch.cat([sums[0] for sums in parts]) for parts in zip(*pieces))

    def _first_seen(self, past: int, count: int, resets) -> torch.Tensor:
        """The first position that each row looks back on, counted from the oldest that is kept."""
        begins = np.zeros(count, dtype=np.int64)
        resets = np.asarray(resets, dtype=np.int64)
        begins[resets] = past + resets
        begins = np.maximum.accumulate(begins)
        return torch.from_numpy(np.maximum(begins, past + np.arange(count) - self._size))

    def _with_past(self, states, targets):
        if self._states is None:
            return states, targets
        return torch.cat([self._states, states]), torch.cat([self._values, targets])
