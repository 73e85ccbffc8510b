#!/usr/bin/env python3
"""An n-gram model with interpolated modified Kneser-Ney smoothing, as an ARPA file for KenLM.

    ngram.py estimate TEXT ARPA --order 5     # count, discount, write
    ngram.py score TEXT ARPA OUTPUT           # log probabilities of every token, by KenLM, as .npz

Chen and Goodman (1999), section 5: three discounts at each order, of counts 1, 2 and 3 or more. The
text is one stream, as the transformer reads it: the end of a line is a word like others. Behind its
last word the text goes on with its first, so that every n-gram has a word before and behind it.
"""

import argparse
import os
import sys
from typing import NamedTuple

import numpy as np

LINE_END = "<eol>"
# KenLM takes <unk> for words that it has not seen; here it is a word that was counted.
RENAMED = {"<unk>": "<rare>"}
_ROWS = 1 << 16


class Order(NamedTuple):
    """All n-grams of one n, sorted by context and word.

    words (ndarray): shape (M, n), int32, numbers of words.
    probabilities (ndarray): shape (M,), p(last word | the others).
    backoffs (ndarray): shape (M,), weight of the shorter context where the n-gram is the context;
        ones for the highest order.
    """

    words: np.ndarray
    probabilities: np.ndarray
    backoffs: np.ndarray


class _Grams(NamedTuple):
    """The different n-grams: number of each one's context, last word and suffix among theirs."""

    contexts: np.ndarray
    words: np.ndarray
    suffixes: np.ndarray
    counts: np.ndarray


def read_stream(path):
    """The words of a text, the end of each line among them."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [RENAMED.get(word, word) for line in lines for word in (*line.split(), LINE_END)]


def estimate(words, types, order):
    """The model of a stream of words.

    Args:
        words (ndarray): shape (N,), int64, numbers of words in [0, types), each of which occurs.
        types (int): how many different words there are.
        order (int): the longest n-gram, >= 1.

    Returns:
        list of Order: for n = 1 to *order*.

    Raises:
        ValueError: if the text is too small to estimate discounts from.
    """
    grams = _count(words, types, order)
    orders, contexts, matrix = [], 1, np.empty((1, 0), np.int32)
    lower = np.array([1.0 / types])  # of order 0: every word alike
    for n, gram in enumerate(grams, start=1):
        # below the highest order what counts is in how many contexts an n-gram occurs
        counts = gram.counts if n == order else np.bincount(grams[n].suffixes)
        discounts = _discounts(counts, n)[np.minimum(counts, 3)]
        totals = np.bincount(gram.contexts, counts, contexts)
        backoffs = np.bincount(gram.contexts, discounts, contexts) / totals
        if orders:
            orders[-1] = orders[-1]._replace(backoffs=backoffs)
        probabilities = (counts - discounts) / totals[gram.contexts]
        probabilities += backoffs[gram.contexts] * lower[gram.suffixes]
        matrix = np.column_stack([matrix[gram.contexts], gram.words.astype(np.int32)])
        orders.append(Order(matrix, probabilities, np.ones(len(counts))))
        contexts, lower = len(counts), probabilities
    return orders


def _count(words, types, order):
    """``_Grams`` for n = 1 to *order*."""
    shorter = np.zeros(len(words), np.int64)  # number of the (n - 1)-gram that ends at each place
    found = []
    for _ in range(order):
        different, longer, counts = np.unique(
            np.roll(shorter, 1) * types + words, return_inverse=True, return_counts=True
        )
        suffixes = np.empty(len(different), np.int64)
        suffixes[longer] = shorter
        found.append(_Grams(different // types, different % types, suffixes, counts))
        shorter = longer
    return found


def _discounts(counts, n):
    """Discounts of counts 0 to 3, Chen and Goodman (1999), Eq. 26."""
    ones, twos, threes, fours = (np.count_nonzero(counts == count) for count in (1, 2, 3, 4))
    if not min(ones, twos, threes, fours):
        raise ValueError(
            f"the text is too small for modified Kneser-Ney: of the {n}-grams {ones}, {twos}, "
            f"{threes}, {fours} have counts 1, 2, 3, 4, and none may be 0; take a lower order"
        )
    y = ones / (ones + 2 * twos)
    found = np.array(
        [0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
    )
    if (found < 0).any():
        raise ValueError(f"the discounts of the {n}-grams are negative: {found[1:]}")
    return found


def write_arpa(path, orders, vocabulary):
    """Write a model as KenLM reads it.

    Args:
        orders (list of Order): from ``estimate``.
        vocabulary (list of str): the word of each number.
    """
    markers = ("<s>", "</s>")  # KenLM wants them there
    names = np.array(vocabulary, dtype=object)
    with open(path, "w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        for n, order in enumerate(orders, start=1):
            count = len(order.words) + (len(markers) if n == 1 else 0)
            file.write(f"ngram {n}={count}\n")
        for n, order in enumerate(orders, start=1):
            file.write(f"\n\\{n}-grams:\n")
            if n == 1:
                file.writelines(f"-99\t{marker}\t0\n" for marker in markers)
            for start in range(0, len(order.words), _ROWS):
                rows = slice(start, start + _ROWS)
                _write_rows(file, *(part[rows] for part in order), names, n < len(orders))
        file.write("\n\\end\\\n")


def _write_rows(file, words, probabilities, backoffs, names, has_backoffs):
    texts = map(" ".join, names[words])
    if has_backoffs:
        rows = zip(np.log10(probabilities), texts, np.log10(backoffs))
        file.writelines(f"{p:.6f}\t{text}\t{backoff:.6f}\n" for p, text, backoff in rows)
    else:
        rows = zip(np.log10(probabilities), texts)
        file.writelines(f"{p:.6f}\t{text}\n" for p, text in rows)


def score(words, model):
    """Log probabilities of a stream, its context running on, natural log.

    Args:
        words (list of str): the stream.
        model (kenlm.Model): read from an ARPA file.

    Returns:
        ndarray: shape (N,), float32.
    """
    import kenlm

    before, behind = kenlm.State(), kenlm.State()
    model.NullContextWrite(before)
    log10_p = np.empty(len(words), np.float64)
    for place, word in enumerate(words):
        log10_p[place] = model.BaseScore(before, word, behind)
        before, behind = behind, before
    return (log10_p * np.log(10)).astype(np.float32)


def run_estimate(args):
    """Estimate a model of a text and write it."""
    vocabulary, words = np.unique(np.array(read_stream(args.text)), return_inverse=True)
    orders = estimate(words, len(vocabulary), args.order)
    unfinished = f"{args.arpa}.tmp"
    write_arpa(unfinished, orders, vocabulary.tolist())
    os.replace(unfinished, args.arpa)
    counts = ", ".join(f"{len(order.words):,}" for order in orders)
    print(f"{len(words):,} tokens, {len(vocabulary):,} types; n-grams: {counts}")


def run_score(args):
    """Score a text and write the log probabilities."""
    import kenlm

    log_p = score(read_stream(args.text), kenlm.Model(args.arpa))
    np.savez(args.output, log_p=log_p)
    print(f"Perplexity: {np.exp(-log_p.mean(dtype=np.float64)):.2f} over {len(log_p):,} tokens")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    estimating = commands.add_parser("estimate", help="write the model of a text")
    scoring = commands.add_parser("score", help="log probabilities of a text")
    for command in (estimating, scoring):
        command.add_argument("text", help="one line a paragraph, words separated by spaces")
        command.add_argument("arpa", help="the model")
    estimating.add_argument("--order", type=int, default=5, help="longest n-gram (%(default)s)")
    estimating.set_defaults(run=run_estimate)
    scoring.add_argument("output", help="the .npz")
    scoring.set_defaults(run=run_score)
    return parser


def main():
    args = make_parser().parse_args()
    try:
        args.run(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"ngram.py: {error}")


if __name__ == "__main__":
    main()
