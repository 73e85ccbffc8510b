"""One pass of model and search, called from Python, against brute force."""

import numpy as np
import pytest
import torch
from helpers.small import all_distances, make_datastore, make_model

from fairseq_knnlm.encoding.blocks import BlockDataset, document_starts
from fairseq_knnlm.encoding.chunks import plan_chunks
from fairseq_knnlm.encoding.contexts import latest_tokens
from fairseq_knnlm.encoding.encode import encode
from fairseq_knnlm.encoding.key_extractor import extractor_of
from fairseq_knnlm.encoding.samples import make_samples
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.gating.ngram_counts import ORDERS
from fairseq_knnlm.search.retriever import Retriever
from fairseq_knnlm.tuning.collect import collect
from fairseq_knnlm.tuning.tuning_data import parts_of

PAD, EOS, VOCABULARY = 1, 2, 24
KEY = {"type": "ffn-input", "layer": 2, "layers": 3}
K = 9


def make_blocks(seed, count=203, size=7, starts=None):
    """A random text with empty lines, in blocks of *size* tokens."""
    rng = np.random.default_rng(seed)
    text = rng.integers(4, VOCABULARY, size=count)
    text[rng.random(count) < 0.2] = EOS
    text = torch.from_numpy(text)
    source = text.roll(1)
    source[0] = EOS
    items = [
        {"source": source[first : first + size], "target": text[first : first + size]}
        for first in range(0, count, size)
    ]
    sizes = np.array([len(item["target"]) for item in items])
    return BlockDataset(items, sizes, PAD, context_window=3, document_starts=starts), text


def samples_of(blocks, chunk_tokens=40):
    return make_samples(blocks, plan_chunks(blocks.sizes, chunk_tokens), max_tokens=64)


@pytest.fixture(scope="module")
def model():
    return make_model()


def keys_of(model, blocks):
    with extractor_of(model, KEY) as extractor:
        encoded = [encode(model, sample, extractor) for sample in samples_of(blocks, 10**6)]
    return torch.cat([each.keys for each in encoded]), torch.cat([e.log_p_lm for e in encoded])


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    """Keys and values of another text, and their datastore."""
    blocks, text = make_blocks(seed=1, count=500)
    keys = keys_of(model, blocks)[0].numpy().astype(np.float16)
    values = text.numpy().astype(np.uint8)
    path = make_datastore(tmp_path_factory.mktemp("collect") / "d", keys, values, key=KEY)
    return keys, values, path


def test_equals_brute_force(model, stored):
    keys, values, path = stored
    blocks, text = make_blocks(seed=2)
    progress = []
    data = collect(
        model, samples_of(blocks), len(text), EOS, Retriever.open([path], k=K),
        keep_queries=True, on_progress=progress.append,
    )  # fmt: skip
    queries, log_p_lm = keys_of(model, blocks)
    torch.testing.assert_close(data.queries, queries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.log_p_lm, log_p_lm, rtol=1e-4, atol=1e-5)
    assert torch.equal(data.targets, text)
    exact = all_distances(queries.numpy(), keys)
    nearest = np.argsort(exact, axis=1, kind="stable")[:, :K]
    expected = np.take_along_axis(exact, nearest, axis=1)
    np.testing.assert_allclose(data.distances, expected, rtol=1e-3, atol=1e-3)
    assert np.array_equal(data.matches, values[nearest] == text.numpy()[:, None])
    assert torch.equal(data.parts, parts_of(torch.from_numpy(nearest)))
    assert data.document_starts.tolist() == document_starts(text, EOS).tolist()
    assert len(data.document_starts) > 3 and data.document_starts.dtype == np.int64
    assert progress[-1] == len(text) and progress == sorted(set(progress))
    assert len(progress) == len(plan_chunks(blocks.sizes, 40)) > 3


def test_what_a_gate_is_fitted_to(model, stored):
    keys, values, path = stored
    blocks, text = make_blocks(seed=2)
    retriever = Retriever.open([path], k=K)
    data = collect(model, samples_of(blocks), len(text), EOS, retriever, keep_for_gate=True)
    queries, _ = keys_of(model, blocks)
    torch.testing.assert_close(data.queries, queries, rtol=1e-4, atol=1e-5)
    nearest = np.argsort(all_distances(queries.numpy(), keys), axis=1, kind="stable")[:, :K]
    assert np.array_equal(data.values, values[nearest])
    encoded = [encode(model, each, confidence=True) for each in samples_of(blocks, 10**6)]
    expected = torch.cat([each.confidence for each in encoded])
    torch.testing.assert_close(data.confidence, expected, rtol=1e-4, atol=1e-5)
    expected = torch.cat([latest_tokens(each, ORDERS) for each in samples_of(blocks, 10**6)])
    assert torch.equal(data.contexts.long(), expected)
    assert data.contexts[50].tolist() == text[[49, 48, 47, 46]].tolist()
    assert (data.seconds > 0).all()
    with pytest.raises(UserError, match="keep_for_gate needs a retriever"):
        collect(model, samples_of(blocks), len(text), EOS, key=KEY, keep_for_gate=True)


def test_documents_begin_with_blocks_that_keep_to_them(model):
    starts = np.zeros(29, dtype=bool)
    starts[[3, 17]] = True
    blocks, text = make_blocks(seed=3, starts=starts)
    data = collect(model, samples_of(blocks), len(text), EOS)
    by_lines = document_starts(text, EOS)
    assert set(data.document_starts) == {*by_lines, 3 * 7, 17 * 7}
    assert not {3 * 7, 17 * 7} <= set(by_lines)
    assert (np.diff(data.document_starts) > 0).all()


def test_without_a_datastore_there_are_no_neighbours(model):
    blocks, text = make_blocks(seed=4)
    data = collect(model, samples_of(blocks), len(text), EOS, key=KEY, keep_queries=True)
    assert data.distances.shape == data.matches.shape == data.parts.shape == (len(text), 0)
    torch.testing.assert_close(data.queries, keys_of(model, blocks)[0], rtol=1e-4, atol=1e-5)
    assert collect(model, samples_of(blocks), len(text), EOS).queries is None


def test_a_model_that_gives_what_is_not_finite_is_refused_at_the_first_chunk():
    blocks, text = make_blocks(seed=6)
    broken, progress = make_model(), []
    with torch.no_grad():
        broken.decoder.layers[2].fc2.weight.mul_(1e38)  # the keys before it stay as they are
    with pytest.raises(UserError, match="no finite log-probability for 35 of 35 tokens"):
        collect(broken, samples_of(blocks), len(text), EOS, on_progress=progress.append)
    assert progress == []


def test_what_cannot_be_is_refused(model):
    blocks, text = make_blocks(seed=5)
    with pytest.raises(UserError, match="keep_queries needs a retriever, or a key"):
        collect(model, samples_of(blocks), len(text), EOS, keep_queries=True)
    with pytest.raises(UserError, match="more targets than count, 100"):
        collect(model, samples_of(blocks), 100, EOS)
    with pytest.raises(UserError, match="have 203 targets, count is 204"):
        collect(model, samples_of(blocks), 204, EOS)
