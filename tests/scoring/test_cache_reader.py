"""The cache of a text that comes in samples is that of the whole text."""

import numpy as np
import pytest
import torch
from helpers.oracle import one_token_at_a_time

from fairseq_knnlm.probability.continuous_cache import ContinuousCache
from fairseq_knnlm.scoring.cache_reader import CacheReader

EOS, SIZE, THETA = 2, 40, 0.3


def make_text(count=300):
    """States and tokens, with lines of any length, most of them very short, the first one empty."""
    rng = torch.Generator().manual_seed(6)
    targets = torch.randint(3, 8, (count,), generator=rng)
    targets[torch.rand(count, generator=rng) < 0.45] = EOS
    targets[0], targets[1:4] = EOS, 5
    return torch.randn(count, 4, generator=rng), targets


def documents(targets):
    """Rows at which a document begins: in front of every line that follows an empty one."""
    rows, line, after_empty = set(), [], True
    for row, token in enumerate(targets.tolist()):
        if not line and token != EOS and after_empty:
            rows.add(row)
        line.append(token)
        if token == EOS:
            after_empty, line = line == [EOS], []
    return rows


def read(reader, states, targets, bounds, starts=()):
    """log p_cache of a text in samples that end at *bounds*; documents begin also at *starts*."""
    parts = []
    for first, last in zip([0, *bounds], bounds):
        sample = {
            "target": targets[first:last],
            "document_starts": [row - first for row in starts if first <= row < last],
        }
        parts.append(reader.log_probs(states[first:last], sample))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "bounds", [[300], [1, 1, 2, 3, 150, 151, 300], range(1, 301)], ids=["whole", "some", "tokens"]
)
@pytest.mark.parametrize("starts", [(), (0, 33, 34, 150, 299)], ids=["lines", "blocks"])
def test_documents_are_kept_apart_however_samples_cut_them(bounds, starts):
    states, targets = make_text()
    reader = CacheReader(ContinuousCache([SIZE], [THETA]), EOS)
    resets = documents(targets) | set(starts)
    assert len(resets) > 20
    expected = one_token_at_a_time(states, targets, SIZE, THETA, resets=resets)
    result = read(reader, states, targets, list(bounds), starts)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_documents_that_are_not_to_be_kept_apart_share_one_cache():
    states, targets = make_text()
    reader = CacheReader(ContinuousCache([SIZE], [THETA]))
    expected = one_token_at_a_time(states, targets, SIZE, THETA)
    result = read(reader, states, targets, [7, 150, 300], starts=(33, 150))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
