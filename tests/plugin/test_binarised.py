"""Damaged files of fairseq-preprocess: one message that names the file, whatever the damage is."""

import shutil

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import make_builder
from helpers.commands import NO_THREADS, build, call, evaluate, flags_of

from fairseq_knnlm.cli import tune
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin.binarised import refuse_damaged_split

TYPES = 20


@pytest.fixture
def prefix(tmp_path):
    """A split of four lines, as fairseq-preprocess writes it."""
    path = str(tmp_path / "valid")
    builder = make_builder(f"{path}.bin", "mmap", TYPES)
    for line in ([5, 6, 2], [2], [19, 0, 2], [7, 2]):
        builder.add_item(torch.tensor(line))
    builder.finalize(f"{path}.idx")
    return path


def replaced(path, edit):
    with open(path, "rb") as file:
        data = edit(file.read())
    with open(path, "wb") as file:
        file.write(data)


def flipped(place):
    return lambda data: bytes(b ^ 0xFF if i == place % len(data) else b for i, b in enumerate(data))


def test_what_was_written_is_accepted(prefix):
    refuse_damaged_split(prefix, TYPES)
    refuse_damaged_split(prefix + "1", TYPES)  # that there is none is said by the task


def test_a_token_that_the_dictionary_does_not_have(prefix):
    with pytest.raises(UserError, match=r"valid.bin: token 4 is 19, the dictionary has 19 types"):
        refuse_damaged_split(prefix, TYPES - 1)


def test_every_byte_of_an_index_counts(prefix):
    with open(f"{prefix}.idx", "rb") as file:
        data = file.read()
    for place in range(len(data)):
        replaced(f"{prefix}.idx", flipped(place))
        with pytest.raises(UserError, match=r"valid.idx"):
            refuse_damaged_split(prefix, TYPES)
        replaced(f"{prefix}.idx", lambda _: data)
    refuse_damaged_split(prefix, TYPES)


@pytest.mark.parametrize("ending", ["idx", "bin"])
def test_every_length_counts(prefix, ending):
    with open(f"{prefix}.{ending}", "rb") as file:
        data = file.read()
    for length in (*range(len(data)), len(data) + 1):
        replaced(f"{prefix}.{ending}", lambda _: (data + b"\0")[:length])  # noqa: B023
        with pytest.raises(UserError, match=rf"valid.{ending}"):
            refuse_damaged_split(prefix, TYPES)


def test_an_index_of_another_type_of_numbers(prefix):
    """Two bytes a token read as two bytes with a sign: nothing but the type differs."""
    replaced(f"{prefix}.idx", lambda data: data[:17] + bytes([3]) + data[18:])
    refuse_damaged_split(prefix, TYPES)
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.int16)
    tokens[2] = -1
    tokens.tofile(f"{prefix}.bin")
    with pytest.raises(UserError, match="token 2 is -1"):
        refuse_damaged_split(prefix, TYPES)


def test_one_half_of_a_split(prefix, tmp_path):
    shutil.move(f"{prefix}.idx", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"valid.idx is missing, its other half is there"):
        refuse_damaged_split(prefix, TYPES)
    shutil.move(f"{prefix}.bin", tmp_path / "elsewhere.bin")
    shutil.move(tmp_path / "elsewhere", f"{prefix}.idx")
    with pytest.raises(UserError, match=r"valid.bin is missing"):
        refuse_damaged_split(prefix, TYPES)


@pytest.mark.parametrize("impl", ["cached", "huffman"])
def test_other_formats_are_left_to_fairseq(tmp_path, impl):
    magic = {"cached": b"TNTIDX\x00\x00", "huffman": b"HUFFIDX\x00\x00"}[impl]
    (tmp_path / "valid.idx").write_bytes(magic + b"anything")
    (tmp_path / "valid.bin").write_bytes(b"else")
    refuse_damaged_split(str(tmp_path / "valid"), TYPES)


# -- the commands ----------------------------------------------------------------------------------

DAMAGE = {
    "no .idx": ("valid.idx", None, "valid.idx is missing"),
    "no .bin": ("valid.bin", None, "valid.bin is missing"),
    "an .idx that is cut": ("valid.idx", lambda data: data[:-1], "valid.idx is damaged"),
    "a .bin that is cut": ("valid.bin", lambda data: data[:-2], "bytes"),
    "a dictionary that is cut": ("dict.txt", lambda data: data[:3], "cannot be read as a dict"),
    "a dictionary that is no text": ("dict.txt", lambda data: b"\xff\xfe", "as a dictionary"),
    "fewer types": ("dict.txt", lambda data: data[: data.index(b"\n") + 1], "has 5 types"),
}


@pytest.mark.parametrize("name, edit, message", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("command", ["eval-lm", "build", "tune"])
def test_damaged_data(data, checkpoints, datastores, tmp_path, command, name, edit, message):
    copy, checkpoint = tmp_path / "bin", checkpoints["plain"]
    shutil.copytree(data, copy)
    if edit is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(edit((copy / name).read_bytes()))
    flags = ["--gen-subset", "valid", "--num-workers", 0]
    # Fewer types are refused by the datastore and the checkpoint, before the text is read.
    expected = f"{message}|dictionary|size mismatch" if name == "dict.txt" else message
    with pytest.raises((UserError, SystemExit, RuntimeError), match=expected) as error:
        if command == "eval-lm":
            evaluate(copy, checkpoint, *flags)
        elif command == "build":
            build(copy, checkpoint, tmp_path / "d", *flags)
        else:
            call(tune.main, *flags_of(copy, checkpoint, datastores["plain"], *flags, *NO_THREADS))
    assert not (tmp_path / "d").exists()
    assert isinstance(error.value, UserError) or name == "dict.txt"
