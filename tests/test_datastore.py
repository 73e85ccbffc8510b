"""What is on disk: whole or refused, and the same bytes however often the writer was killed."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal

import numpy as np
import pytest
from helpers import (
    FILES,
    contents,
    finish,
    flip_byte,
    make_datastore,
    random_keys,
    random_values,
    settings,
    write_chunks,
)

from fairseq_knnlm.datastore import INDEX, KEYS, MANIFEST, VALUES, Datastore
from fairseq_knnlm.datastore_writer import DatastoreWriter, refuse_finished, value_dtype
from fairseq_knnlm.errors import UserError

SIZES = [40, 1, 25, 60, 14, 33]
COUNT, DIMENSION = sum(SIZES), 8
VOCABULARY = 200
JOURNAL = "building-1-of-1.journal"

fork = multiprocessing.get_context("fork")


def make_rows():
    return random_keys(1, COUNT, DIMENSION), random_values(1, COUNT, VOCABULARY)


def open_writer(path, chunk_sizes=SIZES, dtype=np.uint8, options=None, **changed):
    return DatastoreWriter(
        str(path), settings(**changed), chunk_sizes, DIMENSION, dtype, **(options or {})
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A datastore that nothing disturbed."""
    return make_datastore(tmp_path_factory.mktemp("finished") / "d", *make_rows(), SIZES)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(finished, tmp_path / "copy")


def resume_and_finish(path, expected_done, **options):
    """Go on with a datastore; only what is not done is written again."""
    with open_writer(path, options=options) as writer:
        assert sorted(writer.done) == expected_done
        write_chunks(writer, *make_rows(), SIZES)
        finish(writer)


def begin(path, chunks):
    """Leave a datastore of which only *chunks* are written."""
    with open_writer(path) as writer:
        write_chunks(writer, *make_rows(), SIZES, only=chunks)


# -- reading what was written ----------------------------------------------------------------------


def test_what_was_written_is_read_back(finished):
    keys, values = make_rows()
    datastore = Datastore.open(finished)
    assert len(datastore) == COUNT and datastore.dimension == DIMENSION
    assert np.array_equal(datastore.keys, keys) and datastore.keys.dtype == np.float16
    assert np.array_equal(datastore.values, values)
    assert datastore.manifest["key"] == settings()["key"]
    assert list(datastore.verify()) == []
    assert sorted(os.listdir(finished)) == sorted(FILES)


def test_plain_numpy_opens_both_arrays(finished):
    keys, values = make_rows()
    for name, rows in ((KEYS, keys), (VALUES, values)):
        mapped = np.load(os.path.join(finished, name), mmap_mode="r")
        assert isinstance(mapped, np.memmap) and mapped.dtype == rows.dtype
        assert np.array_equal(mapped, rows)


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


def test_rows_land_where_they_belong_in_any_order(finished, tmp_path):
    keys, values = make_rows()
    with open_writer(tmp_path / "d") as writer:
        for chunk in [3, 0, 5, 2, 4, 1]:
            write_chunks(writer, keys, values, SIZES, only=[chunk])
        finish(writer)
    assert contents(tmp_path / "d") == contents(finished)


def test_a_moved_datastore_opens(finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "elsewhere")
    assert np.array_equal(Datastore.open(str(moved)).keys, make_rows()[0])


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[], [0], [0, 1, 2], [1, 4], list(range(6))])
def test_resumed_is_byte_identical(finished, tmp_path, chunks):
    begin(tmp_path / "d", chunks)
    resume_and_finish(tmp_path / "d", chunks)
    assert contents(tmp_path / "d") == contents(finished)


@pytest.mark.parametrize("left", range(1, 9))
def test_a_torn_journal_line_does_not_count(finished, tmp_path, left):
    begin(tmp_path / "d", [0, 1, 2])
    journal = tmp_path / "d" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-left])
    resume_and_finish(tmp_path / "d", [0, 1])
    assert contents(tmp_path / "d") == contents(finished)


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 30, b"7 deadbeef\n", b"99 00000000 00000000\n", b"\xff\n"]
)
def test_garbage_in_the_journal_does_not_count(finished, tmp_path, garbage):
    begin(tmp_path / "d", [0, 1])
    with open(tmp_path / "d" / JOURNAL, "ab") as journal:
        journal.write(garbage)
    resume_and_finish(tmp_path / "d", [0, 1])
    assert contents(tmp_path / "d") == contents(finished)


@pytest.mark.parametrize("name", [KEYS, VALUES])
def test_a_damaged_chunk_is_written_again(finished, tmp_path, name):
    begin(tmp_path / "d", [0, 1, 2, 3])
    array = np.load(tmp_path / "d" / name, mmap_mode="r+")
    array[SIZES[0] + SIZES[1] + 3] += 1  # in chunk 2
    array.flush()
    del array
    resume_and_finish(tmp_path / "d", [0, 1, 3])
    assert contents(tmp_path / "d") == contents(finished)


@pytest.mark.parametrize("name", [KEYS, VALUES])
@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 150)])
def test_a_lost_or_cut_file_is_written_again(finished, tmp_path, name, damage):
    begin(tmp_path / "d", [0, 1, 2, 3])
    damage(tmp_path / "d" / name)
    with open_writer(tmp_path / "d") as writer:
        assert 3 not in writer.done
        write_chunks(writer, *make_rows(), SIZES)
        finish(writer)
    assert contents(tmp_path / "d") == contents(finished)


def die_after(path, calls):
    """Write a datastore, and be killed before the *calls*-th change of a file on the disk."""

    def counted(function):
        def wrapper(*arguments, **options):
            nonlocal calls
            calls -= 1
            if calls < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    from fairseq_knnlm import datastore, datastore_writer

    for module, names in (
        (os, ["replace", "remove", "makedirs", "open", "fsync"]),
        (datastore, ["open"]),
        (datastore_writer, ["open", "_write_all"]),
        (shutil, ["rmtree"]),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name, open)))
    with open_writer(path) as writer:
        write_chunks(writer, *make_rows(), SIZES)
        finish(writer)


def test_killed_at_every_step_and_resumed_it_is_byte_identical(finished, tmp_path):
    expected, kills = contents(finished), 0
    while True:
        path = tmp_path / str(kills)
        child = fork.Process(target=die_after, args=(path, kills))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        if not (path / MANIFEST).exists():
            with pytest.raises(UserError):
                Datastore.open(str(path))
            with open_writer(path) as writer:
                write_chunks(writer, *make_rows(), SIZES)
                finish(writer)
        assert {name: contents(path)[name] for name in FILES} == expected
        shutil.rmtree(path)
    assert kills > 30


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


def test_another_index_keeps_the_keys(tmp_path):
    begin(tmp_path / "d", [0, 1, 2])
    (tmp_path / "d" / "index.building").mkdir()
    with open_writer(tmp_path / "d", index={"factory": "IVF4,PQ4"}) as writer:
        assert writer.done == [0, 1, 2]
        assert not os.path.exists(writer.work_path)
    with pytest.raises(UserError, match="other settings .*metric"):
        with open_writer(tmp_path / "d", index={"factory": "Flat"}, metric="ip"):
            pass


@pytest.mark.parametrize("name", [KEYS, MANIFEST])
def test_overwrite_leaves_what_is_not_ours(tmp_path, name):
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(UserError, match=f"has {name}, but no .* of ours"):
        with open_writer(tmp_path, options={"overwrite": True}):
            pass
    assert (tmp_path / name).read_text() == "somebody's"


def test_shards_resume_by_themselves(finished, tmp_path):
    for chunks in ([0], [1, 2], [3]):
        with open_writer(tmp_path / "d", options={"num_shards": 2, "shard_id": 0}) as writer:
            write_chunks(writer, *make_rows(), SIZES, only=chunks)
    with open_writer(tmp_path / "d", options={"num_shards": 2, "shard_id": 1}) as writer:
        assert writer.done == []
        write_chunks(writer, *make_rows(), SIZES, only=[4, 5])
        finish(writer)
    assert contents(tmp_path / "d") == contents(finished)


def hold(path, options, connection):
    with open_writer(path, options=options) as writer:
        write_chunks(writer, *make_rows(), SIZES, only=[0, 1])
        connection.send("at work")
        connection.recv()


@contextlib.contextmanager
def builder_at_work(path, **options):
    """Another process that has begun to write."""
    here, there = fork.Pipe()
    child = fork.Process(target=hold, args=(path, options, there), daemon=True)
    child.start()
    assert here.recv() == "at work"
    try:
        yield child
    finally:
        child.kill()
        child.join()


def test_a_second_builder_is_refused_until_the_first_is_dead(finished, tmp_path):
    with builder_at_work(tmp_path / "d"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="another builder at work"):
                with open_writer(tmp_path / "d", options={"overwrite": overwrite}):
                    pass
    resume_and_finish(tmp_path / "d", [0, 1])
    assert contents(tmp_path / "d") == contents(finished)


def test_nobody_overwrites_what_a_shard_is_writing(tmp_path):
    with builder_at_work(tmp_path / "d", num_shards=2, shard_id=1):
        before = contents(tmp_path / "d")[KEYS]
        with pytest.raises(UserError, match="another builder at work"):
            with open_writer(tmp_path / "d", options={"overwrite": True}):
                pass
        assert contents(tmp_path / "d")[KEYS] == before


def test_two_builders_do_not_wait_for_each_other_to_build_the_index(tmp_path):
    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES)
        with writer.finishing():
            with pytest.raises(UserError, match="another builder at work"):
                with open_writer(tmp_path / "d"):
                    pass


# -- refusing to write -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, sides",
    [
        ({"metric": "ip"}, ['metric was "l2", is "ip"']),
        ({"key": {"type": "output", "layer": 0}}, ["ffn-input", "output"]),
        ({"model": {"sha256": "f" * 64, "parameters": 9}}, ["model was", "aaa", "fff"]),
        ({"options": {"num_shards": 2}}, ["num_shards was 1, is 2"]),
        ({"dtype": np.uint16}, ["uint8", "uint16"]),
    ],
)
def test_other_settings_than_it_was_begun_with_are_refused(tmp_path, changed, sides):
    begin(tmp_path / "d", [0, 1])
    before = contents(tmp_path / "d")
    with pytest.raises(UserError, match="--overwrite") as caught:
        with open_writer(tmp_path / "d", **changed):
            pass
    assert all(side in str(caught.value) for side in sides)
    after = contents(tmp_path / "d")
    assert {name: after[name] for name in before} == before


def test_other_text_than_it_was_begun_with_is_refused(tmp_path):
    begin(tmp_path / "d", [0, 1])
    longer, cut_elsewhere = [*SIZES[:-1], SIZES[-1] + 1], [SIZES[0] + 1, *SIZES[2:]]
    for chunk_sizes, fault in (
        (longer, f"count was {COUNT}, is {COUNT + 1}"),
        (cut_elsewhere, "chunks was"),
    ):
        with pytest.raises(UserError, match=fault):
            with open_writer(tmp_path / "d", chunk_sizes=chunk_sizes):
                pass
    resume_and_finish(tmp_path / "d", [0, 1])


def test_settings_that_are_dropped_are_named(tmp_path):
    with open_writer(tmp_path / "d", extra=7):
        pass
    with pytest.raises(UserError, match="extra was 7"):
        with open_writer(tmp_path / "d"):
            pass


def test_a_finished_datastore_is_refused_and_stays_untouched(finished):
    before = contents(finished)
    times = {name: os.stat(os.path.join(finished, name)).st_mtime_ns for name in before}
    with pytest.raises(UserError, match="finished datastore; pass --overwrite"):
        with open_writer(finished):
            pass
    with pytest.raises(UserError, match="finished datastore"):
        refuse_finished(finished)
    assert contents(finished) == before
    assert {name: os.stat(os.path.join(finished, name)).st_mtime_ns for name in before} == times


@pytest.mark.parametrize("state", ["finished", "unfinished", "of two shards"])
def test_overwrite_starts_anew(finished, copy, tmp_path, state):
    path = copy
    if state != "finished":
        path = tmp_path / "d"
        options = {"num_shards": 2} if state == "of two shards" else {}
        with open_writer(path, options=options, metric="ip") as writer:
            write_chunks(writer, *make_rows(), SIZES, only=[0])
    (path / "notes.txt").write_text("mine")
    keys, values = make_rows()
    with open_writer(path, options={"overwrite": True}) as writer:
        assert writer.done == []
        with pytest.raises(UserError):
            Datastore.open(str(path))
        write_chunks(writer, keys[::-1], values, SIZES)
        finish(writer)
    assert np.array_equal(Datastore.open(str(path)).keys, keys[::-1])
    assert sorted(os.listdir(path)) == sorted([*FILES, "notes.txt"])


def test_a_build_touches_only_its_own_files(finished, copy):
    others = {"building_notes.txt", "my.journal", "building-site.lock"}
    for name in others:
        (copy / name).write_text("somebody else's")
    before = contents(copy)
    with pytest.raises(UserError, match="finished datastore"):
        with open_writer(copy):
            pass
    assert contents(copy) == before
    with open_writer(copy, options={"overwrite": True}):
        pass
    assert others < set(os.listdir(copy))


def test_files_of_somebody_else_are_not_touched(tmp_path):
    np.save(tmp_path / KEYS, np.arange(3))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="keys.npy.*not begun by this tool"):
        with open_writer(tmp_path):
            pass
    assert contents(tmp_path)[KEYS] == before[KEYS]


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


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    needed = COUNT * (2 * DIMENSION + 1) + 2 * 128
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed + 999))
    with pytest.raises(
        UserError, match=rf"needs about {needed + 1000:,} bytes .*{needed + 999:,} free"
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


# -- refusing to read ------------------------------------------------------------------------------


def test_what_is_no_datastore_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        Datastore.open(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no datastore: it has no manifest.json"):
        Datastore.open(str(tmp_path))


@pytest.mark.parametrize("name", [KEYS, VALUES, INDEX])
def test_a_file_of_another_size_is_refused(copy, name):
    size = os.path.getsize(copy / name)
    for other in (size - 1, 0, size + 1):
        os.truncate(copy / name, other)
        with pytest.raises(UserError, match=f"{name} has {other} bytes .* manifest says {size}"):
            Datastore.open(str(copy))


@pytest.mark.parametrize("name", [KEYS, VALUES, INDEX])
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Datastore.open(str(copy))


@pytest.mark.parametrize("name, size", [(KEYS, 2 * DIMENSION * COUNT), (VALUES, COUNT)])
def test_another_array_of_the_same_size_is_refused(copy, name, size):
    before = os.path.getsize(copy / name)
    np.save(
        copy / name,
        np.zeros(size // 2 if name == KEYS else size, dtype="i2" if name == KEYS else "i1"),
    )
    assert os.path.getsize(copy / name) == before
    with pytest.raises(UserError, match=f"{name} is no .* array of shape"):
        Datastore.open(str(copy))


def test_an_edited_manifest_is_refused(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    for name, value in (("count", COUNT - 1), ("metric", "ip"), ("added", 1)):
        (copy / MANIFEST).write_text(
            json.dumps({**manifest, name: value}, indent=1, sort_keys=True)
        )
        with pytest.raises(UserError, match="damaged or was edited"):
            Datastore.open(str(copy))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\xff\xfe"])
def test_a_broken_manifest_is_refused(copy, text):
    (copy / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        Datastore.open(str(copy))


def test_another_format_is_refused_by_its_number(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(UserError, match="format version 2, this release reads version 1"):
        Datastore.open(str(copy))


def faults(path):
    """What is found when a datastore is opened and verified."""
    try:
        return list(Datastore.open(str(path)).verify())
    except UserError as error:
        return [str(error)]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_found(copy, name):
    size = os.path.getsize(copy / name)
    chance = np.random.default_rng(len(name))
    for position in {0, size - 1, *chance.integers(size, size=60).tolist()}:
        flip_byte(copy / name, position)
        found = faults(copy)
        assert len(found) == 1 and name in found[0], f"byte {position} of {name}"
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
    from fairseq_knnlm import datastore, datastore_writer

    monkeypatch.setattr(datastore, "SEGMENT_BYTES", 10)
    (copy / INDEX).write_bytes(bytes(range(25)))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][INDEX] = {
        "size_bytes": 25, "checksums": datastore_writer.file_checksums(copy / INDEX),
    }  # fmt: skip
    (copy / MANIFEST).write_bytes(datastore.render(manifest))
    flip_byte(copy / INDEX, 21)
    assert list(Datastore.open(copy).verify()) == [f"{INDEX}: damaged between bytes 20 and 24"]
