"""Each chunk is verified once, by whoever needs it first, and nobody gets a damaged one."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.small import add_positions, flip_byte, make_datastore
from helpers.writing import COUNT, DIMENSION, SIZES, make_rows

from fairseq_knnlm.datastore import Datastore, row_checks
from fairseq_knnlm.datastore.manifest import INDEX, KEYS, MANIFEST, POSITIONS, VALUES, read_manifest
from fairseq_knnlm.datastore.row_checks import RowChecks
from fairseq_knnlm.errors import UserError

HEADER, ROW = 128, 2 * DIMENSION


@pytest.fixture
def counted(monkeypatch):
    """What is read to be verified: first byte and number of bytes of each range, in order."""
    ranges, read = [], row_checks.checksum_of_range

    def counting(file, first, count):
        ranges.append((first, count))
        return read(file, first, count)

    monkeypatch.setattr(row_checks, "checksum_of_range", counting)
    return ranges


def chunk_range(number):
    return HEADER + sum(SIZES[:number]) * ROW, SIZES[number] * ROW


@pytest.mark.parametrize(
    "rows, chunks",
    [
        ([0], [0]),
        ([39, 40], [0, 1]),
        ([COUNT - 1, 0, 0, COUNT - 1], [0, 5]),
        ([[41, 70], [-1, 66]], [2, 3]),
        ([-1], []),
        ([], []),
        (range(0, COUNT, 50), [0, 2, 3, 5]),
    ],
    ids=str,
)
def test_the_chunks_of_the_rows_are_read_and_no_others(finished, counted, rows, chunks):
    datastore = Datastore.open(finished)
    rows = rows if isinstance(rows, range) else np.array(rows, dtype=np.int64)
    datastore.check_rows(rows)
    assert sorted(counted) == [chunk_range(number) for number in chunks]
    datastore.check_rows(rows)
    assert len(counted) == len(chunks)  # each once
    datastore.check_rows(range(COUNT))
    datastore.check_rows(np.arange(COUNT))
    assert sorted(counted) == [chunk_range(number) for number in range(len(SIZES))]


def test_a_damaged_chunk_is_refused_and_others_are_not(copy):
    first, size = chunk_range(3)
    for byte in (first, first + size - 1):
        flip_byte(copy / KEYS, byte)
        datastore = Datastore.open(str(copy))
        datastore.check_rows(range(66))
        for _ in range(2):  # also when it is asked for again
            with pytest.raises(UserError, match=f"damaged between bytes {first} and") as error:
                datastore.check_rows(np.array([5, 66]))
        assert str(copy / KEYS) in str(error.value) and "build the datastore again" in str(
            error.value
        )
        datastore.check_rows(range(126, COUNT))
        flip_byte(copy / KEYS, byte)


def test_damage_is_not_looked_for_when_it_is_not_wanted(copy):
    for name in (KEYS, VALUES, INDEX):
        flip_byte(copy / name, 130)
    datastore = Datastore.open(str(copy), verify=False)
    datastore.check_rows(range(COUNT))
    assert len(datastore.values) == COUNT
    with datastore.reading_index() as path:
        assert path == str(copy / INDEX)


@pytest.mark.parametrize(
    "name, read",
    [
        (VALUES, lambda datastore: datastore.values),
        (VALUES, lambda datastore: datastore.text),
        (POSITIONS, lambda datastore: datastore.positions([3])),
        (INDEX, lambda datastore: datastore.reading_index().__enter__()),
    ],
)
def test_values_positions_and_index_are_verified_when_they_are_read(copy, name, read):
    add_positions(copy, range(COUNT))
    read(Datastore.open(str(copy)))
    flip_byte(copy / name, 140)
    datastore = Datastore.open(str(copy))
    with pytest.raises(UserError, match=f"{name} is damaged between bytes"):
        read(datastore)


def test_threads_verify_side_by_side_and_wait_for_each_other(finished, monkeypatch):
    """No chunk is read twice, and nobody goes on before what it needs is verified."""
    datastore = Datastore.open(finished)
    read, done, begun = row_checks.checksum_of_range, [], []
    two_at_a_time = threading.Barrier(2, timeout=10)

    def slow(file, first, count):
        begun.append(first)
        if len(begun) <= 2:
            two_at_a_time.wait()  # the second chunk begins before the first one ends
        result = read(file, first, count)
        done.append(first)
        return result

    monkeypatch.setattr(row_checks.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(row_checks, "checksum_of_range", slow)

    def check(_):
        datastore.check_rows(range(COUNT))
        return len(done)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(check, range(8))) == [len(SIZES)] * 8
    assert sorted(begun) == sorted(chunk_range(number)[0] for number in range(len(SIZES)))


def test_every_flipped_byte_is_found_when_it_is_read(copy):
    """As `verify` finds it, but by who reads."""
    rng = np.random.default_rng(5)
    reads = {
        KEYS: lambda datastore: datastore.check_rows(range(COUNT)),
        VALUES: lambda datastore: datastore.values,
        INDEX: lambda datastore: datastore.reading_index().__enter__(),
    }
    for name, read in reads.items():
        size = (copy / name).stat().st_size
        for position in {0, size - 1, *rng.integers(size, size=20).tolist()}:
            flip_byte(copy / name, position)
            with pytest.raises(UserError):
                read(Datastore.open(str(copy)))
            flip_byte(copy / name, position)


@pytest.mark.parametrize("damage", ["removed", "replaced"])
def test_what_changed_since_it_was_opened_is_refused_in_words(finished, copy, damage):
    datastore = Datastore.open(str(copy))
    with datastore.reading_index():
        pass
    if damage == "removed":
        (copy / MANIFEST).unlink()
    else:
        other = (copy / MANIFEST).read_bytes() + b" "
        (copy / MANIFEST).unlink()
        (copy / MANIFEST).write_bytes(other)
    with pytest.raises(UserError, match="was replaced or removed while it was read"):
        with datastore.reading_index():
            pass


def test_a_chunk_without_rows_is_never_read(tmp_path, counted):
    make_datastore(tmp_path / "d", *make_rows(), [0, 100, 0, 73, 0])
    datastore = Datastore.open(str(tmp_path / "d"))
    datastore.check_rows(np.array([99, 100]))
    assert len(counted) == 2
    datastore.check_rows(range(COUNT))
    assert len(counted) == 2


def checks_of_keys(path):
    """As `datastore.datastore` makes them, of the checksums in the manifest."""
    checksums = read_manifest(str(path))["chunks"][KEYS]
    shape, dtype = (COUNT, DIMENSION), np.dtype(np.float16)
    return RowChecks(str(path / KEYS), shape, dtype, np.cumsum(SIZES), checksums)


def test_all_rows_are_those_of_every_chunk(copy):
    checks_of_keys(copy).all_rows()
    first, size = chunk_range(5)
    flip_byte(copy / KEYS, first + size - 1)
    with pytest.raises(UserError, match=f"damaged between bytes {first} and {first + size - 1}:"):
        checks_of_keys(copy).all_rows()


def test_every_damaged_chunk_is_told(copy):
    assert list(checks_of_keys(copy).faults()) == []
    damaged = [chunk_range(number) for number in (1, 4)]
    for first, _ in damaged:
        flip_byte(copy / KEYS, first)
    assert list(checks_of_keys(copy).faults()) == [
        f"damaged between bytes {first} and {first + size - 1}" for first, size in damaged
    ]
