"""Readers and ``--overwrite``: who reads a datastore keeps it from being replaced.

A reader holds a shared lock (``flock``) on the manifest for as long as it reads. ``--overwrite``
begins only with an exclusive one. Locks end with the process that holds them, however it ends.
"""

import contextlib
import errno
import fcntl
import gc
import logging
import os

from ..errors import UserError
from .layout import MANIFEST
from .manifest import open_manifest

logger = logging.getLogger(__name__)

# What a file system that has no such locks answers.
_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


def open_for_reading(path: str):
    """The manifest of a datastore as a file; while it is open, nobody overwrites the datastore.

    Args:
        path (str): the directory.

    Raises:
        UserError: if there is none, or it is being replaced just now.
        OSError: if it cannot be opened.
    """
    file = open_manifest(path)
    try:
        locked = _lock(file.fileno(), fcntl.LOCK_SH, path)
        # Between its opening and its locking it may have been removed, and the lock is on nothing.
        if not locked or not _is_at(file.fileno(), os.path.join(path, MANIFEST)):
            raise UserError(
                f"the datastore {path} is being built anew by another process (--overwrite): try "
                "again when it is finished"
            )
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def kept_from_readers(path: str):
    """Held while a datastore is removed: nobody reads it, and nobody begins to.

    Args:
        path (str): the directory; without a manifest in it nobody can be reading it.

    Raises:
        UserError: if somebody does.
        OSError: if the manifest cannot be opened.
    """
    try:
        file = _open_to_lock(os.path.join(path, MANIFEST))
    except FileNotFoundError:
        yield
        return
    with file:
        locked = _lock(file.fileno(), fcntl.LOCK_EX, path)
        if not locked:
            # A Datastore of this process that nobody refers to may still wait for its collection.
            gc.collect()
            locked = _lock(file.fileno(), fcntl.LOCK_EX, path)
        if not locked:
            raise UserError(
                f"--overwrite: the datastore {path} is being read, by an evaluation or another "
                "process that has it open; nothing was changed: wait for the end of it, or build "
                "into another --knn-datastore"
            )
        yield


def refuse_readers(path: str) -> None:
    """Refuse to replace a datastore that somebody reads, before any work.

    Args:
        path (str): the directory, there already or not.

    Raises:
        UserError: if it is being read, or cannot be written.
    """
    try:
        with kept_from_readers(path):
            pass
    except OSError as error:
        raise UserError(f"cannot write --knn-datastore {path}: {error}") from None


def _open_to_lock(path: str):
    """Open a file for an exclusive lock, which network file systems give to writers only."""
    try:
        return open(path, "r+b")
    except PermissionError:
        return open(path, "rb")


def _lock(descriptor: int, kind: int, path: str) -> bool:
    """Lock without waiting; whether nobody else's lock is in the way."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        logger.warning(
            f"the file system of {path} has no locks ({error.strerror}): see to it yourself that "
            "nobody overwrites the datastore while it is read"
        )
    return True


def _is_at(descriptor: int, path: str) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
