"""The bytes of a text of pieces, against fairseq's own way from pieces to text."""

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import post_process

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.scoring.text_bytes import TextBytes

SYMBOLS = {
    "sentencepiece": ["▁the", "▁caf", "é", "s", "▁", "▁x", "日本", "▁a▁b"],
    "@@ ": ["the", "caf@@", "é", "s", "x@@", "日本", "@@y"],
}


def make_text(form, seed, lines=60):
    """A dictionary, and lines of its tokens, some of them empty."""
    dictionary, rng = Dictionary(), np.random.default_rng(seed)
    ids = [dictionary.add_symbol(symbol) for symbol in SYMBOLS[form]]
    text = []
    for _ in range(lines):
        length = rng.integers(0, 6)
        line = rng.choice(ids, size=length).tolist()
        if form == "sentencepiece":  # as it cuts a line: a marker in front, words behind a lone one
            line = [ids[0], *(i for i in line if dictionary[i] != "▁")] if line else []
        elif line:  # nothing goes on beyond the line
            line.append(ids[0])
        text.append(line)
    return dictionary, text


@pytest.mark.parametrize("form", ["sentencepiece", "@@ ", "subword_nmt"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("part", [1, 7, 10**6])
def test_bytes_are_those_of_the_text(form, seed, part):
    dictionary, lines = make_text("@@ " if form == "subword_nmt" else form, seed)
    written = "".join(
        post_process(" ".join(dictionary[i] for i in line), form) + "\n" for line in lines
    )
    tokens = torch.tensor([i for line in lines for i in [*line, dictionary.eos()]])
    text = TextBytes(dictionary, form)
    for piece in tokens.split(part):
        text.add(piece)
    assert text.total == len(written.encode())


def test_a_byte_that_has_a_piece_of_its_own_is_one_byte():
    dictionary = Dictionary()
    ids = [dictionary.add_symbol(symbol) for symbol in ("▁", "<0xC3>", "<0xA9>", "<0xc3>")]
    text = TextBytes(dictionary, "sentencepiece")
    text.add(torch.tensor([*ids[:3], dictionary.eos()]))
    assert text.total == len("é\n".encode())
    text.add(torch.tensor([ids[3]]))  # no such piece: a word that looks like one
    assert text.total == len("é\n<0xc3>".encode())


@pytest.mark.parametrize("form", ["sentencepiece", "@@ "])
def test_unknown_words_have_no_number_of_bytes(form):
    dictionary, _ = make_text(form, 0)
    text = TextBytes(dictionary, form)
    text.add(torch.tensor([], dtype=torch.long))
    assert text.total == 0
    text.add(torch.tensor([5, dictionary.unk(), 6]))
    text.add(torch.tensor([5]))
    assert text.total is None


def test_another_form_is_refused():
    with pytest.raises(UserError, match="got 'letter'"):
        TextBytes(Dictionary(), "letter")
