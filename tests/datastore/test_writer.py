"""Writing: rows in their places, by one or several writers, and refusals before and during it."""

import contextlib
import errno
import os
import resource
import shutil

import numpy as np
import pytest
from helpers.small import contents, finish, flip_byte, make_datastore, random_keys, write_chunks
from helpers.writing import (
    COUNT,
    DIMENSION,
    JOURNAL,
    SIZES,
    fork,
    make_rows,
    open_writer,
    resume_and_finish,
)

from fairseq_knnlm.datastore import Datastore, DatastoreWriter, value_dtype
from fairseq_knnlm.datastore.manifest import KEYS, MANIFEST, SETTINGS
from fairseq_knnlm.errors import UserError

OTHER_JOURNAL = "building-2-of-2.journal.tmp"


@pytest.mark.parametrize(
    "vocabulary_size, dtype",
    [
        (1, "uint8"),
        (256, "uint8"),
        (257, "uint16"),
        (65536, "uint16"),
        (65537, "uint32"),
        (267744, "uint32"),
    ],
)
def test_values_take_the_smallest_type_that_holds_the_vocabulary(vocabulary_size, dtype, tmp_path):
    assert value_dtype(vocabulary_size) == np.dtype(dtype)
    values = np.array([0, vocabulary_size // 2, vocabulary_size - 1]).astype(dtype)
    path = make_datastore(tmp_path / "d", random_keys(1, 3, DIMENSION), values)
    read = Datastore.open(path).values
    assert read.dtype == np.dtype(dtype)
    assert read.tolist() == [0, vocabulary_size // 2, vocabulary_size - 1]


def test_the_least_vocabulary_that_can_be():
    assert value_dtype(0) == np.uint8
    with pytest.raises(UserError, match="^value_dtype: vocabulary_size must be a whole"):
        value_dtype(-1)


def test_rows_land_where_they_belong_in_any_order(finished, tmp_path):
    keys, values = make_rows()
    with open_writer(tmp_path / "d") as writer:
        for chunk in [3, 0, 5, 2, 4, 1]:
            write_chunks(writer, keys, values, SIZES, only=[chunk])
        finish(writer)
    assert contents(tmp_path / "d") == contents(finished)


def test_missing_chunks_keep_it_unfinished(tmp_path):
    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES, only=[0, 2, 5])
        with writer.finishing() as missing:
            assert missing.startswith("3 chunks")
    with pytest.raises(UserError, match="unfinished.* again"):
        Datastore.open(str(tmp_path / "d"))


# -- several writers -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [2, 3, 8])
def test_shards_give_the_bytes_of_one_writer(finished, tmp_path, num_shards):
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                open_writer(tmp_path / "d", options={"num_shards": num_shards, "shard_id": i})
            )
            for i in range(num_shards)
        ]
        for chunk in [4, 1, 5, 0, 3, 2]:
            write_chunks(writers[chunk % num_shards], *make_rows(), SIZES, only=[chunk])
        finish(writers[-1])
        with writers[0].finishing() as missing:
            assert missing is None
    assert contents(tmp_path / "d") == contents(finished)


def test_a_shard_sees_what_the_others_have_not_written(tmp_path):
    missing_first = "3 chunks, 1 shards not begun"
    for shard_id, mine, others in ((0, [0, 1, 2], missing_first), (1, [3, 4, 5], "")):
        options = {"num_shards": 2, "shard_id": shard_id}
        with open_writer(tmp_path / "d", options=options) as writer:
            write_chunks(writer, *make_rows(), SIZES, only=mine)
            with writer.finishing() as missing:
                assert missing == others


def test_a_shard_without_chunks_must_have_run_as_well(finished, tmp_path):
    """Else it would find a finished datastore, and fail, when its turn comes."""
    options = {"num_shards": 2, "shard_id": 1}
    with open_writer(tmp_path / "d", options=options) as writer:
        write_chunks(writer, *make_rows(), SIZES)
        with writer.finishing() as missing:
            assert missing == "0 chunks, 1 shards not begun"
    with open_writer(tmp_path / "d", options={**options, "shard_id": 0}) as writer:
        finish(writer)
    assert contents(tmp_path / "d") == contents(finished)


# -- refusing to write -----------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [np.inf, -np.inf, np.nan])
def test_a_key_that_is_not_finite_is_refused(tmp_path, broken):
    keys, values = make_rows()
    keys[SIZES[0] + 0, 3] = broken
    with open_writer(tmp_path / "d") as writer:
        with pytest.raises(UserError, match="not a number"):
            write_chunks(writer, keys, values, SIZES)
        assert writer.done == [0]


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write --knn-datastore .*file"):
        with open_writer(tmp_path / below):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write --knn-datastore .*Permission denied"):
        with open_writer(tmp_path):
            pass


@pytest.mark.parametrize(
    "in_the_way, fault", [(JOURNAL, "cannot write .*directory"), (SETTINGS, "is damaged")]
)
def test_a_writer_that_could_not_begin_holds_no_lock(tmp_path, in_the_way, fault):
    (tmp_path / "d").mkdir()
    in_the_way = tmp_path / "d" / in_the_way
    in_the_way.mkdir() if "cannot write" in fault else in_the_way.write_bytes(b"{")
    writer = open_writer(tmp_path / "d")
    with pytest.raises(UserError, match=fault):
        writer.__enter__()
    in_the_way.rmdir() if in_the_way.is_dir() else in_the_way.unlink()
    with open_writer(tmp_path / "d"):
        pass


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    needed = COUNT * (2 * DIMENSION + 1) + 2 * 128
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed + 999))
    with pytest.raises(
        UserError, match=r"needs about 4\.2 kB \(173 entries\), 1 byte more than its disk"
    ):
        with open_writer(tmp_path / "d", options={"index_bytes": 1000}):
            pass
    assert KEYS not in os.listdir(tmp_path / "d")
    with open_writer(tmp_path / "d", options={"index_bytes": 999}):
        pass


def test_a_disk_too_small_to_overwrite_leaves_what_is_there(copy, monkeypatch):
    before, usage = contents(copy), shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(UserError, match="needs about"):
        with open_writer(copy, options={"overwrite": True, "index_bytes": 10**6}):
            pass
    assert {name: contents(copy)[name] for name in before} == before
    with open_writer(copy, options={"overwrite": True}):
        pass  # what it replaces makes room enough


def write_until_full(path, limit_bytes, connection):
    with open_writer(path) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        try:
            write_chunks(writer, *make_rows(), SIZES)
        except UserError as error:
            connection.send((str(error), writer.done))


@pytest.mark.parametrize("whole_chunks, extra_bytes", [(0, 0), (2, 16), (4, 111)])
def test_a_disk_that_fills_up_keeps_what_is_written(finished, tmp_path, whole_chunks, extra_bytes):
    limit = 128 + sum(SIZES[:whole_chunks]) * 2 * DIMENSION + extra_bytes
    here, there = fork.Pipe()
    child = fork.Process(target=write_until_full, args=(tmp_path / "d", limit, there))
    child.start()
    message, done = here.recv()
    child.join()
    assert "run the same command again" in message
    assert done == list(range(whole_chunks))
    with pytest.raises(UserError, match="unfinished"):
        Datastore.open(str(tmp_path / "d"))
    resume_and_finish(tmp_path / "d", done)
    assert contents(tmp_path / "d") == contents(finished)


def test_what_does_not_reach_the_disk_is_not_finished(tmp_path, monkeypatch):
    """The journal is not enough: of what it names bytes may still be lost."""

    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(UserError, match="Input/output error; what is written so far"):
                with writer.finishing():
                    pass
        finish(writer)


def test_an_unfinished_journal_of_a_shard_does_not_count_as_begun(tmp_path):
    options = {"num_shards": 2, "shard_id": 0}
    with open_writer(tmp_path / "d", options=options) as writer:
        write_chunks(writer, *make_rows(), SIZES)
        shutil.copy(tmp_path / "d" / "building-1-of-2.journal", tmp_path / "d" / OTHER_JOURNAL)
        with writer.finishing() as missing:
            assert missing == "0 chunks, 1 shards not begun"


# -- arguments -------------------------------------------------------------------------------------

ARGUMENTS = {
    "path": "d",
    "settings": {},
    "chunk_sizes": [2, 0, 1],
    "dimension": 4,
    "dtype": np.uint8,
    "num_shards": 3,
    "shard_id": 2,
    "overwrite": True,
    "index_bytes": 10,
    "model_dimension": 8,
}


def test_arguments_that_can_be_are_taken(tmp_path):
    path = str(tmp_path / "d")
    DatastoreWriter(**{**ARGUMENTS, "path": path})
    numpy_arguments = {
        "chunk_sizes": np.array([2, 3]),
        "dimension": np.int64(4),
        "dtype": "uint16",
        "num_shards": np.int32(3),
        "shard_id": np.int64(1),
        "overwrite": False,
        "index_bytes": np.int64(0),
        "model_dimension": None,
    }
    with DatastoreWriter(**{**ARGUMENTS, "path": path, **numpy_arguments}) as writer:
        assert writer.count == 5 and writer.dimension == 4 and writer.value_dtype == np.uint16
    assert DatastoreWriter(path, {}, [], 4, np.uint8).count == 0


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("path", "", "a text that is not empty"),
        ("path", None, "a text that is not empty"),
        ("settings", [1], "a dict that JSON can hold"),
        ("settings", {"a": {1, 2}}, "a dict that JSON can hold"),
        ("settings", {"a": float("nan")}, "a dict that JSON can hold"),
        ("chunk_sizes", [3, -1], "a sequence of whole numbers >= 0"),
        ("chunk_sizes", [1.5], "a sequence of whole numbers >= 0"),
        ("chunk_sizes", 7, "a sequence of whole numbers >= 0"),
        ("chunk_sizes", "ab", "a sequence of whole numbers >= 0"),
        ("chunk_sizes", [[1], [2, 3]], "a sequence of whole numbers >= 0"),
        ("dimension", 0, "a whole number >= 1"),
        ("dimension", 2.0, "a whole number >= 1"),
        ("dimension", True, "a whole number >= 1"),
        ("dtype", np.int32, "an unsigned integer dtype"),
        ("dtype", "float32", "an unsigned integer dtype"),
        ("dtype", "no dtype", "an unsigned integer dtype"),
        ("num_shards", 0, "a whole number >= 1"),
        ("shard_id", 3, r"a whole number in \[0, 3\)"),
        ("shard_id", -1, r"a whole number in \[0, 3\)"),
        ("overwrite", "yes", "True or False"),
        ("index_bytes", -1, "a whole number >= 0"),
        ("index_bytes", 1.5, "a whole number >= 0"),
        ("model_dimension", 0, "a whole number >= 1, or None"),
    ],
)
def test_an_argument_that_cannot_be_is_named(tmp_path, monkeypatch, name, value, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"DatastoreWriter: {name} must be {expected}, got ") as e:
        DatastoreWriter(**{**ARGUMENTS, name: value})
    assert ";" not in str(e.value)
    assert os.listdir(tmp_path) == []


def test_all_arguments_that_cannot_be_are_named_at_once():
    with pytest.raises(UserError) as error:
        DatastoreWriter("", None, [-1], 0, "int8", 0, -1, None, -1, 0)
    for name in ARGUMENTS:
        assert f"{name} must be " in str(error.value)


@pytest.mark.parametrize(
    "chunk, keys, values, fault",
    [
        (6, (33, DIMENSION), (33,), "chunk must be in .0, 6.*, got 6"),
        (-1, (33, DIMENSION), (33,), "chunk must be in .0, 6.*, got -1"),
        (0, (39, DIMENSION), (40,), "rows 0 to 40 of keys.npy must be float16 of shape .40, 8."),
        (0, (40, DIMENSION + 1), (40,), "rows 0 to 40 of keys.npy"),
        (0, (40, DIMENSION), (41,), "rows 0 to 40 of values.npy must be uint8 of shape .40,."),
        (0, (40, DIMENSION), (40, 1), "rows 0 to 40 of values.npy"),
    ],
)
def test_rows_of_another_shape_are_refused(tmp_path, chunk, keys, values, fault):
    with open_writer(tmp_path / "d") as writer:
        with pytest.raises(UserError, match=fault):
            writer.write(chunk, np.zeros(keys, np.float16), np.zeros(values, np.uint8))
        assert writer.done == []


@pytest.mark.parametrize("keys, values", [(np.float32, np.uint8), (np.float16, np.int64)])
def test_rows_of_another_dtype_are_refused(tmp_path, keys, values):
    with open_writer(tmp_path / "d") as writer:
        with pytest.raises(UserError, match="must be .* got (float32|int64)"):
            writer.write(0, np.zeros((40, DIMENSION), keys), np.zeros(40, values))
        assert writer.done == []


def test_what_is_not_written_cannot_be_finished(tmp_path):
    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES, only=[0])
        with pytest.raises(UserError, match="5 chunks are missing"):
            writer.finish({})
    with pytest.raises(UserError, match="unfinished"):
        Datastore.open(str(tmp_path / "d"))


def test_what_a_manifest_may_not_say_is_not_written(finished, tmp_path):
    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES)
        with open(writer.index_path, "wb") as index:
            index.write(b"an index")
        with pytest.raises(UserError, match=f"{MANIFEST}.*index"):
            writer.finish({"factory": 3})
        assert MANIFEST not in os.listdir(tmp_path / "d")
        finish(writer)
    assert contents(tmp_path / "d") == contents(finished)


def test_keys_that_are_read_again_are_compared_with_what_was_written(tmp_path):
    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES[:3])
        with pytest.raises(UserError, match="3 chunks are missing"):
            writer.key_checks()
        keys, values = make_rows()
        write_chunks(writer, keys, values, SIZES)
        assert np.array_equal(writer.keys(), keys) and np.array_equal(writer.values(), values)
        writer.key_checks()(range(COUNT))
        flip_byte(tmp_path / "d" / KEYS, 128 + 2 * DIMENSION * SIZES[0])
        checks = writer.key_checks()
        checks(range(SIZES[0]))
        with pytest.raises(UserError, match=f"{KEYS} is damaged between bytes"):
            checks(np.array([SIZES[0]]))


def test_a_dtype_is_the_same_by_every_name(tmp_path):
    with open_writer(tmp_path / "d", dtype=np.uint8) as writer:
        write_chunks(writer, *make_rows(), SIZES, only=[0])
    for dtype in ("uint8", np.dtype("uint8"), "u1"):
        with open_writer(tmp_path / "d", dtype=dtype) as writer:
            assert writer.done == [0]
