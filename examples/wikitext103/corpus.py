#!/usr/bin/env python3
"""WikiText-103: downloads it and checks each file, or checks what fairseq-preprocess made of it.

    python examples/wikitext103/corpus.py text FOLDER [--archive FILE] [--url URL]
    python examples/wikitext103/corpus.py data DATA

Sizes and hashes are those that others publish for the archive of the corpus's authors (SHA-256 and
bytes: Hugging Face datasets; SHA-1 of the files: GluonNLP; lines: torchtext); the numbers of tokens
and types are those of the paper and of urvashik/knnlm. None of them is of our own making.
"""

import argparse
import hashlib
import os
import shutil
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

# The first host of the archive has closed it; this is a copy by one of its authors.
URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
ARCHIVE_BYTES = 190_229_076
ARCHIVE_SHA256 = "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"
# It turns Python's own name away.
USER_AGENT = "Mozilla/5.0"
TYPES = 267_744


class Split(NamedTuple):
    """What a split must be: its file, and what fairseq makes of it.

    lines (int): of the file, each with an end-of-line token.
    tokens (int): words and ends of lines.
    """

    sha1: str
    lines: int
    tokens: int


SPLITS = {
    "train": Split("b7497e2dfe77e72cfef5e3dbc61b7b53712ac211", 1_801_350, 103_227_021),
    "valid": Split("c326ac59dc587676d58c422eb8a03e119582f92b", 3_760, 217_646),
    "test": Split("8a5befc548865cec54ed4273cf87dbbad60d1e47", 4_358, 245_569),
}


def file_name(split):
    """Name of the file of a split."""
    return f"wiki.{split}.tokens"


def file_hash(path, kind):
    """Hash of a file, hexadecimal, by the algorithm *kind*."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def refuse_other(path, what, expected, found):
    """End the program unless a file is what it must be."""
    if found != expected:
        sys.exit(
            f"corpus.py: {path} is not WikiText-103's: {what} {found}, expected {expected}; remove "
            "it and try again, or take it from elsewhere (--url, --archive)"
        )


def download(url, path):
    """Fetch the archive to a file beside *path*, and move it there when it is whole."""
    unfinished = path.with_suffix(".part")
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    try:
        with urllib.request.urlopen(request) as answer, open(unfinished, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    except OSError as error:
        sys.exit(
            f"corpus.py: {url}: {error}; fetch wikitext-103-v1.zip on another machine or from "
            "elsewhere, and pass --archive FILE"
        )
    os.replace(unfinished, path)


def check_archive(path):
    """Refuse an archive that is not the published one, to the byte."""
    refuse_other(path, "size in bytes", ARCHIVE_BYTES, path.stat().st_size)
    refuse_other(path, "SHA-256", ARCHIVE_SHA256, file_hash(path, "sha256"))


def extract(archive, folder):
    """Take the three files out of the archive."""
    with zipfile.ZipFile(archive) as members:
        for split in SPLITS:
            path = folder / file_name(split)
            with members.open(f"wikitext-103/{path.name}") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def make_text(folder, archive, url):
    """Fetch the archive unless it is there, check it, unpack it, check what was in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if archive is None:
        archive = folder / "wikitext-103-v1.zip"
        if not archive.exists():
            print(f"downloading {url}", flush=True)
            download(url, archive)
    check_archive(archive)
    extract(archive, folder)
    for split, expected in SPLITS.items():
        path = folder / file_name(split)
        refuse_other(path, "SHA-1", expected.sha1, file_hash(path, "sha1"))
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-1 as published")


def check_data(folder):
    """Refuse data that does not have the published numbers of types, lines and tokens."""
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(folder / "dict.txt"))
    refuse_other(folder / "dict.txt", "types", TYPES, len(dictionary))
    for split, expected in SPLITS.items():
        dataset = data_utils.load_indexed_dataset(str(folder / split), dictionary)
        sizes = dataset.sizes  # of a file that is mapped as long as the dataset lives
        refuse_other(folder / split, "lines", expected.lines, len(sizes))
        refuse_other(folder / split, "tokens", expected.tokens, int(sizes.sum()))
        print(f"{split}: {len(sizes):,} lines, {expected.tokens:,} tokens, as published")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="download, check and unpack the three files")
    text.add_argument("folder", type=Path, metavar="FOLDER", help="where to")
    text.add_argument("--archive", type=Path, metavar="FILE", help="wikitext-103-v1.zip, if here")
    text.add_argument("--url", default=URL, help="where it is fetched from (%(default)s)")
    data = commands.add_parser("data", help="check what fairseq-preprocess made")
    data.add_argument("folder", type=Path, metavar="DATA")
    args = parser.parse_args()
    if args.command == "text":
        make_text(args.folder, args.archive, args.url)
    else:
        check_data(args.folder)


if __name__ == "__main__":
    main()
