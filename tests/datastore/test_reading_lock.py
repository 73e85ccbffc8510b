"""While somebody reads a datastore nobody replaces it; nothing is lost of either."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile

import numpy as np
import pytest
from helpers.small import contents
from helpers.writing import fork, make_rows, open_writer

from fairseq_knnlm.datastore import Datastore, reading_lock
from fairseq_knnlm.datastore.reading_lock import kept_from_readers, refuse_readers
from fairseq_knnlm.errors import UserError


def read_until(path, opened, wanted):
    """In a process of its own: hold a datastore open, and read it at the end."""
    datastore = Datastore.open(path)
    opened.set()
    assert wanted.wait(20)
    datastore.check_rows(range(len(datastore)))
    with datastore.reading_index():
        os._exit(0 if np.array_equal(datastore.values, make_rows()[1]) else 3)


@contextlib.contextmanager
def reader(path):
    """A process that reads a datastore; at the end of the block it must have read it whole."""
    opened, wanted = fork.Event(), fork.Event()
    process = fork.Process(target=read_until, args=(path, opened, wanted))
    process.start()
    try:
        assert opened.wait(20)
        yield process
    finally:
        wanted.set()
        process.join(20)
    assert process.exitcode == 0


def overwrite(path):
    with open_writer(path, options={"overwrite": True}):
        pass


def test_overwrite_waits_for_no_reader_and_changes_nothing(copy):
    before = contents(copy)
    with reader(str(copy)), reader(str(copy)):  # several may read
        for attempt in (overwrite, refuse_readers):
            with pytest.raises(UserError, match="is being read.* nothing was changed"):
                attempt(str(copy))
        assert contents(copy) == before
    overwrite(copy)
    with pytest.raises(UserError, match="unfinished"):
        Datastore.open(str(copy))


def test_the_lock_ends_with_a_reader_that_is_killed(copy):
    opened, never = fork.Event(), fork.Event()
    process = fork.Process(target=read_until, args=(str(copy), opened, never))
    process.start()
    assert opened.wait(20)
    process.kill()
    process.join(20)
    refuse_readers(str(copy))


def test_the_lock_ends_with_the_datastore(copy):
    datastore = Datastore.open(str(copy))
    with pytest.raises(UserError, match="is being read"):
        refuse_readers(str(copy))
    datastore.itself = datastore  # nobody else refers to it, but it is not collected at once
    del datastore
    refuse_readers(str(copy))


def test_nobody_begins_to_read_what_is_being_removed(copy):
    with kept_from_readers(str(copy)):
        with pytest.raises(UserError, match="is being built anew by another process"):
            Datastore.open(str(copy))
    assert len(Datastore.open(str(copy))) == len(make_rows()[0])


def test_a_manifest_that_lost_its_name_before_it_was_locked_is_not_read(copy, monkeypatch):
    flock = fcntl.flock

    def late(descriptor, kind):
        shutil.copy(copy / "manifest.json", copy / "other")
        os.replace(copy / "other", copy / "manifest.json")
        flock(descriptor, kind)

    monkeypatch.setattr(reading_lock.fcntl, "flock", late)
    with pytest.raises(UserError, match="is being built anew"):
        Datastore.open(str(copy))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(copy, monkeypatch, caplog, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(reading_lock.fcntl, "flock", refuse)
    assert len(Datastore.open(str(copy))) == len(make_rows()[0])
    assert f"the file system of {copy} has no locks" in caplog.text
    refuse_readers(str(copy))


def test_there_may_be_nothing_to_overwrite(tmp_path):
    refuse_readers(str(tmp_path))
    refuse_readers(str(tmp_path / "none"))


# -- files that cannot be read ---------------------------------------------------------------------


def as_nobody(function, *args):
    """What a function raises in a process without the rights of root; "" for nothing."""

    def run(sender):
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            function(*args)
            sender.send("")
        except UserError as error:
            sender.send(str(error))

    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=run, args=(sender,))
    process.start()
    assert receiver.poll(20), "it ended with another exception"
    process.join()
    return receiver.recv()


@pytest.fixture
def readable(finished):
    """A datastore that everybody may read; pytest's own folders are closed to others."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield shutil.copytree(finished, os.path.join(folder, "d"))
    shutil.rmtree(folder)


def test_a_datastore_that_may_only_be_read_is_read(readable):
    for name in os.listdir(readable):
        os.chmod(os.path.join(readable, name), 0o444)
    os.chmod(readable, 0o555)
    assert as_nobody(lambda: Datastore.open(readable).check_rows(range(9))) == ""


@pytest.mark.parametrize("name", ["manifest.json", "keys.npy", "values.npy", ""])
def test_files_without_permission_are_named(readable, name):
    path = os.path.join(readable, name)
    os.chmod(path, 0)
    message = as_nobody(Datastore.open, readable)
    assert "cannot read" in message or "no datastore" in message
    assert path.rstrip("/") in message


def test_an_index_without_permission_is_named(readable):
    path = os.path.join(readable, "index.faiss")
    os.chmod(path, 0)
    message = as_nobody(lambda: Datastore.open(readable).reading_index().__enter__())
    assert f"cannot read the datastore {readable}: {path}: Permission denied" in message


@pytest.mark.parametrize("name", ["manifest.json", "keys.npy", "index.faiss"])
def test_a_directory_in_place_of_a_file_is_refused(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(UserError, match=name):
        Datastore.open(str(copy))
