"""A build in progress: killed anywhere it goes on to the same bytes, and touches only its own."""

import contextlib
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.small import FILES, contents, finish, write_chunks
from helpers.writing import (
    COUNT,
    DIMENSION,
    JOURNAL,
    SIZES,
    begin,
    fork,
    make_rows,
    open_writer,
    resume_and_finish,
)

from fairseq_knnlm import files
from fairseq_knnlm.datastore import Datastore, arrays, journal
from fairseq_knnlm.datastore.journal import LOCK, lock, refuse_finished
from fairseq_knnlm.datastore.manifest import (
    INDEX,
    KEYS,
    MANIFEST,
    POSITIONS,
    SETTINGS,
    TUNED,
    VALUES,
    read_manifest,
)
from fairseq_knnlm.errors import UserError

# -- going on --------------------------------------------------------------------------------------


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
    "garbage",
    [
        b"\x00" * 30,
        b"7 deadbeef\n",
        b"99 00000000 00000000\n",
        b"6 00000000 00000000\n",  # of the chunk behind the last
        b"9" * 5000 + b" 00000000 00000000\n",  # more digits than Python reads
        b"\xff\n",
    ],
    ids=len,
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

    for module, names in (
        (os, ["replace", "remove", "makedirs", "open", "fsync"]),
        (files, ["open"]),
        (arrays, ["open", "write_all"]),
        (journal, ["open", "write_all"]),
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


@pytest.mark.parametrize("has_parts", [True, False])
def test_another_index_keeps_the_keys(tmp_path, has_parts):
    begin(tmp_path / "d", [0, 1, 2])
    if has_parts:
        (tmp_path / "d" / "index.building").mkdir()
    with open_writer(tmp_path / "d", index={"factory": "IVF4,PQ4"}) as writer:
        assert writer.done == [0, 1, 2]
        assert not os.path.exists(writer.work_path)
    with pytest.raises(UserError, match="other settings .*metric"):
        with open_writer(tmp_path / "d", index={"factory": "Flat"}, metric="ip"):
            pass


def test_the_same_index_keeps_its_parts_and_another_drops_them(tmp_path):
    for factory, kept in (("Flat", False), ("Flat", True), ("PQ4", False), ("PQ4", True)):
        with open_writer(tmp_path / "d", index={"factory": factory}) as writer:
            assert os.path.exists(writer.work_path) == kept
            os.makedirs(writer.work_path, exist_ok=True)


def test_another_index_of_a_build_by_several_is_refused(tmp_path):
    options = {"num_shards": 2, "shard_id": 1}
    with open_writer(tmp_path / "d", options=options, index={"factory": "Flat"}) as writer:
        os.mkdir(writer.work_path)
    with pytest.raises(UserError, match='index was .*"Flat".*, is .*"IVF4,PQ4"'):
        with open_writer(tmp_path / "d", options=options, index={"factory": "IVF4,PQ4"}):
            pass
    assert os.path.exists(writer.work_path)


def test_shards_resume_by_themselves(finished, tmp_path):
    for chunks in ([0], [1, 2], [3]):
        with open_writer(tmp_path / "d", options={"num_shards": 2, "shard_id": 0}) as writer:
            write_chunks(writer, *make_rows(), SIZES, only=chunks)
    with open_writer(tmp_path / "d", options={"num_shards": 2, "shard_id": 1}) as writer:
        assert writer.done == []
        write_chunks(writer, *make_rows(), SIZES, only=[4, 5])
        finish(writer)
    assert contents(tmp_path / "d") == contents(finished)


# -- locks -----------------------------------------------------------------------------------------


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


def hold_lock(path, connection):
    with lock(path, "is busy"):
        connection.send("held")
        connection.recv()
        connection.send("about to end")


def test_a_lock_is_refused_or_waited_for(tmp_path):
    path = str(tmp_path / "some.lock")
    here, there = fork.Pipe()
    child = fork.Process(target=hold_lock, args=(path, there), daemon=True)
    child.start()
    assert here.recv() == "held"
    with pytest.raises(UserError, match=f"^--knn-datastore {tmp_path} is busy$"):
        with lock(path, "is busy"):
            pass
    threading.Timer(0.2, here.send, ["end"]).start()
    with lock(path, "is busy", wait=True):
        assert here.poll(), "it was held by both"
    child.join()
    with lock(path, "is busy"):
        pass


def test_builders_that_begin_together_wait_for_each_other(tmp_path):
    """One of them makes the files, which takes a moment; the other is not refused for it."""
    (tmp_path / "d").mkdir()
    here, there = fork.Pipe()
    lock_path = str(tmp_path / "d" / LOCK)
    child = fork.Process(target=hold_lock, args=(lock_path, there), daemon=True)
    child.start()
    assert here.recv() == "held"
    threading.Timer(0.2, here.send, ["end"]).start()
    with open_writer(tmp_path / "d"):
        assert here.poll(), "it did not wait"
    child.join()


def test_builders_that_finish_together_wait_for_each_other(tmp_path):
    """The second then sees what the first has finished."""
    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES)
        here, there = fork.Pipe()
        lock_path = str(tmp_path / "d" / LOCK)
        child = fork.Process(target=hold_lock, args=(lock_path, there), daemon=True)
        child.start()
        assert here.recv() == "held"
        threading.Timer(0.2, here.send, ["end"]).start()
        with writer.finishing() as missing:
            assert missing == "" and here.poll(), "it did not wait"
        child.join()


def test_a_shard_that_waits_finds_what_was_finished_meanwhile(finished, tmp_path):
    def again():
        with open_writer(tmp_path / "d", options={"num_shards": 2, "shard_id": 1}):
            pass

    again()
    with open_writer(tmp_path / "d", options={"num_shards": 2, "shard_id": 0}) as writer:
        write_chunks(writer, *make_rows(), SIZES)
        with ThreadPoolExecutor(1) as pool:
            with writer.finishing():
                second = pool.submit(again)
                time.sleep(0.2)
                shutil.copy(os.path.join(finished, INDEX), writer.index_path)
                writer.finish(read_manifest(finished)["index"])
            with pytest.raises(UserError, match="finished datastore"):
                second.result()
    assert contents(tmp_path / "d") == contents(finished)


def test_two_builders_do_not_wait_for_each_other_to_build_the_index(tmp_path):
    with open_writer(tmp_path / "d") as writer:
        write_chunks(writer, *make_rows(), SIZES)
        with writer.finishing():
            with pytest.raises(UserError, match="another builder at work"):
                with open_writer(tmp_path / "d"):
                    pass


# -- begun with other settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, sides",
    [
        ({"metric": "ip"}, ['metric was "l2", is "ip"']),
        ({"key": {"type": "output", "layer": 0, "layers": 2}}, ["ffn-input", "output"]),
        ({"model": {"sha256": "f" * 64, "parameters": 9}}, ["model was", "aaa", "fff"]),
        ({"options": {"num_shards": 2}}, ["num_shards was 1, is 2"]),
        ({"dtype": np.uint16}, ['dtype was "uint8", is "uint16"']),
        ({"metric": "ip", "index": {"factory": "IVF4,PQ4"}}, ['metric was "l2", is "ip"']),
    ],
)
def test_other_settings_than_it_was_begun_with_are_refused(tmp_path, changed, sides):
    begin(tmp_path / "d", [0, 1])
    (tmp_path / "d" / "index.building").mkdir()
    before = contents(tmp_path / "d")
    with pytest.raises(UserError, match="--overwrite") as caught:
        with open_writer(tmp_path / "d", **changed):
            pass
    assert all(side in str(caught.value) for side in sides)
    after = contents(tmp_path / "d")
    assert {name: after[name] for name in before} == before
    assert (tmp_path / "d" / "index.building").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"settings": {}}',
        b'{"settings": {}, "plan": 3}',
        b"\xff\xfe",
        b"NaN",
    ],
    ids=str,
)
def test_what_it_was_begun_with_is_damaged(finished, tmp_path, content):
    begin(tmp_path / "d", [0, 1])
    (tmp_path / "d" / SETTINGS).write_bytes(content)
    before = contents(tmp_path / "d")
    with pytest.raises(UserError, match=f"{SETTINGS} is damaged .*--overwrite"):
        with open_writer(tmp_path / "d"):
            pass
    assert {name: (tmp_path / "d" / name).read_bytes() for name in before} == before
    resume_and_finish(tmp_path / "d", [], overwrite=True)
    assert contents(tmp_path / "d") == contents(finished)


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


def test_long_settings_are_cut_in_the_message(tmp_path):
    with open_writer(tmp_path / "d", extra="a" * 58):
        pass
    with pytest.raises(UserError) as error:
        with open_writer(tmp_path / "d", extra="b" * 59):
            pass
    assert f'extra was "{"a" * 58}", is "{"b" * 56}...)' in str(error.value)


# -- what is there already -------------------------------------------------------------------------


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


def test_a_finished_datastore_that_is_read_is_called_finished(finished):
    """Not busy: nobody need wait for the reader."""
    reader = Datastore.open(finished)
    with pytest.raises(UserError, match="finished datastore; pass --overwrite"):
        with open_writer(finished):
            pass
    reader.check_rows(range(COUNT))


def leave_traces(path):
    """What a build that is killed may leave, at one moment or another."""
    for name in ("building.json", "building.json.tmp", "building.lock", "building-1-of-2.lock"):
        (path / name).touch()
    for name in (JOURNAL, f"{JOURNAL}.tmp", "building-10-of-12.journal"):
        (path / name).touch()
    (path / "index.building").mkdir()
    (path / "index.building" / "part").touch()


def test_traces_beside_a_finished_datastore_are_removed(finished, copy):
    leave_traces(copy)
    with pytest.raises(UserError, match="finished datastore"):
        refuse_finished(str(copy))
    assert contents(copy) == contents(finished)
    assert sorted(os.listdir(copy)) == sorted(os.listdir(finished))


def test_overwriting_removes_what_belongs_to_the_datastore_before(copy):
    leave_traces(copy)
    (copy / TUNED).write_text("{}")
    with open_writer(copy, options={"overwrite": True}) as writer:
        assert writer.done == []
        assert {INDEX, MANIFEST, TUNED, "index.building"}.isdisjoint(os.listdir(copy))
        write_chunks(writer, *make_rows(), SIZES)
        finish(writer)
    assert sorted(os.listdir(copy)) == sorted(FILES)


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


@pytest.mark.parametrize("name", [KEYS, MANIFEST])
def test_overwrite_leaves_what_is_not_ours(tmp_path, name):
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(UserError, match=f"has {name}, but no .* of ours"):
        with open_writer(tmp_path, options={"overwrite": True}):
            pass
    assert (tmp_path / name).read_text() == "somebody's"


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


def test_overwriting_removes_positions_but_not_those_of_somebody_else(copy, tmp_path):
    np.save(copy / POSITIONS, np.arange(COUNT))
    with open_writer(copy, options={"overwrite": True}):
        assert POSITIONS not in os.listdir(copy)
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / POSITIONS, np.arange(COUNT))
    with pytest.raises(UserError, match=f"has {POSITIONS}, but no .* of ours"):
        with open_writer(tmp_path / "other", options={"overwrite": True}):
            pass


def test_a_build_with_another_dimension_of_the_model_is_refused(finished, tmp_path):
    """Naming no dimension of the model, and naming that of the keys, are the same."""
    begin(tmp_path / "d", [0, 1])
    with pytest.raises(UserError, match="model_dimension was null, is 24"):
        with open_writer(tmp_path / "d", options={"model_dimension": 3 * DIMENSION}):
            pass
    resume_and_finish(tmp_path / "d", [0, 1], model_dimension=DIMENSION)
    assert contents(tmp_path / "d") == contents(finished)


def test_a_journal_of_somebody_else_is_not_counted(finished, tmp_path):
    begin(tmp_path / "d", [0, 1])
    (tmp_path / "d" / "my.journal").write_bytes(b"3 deadbeef deadbeef\n")
    resume_and_finish(tmp_path / "d", [0, 1])
    (tmp_path / "d" / "my.journal").unlink()
    assert contents(tmp_path / "d") == contents(finished)


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("building-1-of-2.journal", b"99 00000000 00000000\n", "a line of chunk 99"),
        ("building-1-of-2.journal", b"6 00000000 00000000\n", "a line of chunk 6"),
        ("building-3-of-2.journal", b"", "no journal of this build, which has 2 shards"),
        ("building-1-of-1.journal", b"", "no journal of this build, which has 2 shards"),
    ],
    ids=["far too many chunks", "a chunk too many", "a shard too many", "another build"],
)
def test_a_journal_that_is_of_no_part_of_the_build_is_refused(tmp_path, name, content, part):
    with open_writer(tmp_path / "d", options={"num_shards": 2, "shard_id": 1}) as writer:
        write_chunks(writer, *make_rows(), SIZES, only=[4, 5])
        (tmp_path / "d" / name).write_bytes(content)
        with pytest.raises(UserError, match=part) as error:
            with writer.finishing():
                pass
    assert name in str(error.value)


def test_traces_that_cannot_be_removed_do_not_hide_what_is_wrong(copy):
    (copy / LOCK).mkdir()  # as on a disk that is read-only, it cannot be removed
    with pytest.raises(UserError, match="finished datastore; pass --overwrite"):
        refuse_finished(str(copy))


@pytest.mark.parametrize("name", [KEYS, INDEX, TUNED])
def test_a_directory_in_the_way_is_refused_before_anything_is_removed(copy, name):
    with contextlib.suppress(FileNotFoundError):
        os.remove(copy / name)
    (copy / name).mkdir()
    before = contents(copy)
    with pytest.raises(UserError, match=f"a directory where {name}"):
        with open_writer(copy, options={"overwrite": True}):
            pass
    after = contents(copy)
    assert {kept: after.get(kept) for kept in before} == before
