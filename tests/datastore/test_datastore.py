"""Reading: every byte is verified, and every row finds its place in the text."""

import functools
import os
import shutil

import numpy as np
import pytest
from helpers.small import (
    FILES,
    add_positions,
    edit_manifest,
    finish,
    flip_byte,
    make_datastore,
    settings,
    write_chunks,
)
from helpers.writing import COUNT, DIMENSION, SIZES, make_rows, open_writer

from fairseq_knnlm import files
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.datastore.manifest import INDEX, KEYS, POSITIONS, VALUES
from fairseq_knnlm.errors import UserError


def test_what_was_written_is_read_back(finished):
    keys, values = make_rows()
    datastore = Datastore.open(finished)
    assert len(datastore) == COUNT and datastore.dimension == DIMENSION
    assert np.array_equal(datastore.keys, keys) and datastore.keys.dtype == np.float16
    assert np.array_equal(datastore.values, values)
    assert datastore.manifest["key"] == settings()["key"]
    assert list(datastore.verify()) == []
    assert sorted(os.listdir(finished)) == sorted(FILES)
    assert isinstance(datastore.keys, np.memmap) and isinstance(datastore.values, np.memmap)
    assert datastore.index_path == os.path.join(finished, INDEX)


def test_plain_numpy_opens_both_arrays(finished):
    keys, values = make_rows()
    for name, rows in ((KEYS, keys), (VALUES, values)):
        mapped = np.load(os.path.join(finished, name), mmap_mode="r")
        assert isinstance(mapped, np.memmap) and mapped.dtype == rows.dtype
        assert np.array_equal(mapped, rows)


def test_a_moved_datastore_opens(finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "elsewhere")
    assert np.array_equal(Datastore.open(str(moved)).keys, make_rows()[0])


def faults(path):
    """What is wrong when a datastore is opened and verified."""
    try:
        return list(Datastore.open(str(path)).verify())
    except UserError as error:
        return [str(error)]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_found(copy, name):
    size = os.path.getsize(copy / name)
    rng = np.random.default_rng(len(name))
    for position in {0, size - 1, *rng.integers(size, size=60).tolist()}:
        flip_byte(copy / name, position)
        damage = faults(copy)
        assert len(damage) == 1 and name in damage[0], f"byte {position} of {name}"
        flip_byte(copy / name, position)
    assert faults(copy) == []


@pytest.mark.parametrize("name, row_bytes", [(KEYS, 2 * DIMENSION), (VALUES, 1)])
def test_verify_names_the_damaged_range(copy, name, row_bytes):
    start = 128 + (SIZES[0] + SIZES[1]) * row_bytes
    stop = start + SIZES[2] * row_bytes
    for position in (start, stop - 1):
        flip_byte(copy / name, position)
        assert faults(copy) == [f"{name}: damaged between bytes {start} and {stop - 1}"]
        flip_byte(copy / name, position)
    flip_byte(copy / name, start - 1)
    flip_byte(copy / name, stop)
    assert len(faults(copy)) == 2


def test_verify_names_the_damaged_range_of_a_long_index(copy, monkeypatch):
    (copy / INDEX).write_bytes(bytes(range(25)))
    parts = [bytes(range(10)), bytes(range(10, 20)), bytes(range(20, 25))]
    entry = {"size_bytes": 25, "checksums": [files.checksum(part) for part in parts]}
    edit_manifest(copy, lambda manifest: manifest["files"].update({INDEX: entry}))
    monkeypatch.setattr(files, "SEGMENT_BYTES", 10)
    flip_byte(copy / INDEX, 21)
    assert list(Datastore.open(copy).verify()) == [f"{INDEX}: damaged between bytes 20 and 24"]


# -- rows and the text -----------------------------------------------------------------------------


def all_contexts(datastore, before=4, after=3):
    """By position in the text, what stands around each stored value."""
    positions = datastore.positions(range(len(datastore)))
    return {
        position: [side.tolist() for side in datastore.context(row, before, after)]
        for row, position in enumerate(positions.tolist())
    }


def reordered(path, rows):
    """A datastore of those rows of the small one, in that order, each with its position."""
    keys, values = make_rows()
    make_datastore(path, keys[rows], values[rows])
    add_positions(path, rows)
    return Datastore.open(str(path))


def test_without_positions_a_row_is_its_position(finished):
    datastore, (_, values) = Datastore.open(finished), make_rows()
    rows = [5, 0, COUNT - 1]
    assert datastore.positions(rows).tolist() == rows
    assert datastore.positions(rows).dtype == np.int64
    assert np.array_equal(datastore.text, values)
    before, after = datastore.context(20, 6, 2)
    assert before.tolist() == values[14:20].tolist()
    assert after.tolist() == values[21:23].tolist()


@pytest.mark.parametrize("rows", [[], np.array([], np.int64), np.array([7, 3], np.uint8)], ids=len)
def test_positions_are_int64_whatever_names_the_rows(finished, copy, rows):
    add_positions(copy, np.arange(COUNT)[::-1])
    for path, expected in ((finished, rows), (copy, [COUNT - 1 - row for row in rows])):
        positions = Datastore.open(str(path)).positions(rows)
        assert positions.tolist() == list(expected) and positions.dtype == np.int64


@pytest.mark.parametrize("rows, first", [([5, COUNT, -1], COUNT), ([0.5, 1.5], 0.5)])
def test_the_first_row_that_is_not_there_is_named(finished, rows, first):
    with pytest.raises(UserError, match=f"must be in .0, {COUNT}.*, got {first}$"):
        Datastore.open(finished).positions(rows)


def test_a_datastore_of_one_row(tmp_path):
    keys, values = make_rows()
    path = make_datastore(tmp_path / "d", keys[:1], values[:1])
    add_positions(path, [2])
    datastore = Datastore.open(path)
    assert datastore.text.tolist() == [-1, -1, values[0]]
    flip_byte(tmp_path / "d" / KEYS, 130)
    assert faults(path) == [f"{KEYS}: damaged between bytes 128 and {127 + 2 * DIMENSION}"]


def test_a_context_ends_with_the_text(finished):
    datastore, (_, values) = Datastore.open(finished), make_rows()
    assert isinstance(datastore.context(2, 8, 0), tuple)
    sides = [side.tolist() for side in datastore.context(2, 8, 0)]
    assert sides == [values[:2].tolist(), []]
    sides = [side.tolist() for side in datastore.context(COUNT - 1, 0, 8)]
    assert sides == [[], []]
    sides = [side.tolist() for side in datastore.context(0, COUNT, COUNT)]
    assert sides == [[], values[1:].tolist()]


@pytest.mark.parametrize(
    "rows",
    [np.arange(COUNT)[::-1], np.random.default_rng(3).permutation(COUNT)],
    ids=["reversed", "random"],
)
def test_rows_in_another_order_have_the_same_contexts(finished, tmp_path, rows):
    original, datastore = Datastore.open(finished), reordered(tmp_path / "d", rows)
    assert not np.array_equal(datastore.values, original.values)
    assert np.array_equal(datastore.positions(range(COUNT)), rows)
    assert np.array_equal(datastore.text, original.text)
    assert datastore.text.dtype == original.text.dtype
    assert all_contexts(datastore) == all_contexts(original)
    assert list(datastore.verify()) == []


def test_tokens_that_are_not_stored_are_left_out_of_a_context(tmp_path):
    rng = np.random.default_rng(4)
    rows = rng.permutation(COUNT)[: COUNT // 2]
    datastore, (_, values) = reordered(tmp_path / "d", rows), make_rows()
    stored = set(rows.tolist())
    for position, (before, after) in all_contexts(datastore, 6, 5).items():
        places = range(max(0, position - 6), position)
        assert before == [values[place] for place in places if place in stored]
        places = range(position + 1, min(position + 6, COUNT))
        assert after == [values[place] for place in places if place in stored]
    text = datastore.text
    assert len(text) == max(stored) + 1
    for place, token in enumerate(text.tolist()):
        assert token == (values[place] if place in stored else -1)
    assert list(datastore.verify()) == []


def test_no_token_is_taken_for_one_that_is_not_stored(tmp_path):
    """The largest value of its dtype is a token as any other."""
    values = np.array([255, 0, 255, 254], dtype=np.uint8)
    make_datastore(tmp_path / "d", make_rows()[0][:4], values)
    add_positions(tmp_path / "d", [0, 2, 5, 6])
    datastore = Datastore.open(str(tmp_path / "d"))
    assert datastore.text.tolist() == [255, -1, 0, -1, -1, 255, 254]
    assert [side.tolist() for side in datastore.context(2, 3, 3)] == [[0], [254]]
    assert [side.tolist() for side in datastore.context(2, 2, 0)] == [[], []]


@pytest.mark.parametrize(
    "arguments, fault",
    [
        ((-1, 1, 1), "must be in .0, 173.*, got -1"),
        ((COUNT, 1, 1), f"must be in .0, {COUNT}.*, got {COUNT}"),
        ((1.5, 1, 1), "got 1.5"),
        ((0, -1, 1), "must be >= 0, got -1 and 1"),
        ((0, 1, -1), "must be >= 0, got 1 and -1"),
    ],
)
def test_a_context_that_cannot_be_is_refused(finished, arguments, fault):
    with pytest.raises(UserError, match=fault):
        Datastore.open(finished).context(*arguments)


@pytest.mark.parametrize("positions", [[0, *range(COUNT - 1)], [-1, *range(COUNT - 1)]])
def test_positions_that_cannot_be_are_refused(copy, positions):
    add_positions(copy, positions)
    datastore = Datastore.open(str(copy))
    with pytest.raises(UserError, match="positions.npy does not name one place"):
        datastore.context(3, 1, 1)


def test_a_file_of_positions_is_checked_as_the_others(copy):
    whole = copy.parent / "whole"
    shutil.copytree(copy, whole)
    add_positions(whole, range(COUNT))

    def damaged(damage):
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        damage(copy / POSITIONS)
        return faults(copy)

    size = os.path.getsize(whole / POSITIONS)
    assert damaged(lambda path: None) == []
    assert "is missing" in damaged(os.remove)[0]
    assert f"has {size - 8} bytes" in damaged(lambda path: os.truncate(path, size - 8))[0]
    other = np.zeros(COUNT, dtype=np.uint64)
    assert "is no int64 array" in damaged(lambda path: np.save(path, other))[0]
    for position in (0, 128, 128 + 8 * 7, size - 1):
        (line,) = damaged(functools.partial(flip_byte, position=position))
        assert POSITIONS in line, position


def test_a_file_of_positions_that_the_manifest_does_not_name_is_not_read(copy, finished):
    np.save(copy / POSITIONS, np.arange(COUNT)[::-1])
    assert all_contexts(Datastore.open(str(copy))) == all_contexts(Datastore.open(finished))


# -- the dimension of the model --------------------------------------------------------------------


def test_the_dimension_of_the_model_is_that_of_the_keys(finished):
    datastore = Datastore.open(finished)
    assert datastore.manifest["model_dimension"] == datastore.model_dimension == DIMENSION


def test_the_dimension_of_the_model_may_be_another(tmp_path):
    with open_writer(tmp_path / "d", options={"model_dimension": 3 * DIMENSION}) as writer:
        write_chunks(writer, *make_rows(), SIZES)
        finish(writer)
    datastore = Datastore.open(str(tmp_path / "d"))
    assert (datastore.dimension, datastore.model_dimension) == (DIMENSION, 3 * DIMENSION)
    assert datastore.keys.shape == (COUNT, DIMENSION)


def test_a_datastore_of_before_opens_and_verifies(copy):
    """Its manifest has no dimension of the model."""
    edit_manifest(copy, lambda manifest: manifest.pop("model_dimension"))
    datastore = Datastore.open(str(copy))
    assert "model_dimension" not in datastore.manifest
    assert datastore.model_dimension == datastore.dimension == DIMENSION
    assert list(datastore.verify()) == []
