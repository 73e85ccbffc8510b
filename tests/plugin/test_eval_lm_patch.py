"""fairseq-eval-lm with our scorer in its place: what it counts, and that stock is stock again."""

import logging
import math
import shutil

import pytest
from fairseq.sequence_scorer import SequenceScorer
from fairseq_cli import eval_lm
from helpers.commands import evaluate


def test_remove_bpe_counts_words_as_stock_does(data, checkpoints, datastores, tmp_path):
    pieces = tmp_path / "bin"
    shutil.copytree(data, pieces)
    lines = (data / "dict.txt").read_text().splitlines()
    marked = [line.replace(" ", "@@ ", 1) if i % 3 == 0 else line for i, line in enumerate(lines)]
    (pieces / "dict.txt").write_text("\n".join(marked) + "\n")
    stock = evaluate(pieces, checkpoints["plain"], "--remove-bpe", "@@ ", task="language_modeling")
    assert evaluate(pieces, checkpoints["plain"], "--remove-bpe", "@@ ") == pytest.approx(
        stock, rel=1e-5
    )
    assert stock > 1.5 * evaluate(pieces, checkpoints["plain"])


def test_lambda_1_counts_impossible_targets(data, checkpoints, datastores, caplog):
    with caplog.at_level(logging.WARNING):
        found = evaluate(
            data, checkpoints["adaptive"], "--knn-datastore", datastores["adaptive"],
            "--knn-k", 1, "--knn-lambda", 1, "--output-word-probs",
        )  # fmt: skip
    assert found == math.inf
    assert "perplexity is infinite" in caplog.text


def test_lambda_1_is_finite_where_every_target_has_a_neighbour(data, checkpoints, datastores):
    flags = ["--gen-subset", "train", "--knn-datastore", datastores["adaptive"]]
    # many keys at the start of a block are the same: the state after one word
    found = evaluate(data, checkpoints["adaptive"], *flags, "--knn-k", 400, "--knn-lambda", 1)
    assert 1.0 <= found < math.inf


def test_a_share_alone_says_that_it_is_one(data, checkpoints, caplog):
    evaluate(data, checkpoints["plain"], "--num-shards", 2, "--shard-id", 1)
    assert "one process of 2" in caplog.text and "share 1 alone" in caplog.text
    caplog.clear()
    evaluate(data, checkpoints["plain"])
    assert "one process of" not in caplog.text


def test_a_stock_evaluation_afterwards_is_stock_again(data, checkpoints, datastores):
    stock_function = eval_lm.eval_lm
    evaluate(data, checkpoints["plain"], "--knn-datastore", datastores["plain"], "--knn-k", 8)
    assert eval_lm.eval_lm is stock_function
    assert eval_lm.SequenceScorer is SequenceScorer
