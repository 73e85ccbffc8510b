"""Counts of n-grams and of their successors, against ``collections.Counter``."""

import collections
import math

import numpy as np
import pytest

from fairseq_knnlm.gating.ngram_counts import ORDERS, NgramCounts

EOS = 2
TYPES = 9


def counted(documents):
    """Occurrences and successors of every context of 1 to ``ORDERS`` tokens, latest token first."""
    counts, successors = collections.Counter(), collections.defaultdict(set)
    for document in documents:
        for place, token in enumerate(document):
            for n in range(1, min(ORDERS, place) + 1):
                context = tuple(document[place - n : place][::-1])
                if token >= 0 and min(context) >= 0:
                    counts[context] += 1
                    successors[context].add(token)
    return counts, successors


def expected(documents, contexts):
    counts, successors = counted(documents)
    rows = []
    for context in contexts.tolist():
        known = [context[:n] for n in range(1, ORDERS + 1)]
        known = [tuple(part) if min(part) >= 0 else None for part in known]
        rows.append(
            [math.log1p(counts[part]) for part in known]
            + [math.log1p(len(successors.get(part, ()))) for part in known]
        )
    return np.array(rows)


def random_text(seed, count):
    rng = np.random.default_rng(seed)
    return rng.choice(TYPES, size=count, p=[0, 0, 0.25, *[0.125] * 6])


def split_at_empty_lines(text):
    """The documents of a text: what follows an empty line begins another."""
    documents, document = [], []
    for place, token in enumerate(text):
        document.append(int(token))
        is_empty = token == EOS and (place == 0 or text[place - 1] == EOS)
        more_follow = place + 1 < len(text) and text[place + 1] != EOS
        if is_empty and more_follow:
            documents.append(document)
            document = []
    return [*documents, document]


def random_contexts(seed, text):
    """Contexts out of the text, contexts that may not be in it, and some that are short."""
    rng = np.random.default_rng(seed)
    places = rng.integers(ORDERS, len(text), size=200)
    contexts = np.stack([text[places - n] for n in range(1, ORDERS + 1)], axis=1)
    contexts = np.concatenate([contexts, rng.integers(3, TYPES, size=(200, ORDERS))])
    for row, length in enumerate(rng.integers(0, ORDERS + 1, size=len(contexts))):
        contexts[row, length:] = -1 if row % 3 == 0 else contexts[row, length:]
    return contexts.astype(np.int64)


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("count", [1, 2, 7, 3000])
def test_equals_a_counter(eos, count):
    text = random_text(1, count)
    documents = [text.tolist()] if eos is None else split_at_empty_lines(text)
    contexts = random_contexts(2, random_text(1, 3000))
    found = NgramCounts.of([text], TYPES, eos).log_counts(contexts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(documents, contexts), rtol=1e-6)


def test_nothing_reaches_from_one_text_into_another_or_across_a_gap():
    first, second = random_text(3, 500), random_text(4, 400)
    first[[10, 11, 200]] = -1
    contexts = random_contexts(5, random_text(3, 500))
    found = NgramCounts.of([first, second], TYPES).log_counts(contexts)
    wanted = expected([first.tolist(), second.tolist()], contexts)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_document_border_hides_what_stands_before_it():
    text = np.array([5, 6, EOS, EOS, 7, 8])
    contexts = np.array([[EOS, EOS, -1, -1], [7, EOS, -1, -1], [7, -1, -1, -1]])
    of_documents, of_one = (
        np.expm1(NgramCounts.of([text], TYPES, eos).log_counts(contexts)).round()
        for eos in (EOS, None)
    )
    assert of_documents[:, :2].tolist() == [[1, 0], [1, 0], [1, 0]]
    assert of_one[:, :2].tolist() == [[2, 1], [1, 1], [1, 0]]
    assert of_one[0, ORDERS : ORDERS + 2].tolist() == [2, 1]


def test_without_a_text_nothing_is_known():
    contexts = random_contexts(5, random_text(3, 500))
    assert not NgramCounts.of([np.array([], dtype=np.uint8)], TYPES).log_counts(contexts).any()
