"""Maximum and entropy of p_lm against fairseq's own distribution."""

import math

import pytest
import torch
from helpers import oracle

from fairseq_knnlm.encoding import Block, ChunkCollater, encode, target_log_probs
from fairseq_knnlm.encoding.confidence import of_log_probs, of_logits


@pytest.fixture(params=["adaptive", "plain"])
def model(request, data, checkpoints):
    return oracle.load(data, checkpoints[request.param], 32)[1]


def from_log_probs(model, log_p):
    """By loops over the rows, in float64; the words of a cluster together count as one."""
    softmax, expected = model.decoder.adaptive_softmax, []
    for row in log_p.double().exp().tolist():
        if softmax is not None:
            head, *ends = softmax.cutoff
            clusters = [sum(row[start:end]) for start, end in zip([head, *ends], ends)]
            row = row[:head] + clusters
        entropy = -sum(p * math.log(p) for p in row if p > 0)
        expected.append([math.log(max(row)), entropy])
    return torch.tensor(expected, dtype=torch.float32)


@pytest.mark.parametrize("softmax_batch", [0, 1, 7])
@torch.no_grad()
def test_equals_the_whole_distribution(model, softmax_batch):
    features = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    adaptive = model.decoder.adaptive_softmax is not None
    output = features if adaptive else model.decoder.output_layer(features)
    log_p = model.get_normalized_probs((output[None], None), log_probs=True)[0]
    targets = torch.arange(50) % log_p.size(1)
    expected = from_log_probs(model, log_p)
    scored = target_log_probs(model.decoder, features, targets, softmax_batch, confidence=True)
    torch.testing.assert_close(scored[2], expected, rtol=1e-4, atol=1e-5)
    found = of_log_probs(log_p, model.decoder.adaptive_softmax)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_encode_puts_rows_where_they_belong(model):
    rng = torch.Generator().manual_seed(2)
    texts = [torch.randint(4, 120, (length,), generator=rng) for length in (9, 2, 17)]
    blocks = [Block(i, tokens[:-1], tokens[1:]) for i, tokens in enumerate(texts)]
    sample = ChunkCollater(pad=1, max_tokens=20)(blocks)
    log_p = [
        model.get_normalized_probs(model(tokens[None, :-1]), log_probs=True)[0] for tokens in texts
    ]
    found = encode(model, sample, confidence=True)
    expected = from_log_probs(model, torch.cat(log_p))
    torch.testing.assert_close(found.confidence, expected, rtol=1e-4, atol=1e-5)
    plain = encode(model, sample)
    assert plain.confidence is None and torch.equal(plain.log_p_lm, found.log_p_lm)


def test_a_model_that_is_sure_has_no_entropy():
    logits = torch.tensor([[0.0, 200.0, -3.0], [5.0, 5.0, 5.0]])
    expected = torch.tensor([[0.0, 0.0], [-math.log(3), math.log(3)]])
    torch.testing.assert_close(of_logits(logits), expected)
    infinite = torch.tensor([[0.0, -math.inf]])
    assert of_log_probs(infinite).tolist() == [[0.0, 0.0]]
