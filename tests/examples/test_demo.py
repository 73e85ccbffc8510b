"""The whole demonstration at the size of a toy, with words in pieces."""

import json
import random
import re
import sys

import pytest
from helpers.commands import REPOSITORY, run

STEMS, ENDS = ["walk", "talk", "jump", "open", "play", "turn"], ["ing", "ed", "s", "er", ""]


@pytest.fixture
def texts(tmp_path):
    """Twenty documents, the fewest that are split by document."""
    rng = random.Random(1)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        lines = [
            " ".join(rng.choice(STEMS) + rng.choice(ENDS) for _ in range(rng.randint(4, 12))) + "."
            for _ in range(8)
        ]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_from_raw_text_to_a_table_with_words_in_pieces(texts, tmp_path):
    pytest.importorskip("sentencepiece")
    work = tmp_path / "work"
    done = run(
        sys.executable, REPOSITORY / "examples" / "sotu" / "demo.py", "--work", work,
        "--input", texts, "--bpe", 290, "--max-update", 10,
    )  # fmt: skip
    results = json.loads((work / "results.json").read_text())
    test, words = results["test"], (work / "text" / "test.txt").read_text(encoding="utf-8")
    text = re.sub(r"^ ", "", words.replace(" ", "").replace("▁", " "), flags=re.M)
    text = re.sub("<0x([0-9A-F]{2})>", lambda found: chr(int(found.group(1), 16)), text)
    assert test["bytes"] == len(text.encode())
    assert test["counted"] == len(text.split()) + text.count("\n") < test["tokens"]
    table = done.stdout[done.stdout.index("perplexity (lower is better)") :]
    of_words, of_pieces = re.findall(r"^  language model +[\d.]+ +([\d.]+)$", table, re.M)[:2]
    assert float(of_words) == pytest.approx(
        float(of_pieces) ** (test["tokens"] / test["counted"]), rel=0.02
    )
    assert "bits per byte of the text" in table
    assert (work / "report" / "report.html").exists() and (work / "passage.html").exists()
