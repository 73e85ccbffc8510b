"""The memory of a text against a loop over tokens in float64."""

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability import text_memory
from fairseq_knnlm.probability.text_memory import TextMemory


@pytest.fixture
def text():
    rng = torch.Generator().manual_seed(0)
    states = 2 * torch.randn(70, 6, generator=rng)
    return states, torch.randint(0, 9, (70,), generator=rng)


def one_token_at_a_time(states, targets, size, temperature, resets=()):
    states, targets = states.double().numpy(), targets.numpy()
    every, matching = np.full((2, len(targets)), -np.inf)
    first = 0
    for t in range(len(targets)):
        first = t if t in resets else first
        past = slice(max(first, t - size), t)
        products = states[past] @ states[t] / (temperature * np.sqrt(states.shape[1]))
        every[t] = np.logaddexp.reduce(products, initial=-np.inf)
        same = products[targets[past] == targets[t]]
        matching[t] = np.logaddexp.reduce(same, initial=-np.inf)
    return every, matching


@pytest.mark.parametrize("rows", [256, 5])
@pytest.mark.parametrize("cuts", [[], [1], [20, 21, 50]])
@pytest.mark.parametrize("size, resets", [(100, []), (7, []), (7, [0, 13, 20, 40]), (1, [69])])
def test_sums_are_those_of_a_loop_whatever_the_pieces(text, size, resets, cuts, rows, monkeypatch):
    monkeypatch.setattr(text_memory, "_ROWS", rows)
    states, targets = text
    memory, found = TextMemory(size, temperature=1.25), []
    bounds = [0, *cuts, len(targets)]
    for start, stop in zip(bounds, bounds[1:]):
        inside = [row - start for row in resets if start <= row < stop]
        found.append(memory.log_sums(states[start:stop], targets[start:stop], inside))
    expected = one_token_at_a_time(states, targets, size, 1.25, resets)
    for sums, of_loop in zip(zip(*found), expected):
        np.testing.assert_allclose(torch.cat(sums).numpy(), of_loop, rtol=1e-5, atol=1e-6)


def test_nothing_is_remembered_of_nothing(text):
    states, targets = text
    memory = TextMemory(5)
    every, matching = memory.log_sums(states[:0], targets[:0])
    assert every.shape == matching.shape == (0,)
    assert memory.log_sums(states[:1], targets[:1])[0].isneginf().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="size.*temperature"):
        TextMemory(0, temperature=0.0)
