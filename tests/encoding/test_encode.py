"""One pass of the model: log p and its normaliser against fairseq's own, keys where they belong."""

import pytest
import torch
from helpers import oracle

from fairseq_knnlm.encoding import (
    Block,
    ChunkCollater,
    KeyExtractor,
    encode,
    extractor_of,
    to_device,
)
from fairseq_knnlm.encoding.encode import Encoded, refuse_not_finite
from fairseq_knnlm.errors import UserError

ARCHITECTURES = ["adaptive", "plain"]


@pytest.fixture(params=ARCHITECTURES)
def model_and_sample(request, data, checkpoints):
    """A trained model and five blocks of a text of their own, of different lengths."""
    _, model = oracle.load(data, checkpoints[request.param], 32)
    rng = torch.Generator().manual_seed(3)
    blocks = []
    for index, length in enumerate((9, 1, 4, 30, 4)):
        tokens = torch.randint(4, 120, (length + 1,), generator=rng)
        blocks.append(Block(index, tokens[:-1], tokens[1:]))
    return model, ChunkCollater(pad=1, max_tokens=40)(blocks)


@torch.no_grad()
def stock_log_probs(model, sample):
    """log p of the whole vocabulary at each target, by fairseq, shape (N, V)."""
    rows = {}
    for batch in sample["batches"]:
        output = model(batch["src_tokens"], src_lengths=batch["src_lengths"])
        every = model.get_normalized_probs(output, log_probs=True).flatten(0, 1)
        rows.update(zip(batch["rows"].tolist(), every[batch["positions"]]))
    return torch.stack([rows[row] for row in range(len(rows))])


def test_log_p_is_fairseqs(model_and_sample):
    model, sample = model_and_sample
    every = stock_log_probs(model, sample)
    expected = every.gather(1, sample["target"].unsqueeze(1)).squeeze(1)
    for softmax_batch in (0, 1, 7):
        encoded = encode(model, sample, softmax_batch=softmax_batch)
        torch.testing.assert_close(encoded.log_p_lm, expected, rtol=1e-5, atol=1e-5)
        assert encoded.keys is None and encoded.log_normalizer is None


def test_the_most_probable_tokens_are_those_of_fairseqs_softmax(model_and_sample):
    model, sample = model_and_sample
    every = stock_log_probs(model, sample)
    for softmax_batch in (0, 7):
        encoded = encode(model, sample, softmax_batch=softmax_batch, top=6)
        expected = every.topk(6, dim=1).values
        torch.testing.assert_close(encoded.top_log_p_lm, expected, rtol=1e-5, atol=1e-5)
        of_ids = every.gather(1, encoded.top_ids)  # whichever of equal ones it is
        torch.testing.assert_close(of_ids, expected, rtol=1e-5, atol=1e-5)
        assert all(len(set(row)) == 6 for row in encoded.top_ids.tolist())
    assert encode(model, sample).top_ids is None


def test_the_log_normalizer_joins_logits_to_log_p(model_and_sample):
    """A logit less the log-normaliser is the log-probability of its word."""
    model, sample = model_and_sample
    encoded = encode(model, sample, log_normalizer=True, softmax_batch=5)
    torch.testing.assert_close(encoded.log_p_lm, encode(model, sample).log_p_lm)
    every = stock_log_probs(model, sample)
    word = 7  # in the head of the adaptive softmax as well
    features = {}
    for batch in sample["batches"]:
        with torch.no_grad():
            states = model(
                batch["src_tokens"], src_lengths=batch["src_lengths"], features_only=True
            )[0].flatten(0, 1)
        features.update(zip(batch["rows"].tolist(), states[batch["positions"]]))
    features = torch.stack([features[row] for row in range(len(features))])
    softmax = getattr(model.decoder, "adaptive_softmax", None)
    head = model.decoder.output_layer if softmax is None else softmax.head
    with torch.no_grad():
        logits = head(features)[:, word]
    torch.testing.assert_close(
        logits - encoded.log_normalizer, every[:, word], rtol=1e-4, atol=1e-5
    )


def test_keys_stand_in_the_rows_of_their_targets(model_and_sample):
    model, sample = model_and_sample
    with KeyExtractor(model.decoder) as extractor:
        encoded = encode(model, sample, extractor, log_probs=False)
        halves = encode(model, sample, extractor, log_probs=False, key_dtype=torch.float16)
    assert encoded.log_p_lm is None
    assert halves.keys.dtype == torch.float16
    torch.testing.assert_close(halves.keys.float(), encoded.keys, rtol=1e-3, atol=1e-3)
    # one block at a time, without padding and batches
    caught = []
    hook = model.decoder.layers[-1].fc1.register_forward_pre_hook(
        lambda module, arguments: caught.append(arguments[0][:, 0])
    )
    with torch.no_grad():
        for batch in sample["batches"]:
            for tokens, length in zip(batch["src_tokens"], batch["src_lengths"].tolist()):
                model(tokens[None, :length], src_lengths=torch.tensor([length]))
    hook.remove()
    rows = torch.cat([batch["rows"] for batch in sample["batches"]])
    torch.testing.assert_close(encoded.keys[rows], torch.cat(caught), rtol=1e-4, atol=1e-5)


def test_the_extractor_of_a_datastore_is_that_of_its_key(model_and_sample):
    model, _ = model_and_sample
    extractor = extractor_of(model, {"type": "attn-input", "layer": 0, "layers": 2})
    assert (extractor.key, extractor.layer) == ("attn-input", 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_and_counted(value):
    log_p, keys = torch.full((5,), -1.0), torch.ones(5, 3, dtype=torch.float16)
    refuse_not_finite(Encoded(log_p, keys))
    refuse_not_finite(Encoded(None, None))
    refuse_not_finite(Encoded(log_p[:0], keys[:0]))
    keys[1, 2] = keys[4] = value
    with pytest.raises(UserError, match="no finite hidden state for 2 of 5 tokens"):
        refuse_not_finite(Encoded(log_p, keys))
    log_p[0] = value
    with pytest.raises(UserError, match="no finite log-probability for 1 of 5 tokens"):
        refuse_not_finite(Encoded(log_p, None))


def test_a_key_that_does_not_exist_is_refused(model_and_sample):
    model, _ = model_and_sample
    with pytest.raises(UserError, match="key must be one of ffn-input, .*, got 'ffn'"):
        KeyExtractor(model.decoder, "ffn")


def test_a_sample_on_a_device_is_the_same_sample(model_and_sample):
    _, sample = model_and_sample
    moved = to_device(sample, torch.device("meta"))
    assert moved["target"].device.type == "meta"
    assert all(part.device.type == "meta" for batch in moved["batches"] for part in batch.values())
    assert moved["target_lengths"] == sample["target_lengths"]
    assert moved.keys() == sample.keys()
