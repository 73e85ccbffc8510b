"""How many words of an input are unknown is said once, wherever the input comes from."""

import logging

import torch
from helpers.commands import USER_DIR, command, run
from helpers.small import make_dictionary

from fairseq_knnlm.hub import from_pretrained
from fairseq_knnlm.plugin.unknown_words import warn_of_unknown_words

DICTIONARY = make_dictionary(4)


def said(caplog, lines, words=None):
    sentences = [DICTIONARY.encode_line(line, add_if_not_exist=False).long() for line in lines]
    warn_of_unknown_words(DICTIONARY, sentences, words)
    return [record.getMessage() for record in caplog.records]


def test_known_words_are_not_worth_a_line(caplog):
    assert said(caplog, ["w1 w2", "w3"]) == []


def test_words_are_counted_without_the_ends_of_lines_and_padding(caplog):
    padding = torch.full((3,), DICTIONARY.pad())
    warn_of_unknown_words(DICTIONARY, [padding, torch.tensor([DICTIONARY.unk(), 4, 2])])
    (record,) = caplog.records
    assert "1 of 2 words of the input are not in the dictionary" in record.getMessage()


def test_the_first_different_ones_are_named(caplog):
    words = "a w1 a b \x1b[2J c d e f".split()
    (text,) = said(caplog, [" ".join(words)], words)
    assert "8 of 9 words" in text
    assert "(a b \N{REPLACEMENT CHARACTER}[2J c d ...)" in text


def test_the_hub_interface_says_it(data, checkpoints, caplog):
    path = checkpoints["plain"]
    lm = from_pretrained(path.parent, path.name, data, tokenizer="moses", moses_no_escape=True)
    with caplog.at_level(logging.WARNING):
        lm.score("w1 it's w2")
    assert "2 of 4 words of the input" in caplog.text  # it 's


def test_fairseq_interactive_says_it(data, checkpoints):
    done = run(
        command("fairseq-interactive"), data, "--path", checkpoints["plain"], "--cpu",
        "--user-dir", USER_DIR, "--task", "knnlm_lm", "--max-len-b", 8, "--tokenizer", "moses",
        "--moses-no-escape", input="w1 it's &\n",
    )  # fmt: skip
    assert "3 of 4 words of the input" in done.stdout
