"""The files of keys and values while they are written: sizes, rows in place, checksums of them."""

import contextlib
import os
import zlib

import numpy as np
import pytest

from fairseq_knnlm.datastore.arrays import Arrays
from fairseq_knnlm.errors import UserError

LAYOUT = {"keys.npy": ((5, 3), np.dtype("<f2")), "values.npy": ((5,), np.dtype("<u1"))}


@pytest.fixture
def files(tmp_path):
    return Arrays(str(tmp_path), LAYOUT)


@pytest.mark.parametrize("before", [None, 10, 10_000], ids=["new", "shorter", "longer"])
def test_files_have_their_sizes_from_the_beginning(files, tmp_path, before):
    if before is not None:
        (tmp_path / "keys.npy").write_bytes(b"x" * before)
    files.allocate()
    sizes = [os.path.getsize(tmp_path / name) for name in LAYOUT]
    assert sum(sizes) == files.size_bytes == 2 * 128 + 5 * 3 * 2 + 5
    assert np.load(tmp_path / "keys.npy").shape == (5, 3)
    assert np.load(tmp_path / "values.npy").dtype == np.uint8


def test_rows_are_where_they_belong_and_stay_there(files, tmp_path):
    keys = np.arange(15, dtype="<f2").reshape(5, 3)
    files.allocate()
    with contextlib.ExitStack() as stack:
        files.open(stack)
        written = files.write("keys.npy", 2, keys[2:4])
        assert written == f"{zlib.crc32(keys[2:4].tobytes()):08x}"
        assert files.checksums(2, 4) == [written, f"{zlib.crc32(bytes(2)):08x}"]
        files.write("keys.npy", 4, keys[4:])
        files.sync()
    files.allocate()  # a build that goes on
    assert np.load(tmp_path / "keys.npy").tolist() == [[0] * 3, [0] * 3, *keys[2:].tolist()]
    assert isinstance(files.map("keys.npy"), np.memmap)


def test_a_transposed_array_is_written_row_by_row(files, tmp_path):
    keys = np.arange(15, dtype="<f2").reshape(3, 5).T
    files.allocate()
    with contextlib.ExitStack() as stack:
        files.open(stack)
        files.write("keys.npy", 0, keys)
    assert np.array_equal(np.load(tmp_path / "keys.npy"), keys)


@pytest.mark.parametrize(
    "rows", [np.zeros((3, 3), "<f2"), np.zeros((2, 2), "<f2"), np.zeros((2, 3), "<f4")]
)
def test_other_rows_are_refused(files, rows):
    files.check("keys.npy", 1, 3, np.zeros((2, 3), "<f2"))
    with pytest.raises(UserError, match=r"rows 1 to 3 of keys.npy must be float16 of shape \(2, 3"):
        files.check("keys.npy", 1, 3, rows)
