"""Writes a datastore so that it can be trusted: in place, resumable, by several processes.

Keys and values are written where they belong (``arrays``), each chunk of them is then entered in a
journal (``journal``), and when the index lies beside them all the manifest is written
(``manifest``), which makes it a datastore.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Optional

import numpy as np

from ..arguments import check_arguments
from ..errors import UserError
from ..fields import whole
from ..files import checksum, render, write_atomically
from .arrays import Arrays
from .free_space import refuse_small_disk
from .journal import (
    INDEX_WORK,
    LOCK,
    Entry,
    Journal,
    begin,
    is_unfinished,
    lock,
    lock_shard,
    read_journals,
    refuse_finished,
    refuse_foreign,
    remove_build,
    remove_traces,
)
from .manifest import INDEX, KEYS, MANIFEST, VALUES, array_layout, make_manifest
from .reading_lock import refuse_readers
from .row_checks import RowChecks
from .schema import refuse_faulty
from .writer_arguments import check_writer_arguments


def value_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every token id below *vocabulary_size*.

    Raises:
        UserError: if that is no whole number >= 0.
    """
    check_arguments("value_dtype", vocabulary_size=(vocabulary_size, whole(0)))
    return np.min_scalar_type(max(int(vocabulary_size) - 1, 0))


class DatastoreWriter:
    """Writes keys and values chunk by chunk, in place, at the rows where they belong.

    Several writers, one a shard, may work on one directory at a time: each writes its own rows
    of the same files, so nothing is joined or copied afterwards. Use as a context manager; the
    lock of a shard ends with its process.

    Args:
        path (str): the directory, made if missing.
        settings (dict): everything that decides the content (JSON); a directory begun with other
            settings is refused. Becomes part of the manifest.
        chunk_sizes (sequence of int): rows of each chunk of the whole datastore, >= 0.
        dimension (int): D, numbers of a stored key, >= 1.
        dtype (numpy.dtype): of the values, an unsigned integer; see ``value_dtype``.
        num_shards (int): how many writers there are, >= 1.
        shard_id (int): which of them this is, in [0, num_shards).
        overwrite (bool): drop what an earlier build left or finished.
        index_bytes (int): disk space to keep free for the index, >= 0.
        model_dimension (int): numbers of the model's state that a key is made of, >= 1; None: D.

    Attributes:
        done (list of int): numbers of the chunks of this shard that are written.

    Raises:
        UserError: naming every argument that cannot be. When it is entered: if the directory
            cannot be written, is finished, was begun with other settings, has another builder at
            work, or the disk is too small.
    """

    def __init__(
        self,
        path: str,
        settings: dict,
        chunk_sizes: Sequence[int],
        dimension: int,
        dtype: np.dtype,
        num_shards: int = 1,
        shard_id: int = 0,
        overwrite: bool = False,
        index_bytes: int = 0,
        model_dimension: Optional[int] = None,
    ):
        check_writer_arguments(locals())
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self._ends = np.cumsum(np.asarray(chunk_sizes, dtype=np.int64))
        self._num_shards = int(num_shards)
        self._shard = f"{shard_id + 1}-of-{num_shards}"
        self._model_dimension = int(model_dimension or dimension)
        self._arrays = Arrays(path, array_layout(self.count, int(dimension), np.dtype(dtype)))
        self._journal = Journal(path, self._shard)
        self._overwrite = overwrite
        self._index_bytes = index_bytes
        self._stack = contextlib.ExitStack()
        self.done: list[int] = []

    @property
    def count(self) -> int:
        """N, rows of the whole datastore."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def dimension(self) -> int:
        """D, numbers of a stored key."""
        return self._arrays.layout[KEYS][0][1]

    @property
    def value_dtype(self) -> np.dtype:
        """The dtype that values must have."""
        return self._arrays.layout[VALUES][1]

    def __enter__(self):
        try:
            self._prepare()
        except OSError as error:
            self._stack.close()
            raise UserError(f"cannot write --knn-datastore {self.path}: {error}") from None
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    # -- beginning, or going on ----------------------------------------------------------------

    def _prepare(self) -> None:
        # Before anything in it is touched.
        if self._overwrite:
            refuse_readers(self.path)
        else:
            refuse_finished(self.path)
        os.makedirs(self.path, exist_ok=True)
        self._stack.enter_context(lock_shard(self.path, self._shard))
        with lock(self._in(LOCK), "is being set up by another builder", wait=True):
            if self._overwrite or not is_unfinished(self.path):
                needed = self._arrays.size_bytes + self._index_bytes
                refuse_small_disk(self.path, needed, self.count)
            if self._overwrite:
                refuse_foreign(self.path)
                remove_build(self.path, self._shard)
            refuse_finished(self.path)
            begin(self.path, self.settings, self._plan())
            self._arrays.allocate()
        self._arrays.open(self._stack)
        self.done = self._journal.resume(self._is_on_disk)
        self._journal.open(self._stack)

    def _plan(self) -> dict:
        plan = {
            "num_shards": self._num_shards,
            "count": self.count,
            "chunks": checksum(self._ends),
            "dimension": self.dimension,
            "dtype": str(self.value_dtype),
        }
        # Only where it differs: a build that an earlier release began goes on.
        if self._model_dimension != self.dimension:
            plan["model_dimension"] = self._model_dimension
        return plan

    def _is_on_disk(self, entry: Entry) -> bool:
        if entry.chunk >= len(self._ends):
            return False
        actual = self._arrays.checksums(*self._range(entry.chunk))
        return actual == [entry.keys_checksum, entry.values_checksum]

    # -- writing -------------------------------------------------------------------------------

    def write(self, chunk: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write the rows of one chunk.

        Args:
            chunk (int): its number, from 0.
            keys (ndarray): shape (n, D), float16.
            values (ndarray): shape (n,), the writer's dtype.

        Raises:
            UserError: if shapes or dtypes are not those of the chunk, a key is not finite in
                float16, or the disk is full; what was written before stays, and the same command
                goes on from there.
        """
        if not 0 <= chunk < len(self._ends):
            raise UserError(f"chunk must be in [0, {len(self._ends)}), got {chunk}")
        start, stop = self._range(chunk)
        self._arrays.check(KEYS, start, stop, keys)
        self._arrays.check(VALUES, start, stop, values)
        if not np.isfinite(keys).all():
            raise UserError(
                "a key is infinite or not a number in float16; the model's states "
                "are beyond 65504, or broken (half-precision overflow? try without --fp16)"
            )
        with self._disk_errors_explained():
            keys_checksum = self._arrays.write(KEYS, start, keys)
            values_checksum = self._arrays.write(VALUES, start, values)
            self._journal.append(Entry(chunk, keys_checksum, values_checksum))
        self.done.append(chunk)

    @contextlib.contextmanager
    def _disk_errors_explained(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write --knn-datastore {self.path}: {error}; what is "
                "written so far is kept, run the same command again to go on"
            ) from None

    # -- finishing -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def finishing(self) -> Iterator[Optional[str]]:
        """Held by the one builder that finishes a datastore, once every chunk of it is written.

        Yields:
            str: what other shards have not done yet; empty when it can be finished; None when
            another builder has finished it.

        Raises:
            UserError: if what was written does not reach the disk.
        """
        with self._disk_errors_explained():
            self._arrays.sync()  # the builder that finishes relies on the journal
        if os.path.exists(self._in(MANIFEST)):
            yield None
            return
        with lock(self._in(LOCK), "is being finished by another builder", wait=True):
            if os.path.exists(self._in(MANIFEST)):
                yield None
            else:
                yield self._missing()

    def _missing(self) -> str:
        journals = self._read_journals()
        chunks = len(self._ends) - len({entry.chunk for entries in journals for entry in entries})
        # A shard whose share is empty counts as well: it would find the datastore finished, and
        # fail, if it came later.
        waiting = self._num_shards - len(journals)
        return f"{chunks} chunks, {waiting} shards not begun" if chunks or waiting else ""

    def _read_journals(self) -> list[list[Entry]]:
        return read_journals(self.path, self._num_shards, len(self._ends))

    def finish(self, index: dict, **more) -> None:
        """Write the manifest, the last file of a datastore, and remove the traces of the build.

        Args:
            index (dict): description of the index in ``index.faiss``, for the manifest.
            more: what else the manifest is to say (JSON).

        Raises:
            UserError: if a chunk is not written yet, *index* or *more* are not what a manifest may
                say, or the disk is full.
        """
        with self._disk_errors_explained():
            in_order = self._entries()
            manifest = make_manifest(
                self.path,
                self._arrays.layout,
                self._model_dimension,
                self._ends.tolist(),
                {
                    KEYS: [entry.keys_checksum for entry in in_order],
                    VALUES: [entry.values_checksum for entry in in_order],
                },
                index,
                {**self.settings, **more},
            )
            refuse_faulty(self.path, manifest)
            write_atomically(self._in(MANIFEST), render(manifest))
            remove_traces(self.path)

    def _entries(self) -> list[Entry]:
        """What the journals say of each chunk, in their order."""
        entries = {entry.chunk: entry for each in self._read_journals() for entry in each}
        missing = len(self._ends) - len(entries)
        if missing:
            raise UserError(f"{self.path} cannot be finished: {missing} chunks are missing")
        return [entries[chunk] for chunk in range(len(self._ends))]

    @property
    def work_path(self) -> str:
        """Directory for the parts of an index that is being built; gone when it is finished."""
        return self._in(INDEX_WORK)

    @property
    def index_path(self) -> str:
        """Where the finished index must lie."""
        return self._in(INDEX)

    def keys(self) -> np.ndarray:
        """The keys as they are on the disk, shape (N, D), float16, memory-mapped."""
        return self._arrays.map(KEYS)

    def key_checks(self) -> RowChecks:
        """Compares keys, as they are read again, with what every shard has written.

        Raises:
            UserError: if a chunk is not written yet.
            OSError: if they cannot be read.
        """
        shape, dtype = self._arrays.layout[KEYS]
        checksums = [entry.keys_checksum for entry in self._entries()]
        return RowChecks(self._in(KEYS), shape, dtype, self._ends, checksums)

    def values(self) -> np.ndarray:
        """The values as they are on the disk, shape (N,), memory-mapped."""
        return self._arrays.map(VALUES)

    # -- places --------------------------------------------------------------------------------

    def _in(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _range(self, chunk: int) -> tuple[int, int]:
        """The first row of a chunk, and the one after its last."""
        return int(self._ends[chunk - 1]) if chunk else 0, int(self._ends[chunk])
