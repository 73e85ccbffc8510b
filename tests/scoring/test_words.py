"""Words of several tokens, against the loop of ``fairseq-eval-lm``."""

import numpy as np
import pytest
import torch
from helpers.small import make_dictionary

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.scoring.words import continued_ids, log_probs_of_words, word_starts


def words_of_a_block(targets, scores, continued):
    """As ``fairseq_cli.eval_lm`` adds them up."""
    scores, skipped = list(scores), set()
    for i in range(len(targets) - 1):
        if targets[i] in continued:
            skipped.add(i)
            scores[i + 1] += scores[i]
    return [score for i, score in enumerate(scores) if i not in skipped]


@pytest.mark.parametrize("lengths", [[40], [7, 1, 13, 19], [0, 40], [40, 0]], ids=str)
def test_words_are_those_of_an_evaluation(lengths):
    rng = np.random.default_rng(1)
    targets, scores = rng.integers(10, size=40), -rng.exponential(3.0, size=40)
    continued = [1, 4, 5, 8]
    starts = word_starts(torch.from_numpy(targets), lengths, torch.tensor(continued))
    expected, done = [], 0
    for length in lengths:
        rows = slice(done, done + length)
        expected += words_of_a_block(targets[rows], scores[rows], continued)
        done = rows.stop
    np.testing.assert_allclose(log_probs_of_words(scores, starts), expected)
    assert log_probs_of_words(scores, starts).sum() == pytest.approx(scores.sum())


def test_tokens_that_go_on_are_those_with_the_marker():
    dictionary = make_dictionary(3)
    ids = [dictionary.add_symbol(word) for word in ("un@@", "@@un", "x@@y", "@@")]
    assert continued_ids(dictionary, "@@ ").tolist() == [ids[0], ids[3]]
    assert continued_ids(make_dictionary(3), "@@ ").tolist() == []


def test_what_an_evaluation_does_not_know_is_refused():
    with pytest.raises(UserError, match="--post-process must be one of .* got 'sentencepiece'"):
        continued_ids(make_dictionary(3), "sentencepiece")
