"""Which segments share words, and the order that puts them together."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin import similar_segments as similar


def make_segments(count=60, topics=6, seed=0):
    """Segments of 30 tokens, each mostly of the words of one topic; and the topics."""
    rng = np.random.default_rng(seed)
    of = rng.integers(topics, size=count)
    words = rng.integers(4, 14, size=(count, 30))
    return [
        np.where(rng.random(30) < 0.7, row + 10 * (1 + t), row) for row, t in zip(words, of)
    ], of


def bm25(segments, query, k1=1.5, b=0.75):
    """Scores of all segments by Lucene's BM25, the default of bm25s, in plain Python."""
    mean = sum(map(len, segments)) / len(segments)
    scores = np.zeros(len(segments))
    for word in set(query.tolist()):
        having = sum(word in segment for segment in segments)
        idf = math.log(1 + (len(segments) - having + 0.5) / (having + 0.5))
        for number, segment in enumerate(segments):
            count = Counter(segment.tolist())[word]
            scores[number] += idf * count / (count + k1 * (1 - b + b * len(segment) / mean))
    return scores


def test_hits_are_the_best_by_the_formula():
    segments, _ = make_segments()
    hits = similar.similar_segments(segments, 100)
    assert hits.shape == (60, similar.HITS)
    for number, segment in enumerate(segments[:10]):
        scores = bm25(segments, segment)
        scores[number] = -np.inf
        expected = np.sort(scores)[::-1][: similar.HITS]
        np.testing.assert_allclose(scores[hits[number]], expected, rtol=1e-4)


def test_few_segments_have_few_hits():
    segments, _ = make_segments(count=3)
    assert [sorted(row) for row in similar.similar_segments(segments, 100).tolist()] == [
        [1, 2], [0, 2], [0, 1],
    ]  # fmt: skip
    assert similar.similar_segments(segments[:1], 100).shape == (1, 0)


def test_the_order_holds_each_segment_once_and_similar_ones_together():
    segments, topics = make_segments(count=200)
    hits = similar.similar_segments(segments, 100)
    np.random.seed(3)
    order = similar.order_of_similar(hits)
    assert sorted(order) == list(range(200))
    together = (topics[order[1:]] == topics[order[:-1]]).mean()
    np.random.seed(3)
    shuffled = np.random.permutation(200)
    assert together > 0.8 > 3 * (topics[shuffled[1:]] == topics[shuffled[:-1]]).mean()


def test_the_order_goes_to_the_best_that_is_unused():
    hits = np.array([[2, 1], [0, 2], [0, 1], [1, 0]])
    np.random.seed(0)
    first = int(np.random.permutation(4)[0])
    np.random.seed(0)
    order = similar.order_of_similar(hits).tolist()
    assert order[0] == first
    for here, following in zip(order, order[1:]):
        unused = [hit for hit in hits[here] if hit not in order[: order.index(following)]]
        assert not unused or following == unused[0]


def test_hits_are_kept_beside_the_data(tmp_path, monkeypatch):
    segments, _ = make_segments()
    prefix = str(tmp_path / "train")
    found = similar.cached_similar_segments(segments, 100, prefix)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bm25s", None)  # not needed for what is there
        np.testing.assert_array_equal(similar.cached_similar_segments(segments, 100, prefix), found)
        others = [np.concatenate(segments[:2]), *segments[2:]]  # the same tokens, cut elsewhere
        with pytest.raises(UserError, match=r"fairseq_knnlm\[trime\]"):
            similar.cached_similar_segments(others, 100, prefix)
    similar.cached_similar_segments(others, 100, prefix)
    assert len(list(tmp_path.iterdir())) == 2 and file.name.startswith("train.similar-")
