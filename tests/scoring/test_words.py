"""Words of several tokens, against the loop of ``fairseq-eval-lm``."""

import numpy as np
import pytest
import torch
from helpers.small import make_dictionary

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.scoring.words import Words, log_probs_of_words


def marked(continued=(), begins=(), count=6):
    """A dictionary in which tokens with these ids go on, or begin a word of sentencepiece."""
    dictionary = make_dictionary(0)
    for i in range(len(dictionary), len(dictionary) + count):
        word = f"w{i}"
        dictionary.add_symbol(f"{word}@@" if i in continued else f"▁{word}" * (i in begins) or word)
    return dictionary


def words_of_a_block(targets, scores, continued):
    """As ``fairseq_cli.eval_lm`` adds them up."""
    scores, skipped = list(scores), set()
    for i in range(len(targets) - 1):
        if targets[i] in continued:
            skipped.add(i)
            scores[i + 1] += scores[i]
    return [score for i, score in enumerate(scores) if i not in skipped]


@pytest.mark.parametrize("lengths", [[40], [7, 1, 13, 19], [0, 40], [40, 0]], ids=str)
@pytest.mark.parametrize("form", ["@@ ", "subword_nmt"])
def test_words_are_those_of_an_evaluation(lengths, form):
    rng = np.random.default_rng(1)
    targets, scores = rng.integers(4, 10, size=40), -rng.exponential(3.0, size=40)
    continued = [4, 7, 8]
    starts = Words(marked(continued), form).starts(torch.from_numpy(targets), lengths)
    expected, done = [], 0
    for length in lengths:
        rows = slice(done, done + length)
        expected += words_of_a_block(targets[rows], scores[rows], continued)
        done = rows.stop
    np.testing.assert_allclose(log_probs_of_words(scores, starts), expected)
    assert log_probs_of_words(scores, starts).sum() == pytest.approx(scores.sum())


@pytest.mark.parametrize(
    "text, lengths, starts",
    [
        ("a b$ a$", [5], [0, 2, 3, 4]),  # "▁a b </s> ▁a </s>": b goes on
        ("b$b a$", [5], [0, 1, 2, 3, 4]),  # behind </s> a word begins, marked or not
        ("a b b", [2, 1], [0, 2]),  # and where a block begins
        ("?b$", [3], [0, 2]),  # an unknown piece may be of any word
        ("$$", [2], [0, 1]),
        ("", [], []),
    ],
)
def test_pieces_of_sentencepiece(text, lengths, starts):
    dictionary = marked(begins=[4], count=2)  # a: ▁w4, b: w5
    ids = {"a": 4, "b": 5, "$": dictionary.eos(), "?": dictionary.unk()}
    targets = torch.tensor([ids[char] for char in text if char != " "], dtype=torch.long)
    lengths = lengths if sum(lengths) == len(targets) else [len(targets)]
    assert Words(dictionary, "sentencepiece").starts(targets, lengths).tolist() == starts


def test_a_marker_stands_at_the_end_of_a_token():
    dictionary = make_dictionary(0)
    ids = [dictionary.add_symbol(word) for word in ("un@@", "@@un", "x@@y", "@@")]
    targets = torch.tensor([ids[0], ids[1], ids[2], ids[3], ids[1]])
    assert Words(dictionary, "@@ ").starts(targets, [5]).tolist() == [0, 2, 3]


def test_another_form_is_refused():
    with pytest.raises(UserError, match="--remove-bpe .* must be one of .* got 'letter'"):
        Words(make_dictionary(3), "letter")
