"""Which files of a folder are text, and that it is said."""

import importlib.util
import re
from collections import Counter

import pytest
from fairseq.data import Dictionary
from fairseq.data.data_utils import post_process
from helpers.commands import REPOSITORY


@pytest.fixture(scope="module")
def prepare():
    path = REPOSITORY / "examples" / "sotu" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    for name in ("b.md", "a.txt", "README", ".hidden", "c.text"):
        (tmp_path / name).write_text(f"the text of {name}\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x00\x00")
    (tmp_path / "more").mkdir()
    return tmp_path


def test_texts_have_any_name(prepare, folder, capsys):
    documents = prepare.file_documents([folder])
    assert [document.name for document in documents] == ["README", "a", "b", "c"]
    assert documents[0].lines == ["the text of README"]
    printed = capsys.readouterr().out
    assert "4 file(s) of text: README, a.txt, b.md, c.text" in printed
    assert "left out, being no text: more/, picture.png" in printed


def test_many_files_are_counted_by_their_kind(prepare, tmp_path, capsys):
    for number in range(30):
        (tmp_path / f"{number:02}.{'md' if number < 10 else 'txt'}").write_text("text\n")
    assert len(prepare.file_documents([tmp_path])) == 30
    assert "30 file(s) of text: 20 *.txt, 10 *.md" in capsys.readouterr().out


def test_a_folder_without_text_is_refused(prepare, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x00")
    with pytest.raises(FileNotFoundError, match="no file of text in the folder"):
        prepare.file_documents([tmp_path])


def test_pieces_lose_nothing(prepare, tmp_path, capsys):
    """Every word of every split can be read again, also one of characters that train lacks."""
    pytest.importorskip("sentencepiece")
    train = ["the walker walked and the talker talked", "she walks and he talks", "they walk"] * 9
    splits = {
        "train": [prepare.Document("d", train)],
        "valid": [prepare.Document("d", ["they talk , \N{SNOWMAN} &amp; <unk>"])],
        "test": [],
    }
    prepare.write_pieces(tmp_path, splits, 300)
    for split, documents in splits.items():
        lines = (tmp_path / f"{split}.txt").read_text(encoding="utf-8").split("\n")[:-1]
        words = [post_process(line, "sentencepiece") for line in lines]
        raw = [re.sub("(<0x[0-9A-F]{2}>)+", _from_bytes, line) for line in words]
        assert raw == list(prepare.to_lines(documents))
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    counts = Counter((tmp_path / "train.txt").read_text(encoding="utf-8").split())
    found = dictionary.count[dictionary.nspecial :]  # pieces that train lacks come last
    assert [count for count in found if count] == sorted(counts.values(), reverse=True)
    assert found == sorted(found, reverse=True)
    for split in splits:
        symbols = (tmp_path / f"{split}.txt").read_text(encoding="utf-8").split()
        assert dictionary.unk() not in map(dictionary.index, symbols)
    assert re.search(r"valid +1 documents +\d+ words +\d+ pieces", capsys.readouterr().out)


def _from_bytes(found):
    return bytes.fromhex(found.group().replace("<0x", "").replace(">", "")).decode()


def test_another_encoding_is_refused_not_left_out(prepare, folder):
    (folder / "old.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="old.txt is not UTF-8 text"):
        prepare.file_documents([folder])
