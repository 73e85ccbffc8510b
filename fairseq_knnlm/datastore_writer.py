"""Writes a datastore so that it can be trusted: in place, resumable, by several processes.

While a datastore is written it has no manifest. Instead there are ``building.json``, the settings
it was begun with, and a journal for each shard with one line for each chunk of rows that is whole,
and its checksums: a killed dump goes on from there, after checking that what the journal says is
really on the disk.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .datastore import (
    FORMAT_VERSION,
    INDEX,
    KEYS,
    MANIFEST,
    SETTINGS,
    TUNED,
    VALUES,
    checksum,
    file_checksums,
    npy_header,
    render,
    write_atomically,
)
from .errors import UserError

KEY_DTYPE = np.dtype("float16")
LOCK = "building.lock"
INDEX_WORK = "index.building"
# of the locks and journals of the shards, "building-2-of-8.journal" say
_OF_A_SHARD = re.compile(r"building-(\d+-of-\d+)\.(lock|journal)(?:\.tmp)?")


def value_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every token id below *vocabulary_size*."""
    return np.min_scalar_type(max(vocabulary_size - 1, 0))


def refuse_finished(path: str) -> None:
    """Refuse to build over a finished datastore.

    What a build that was killed after its manifest left behind is removed.

    Raises:
        UserError: if there is one at *path*.
    """
    if os.path.exists(os.path.join(path, MANIFEST)):
        remove_traces(path)
        raise UserError(
            f"fairseq_knnlm: {path} holds a finished datastore; pass --overwrite to build it "
            "anew, or another --knn-datastore"
        )


def free_bytes(path: str) -> int:
    """What a build at *path* may take: free space of its disk, and what its files take already."""
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    present = filter(os.path.exists, (os.path.join(path, name) for name in (KEYS, VALUES, INDEX)))
    # not their sizes: rows that are not written yet take no space
    taken = sum(512 * os.stat(name).st_blocks for name in present)
    return shutil.disk_usage(folder).free + taken


def refuse_small_disk(path: str, needed: int, count: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        needed (int): bytes of all files, the unfinished index included.
        count (int): entries.

    Raises:
        UserError: naming both sizes.
    """
    free = free_bytes(path)
    if needed > free:
        raise UserError(
            f"fairseq_knnlm: --knn-datastore {path} needs about {needed:,} bytes ({count:,} "
            f"entries), its disk has {free:,} free"
        )


class _Written(NamedTuple):
    """A journal line: a chunk that is on disk."""

    chunk: int
    keys_checksum: str
    values_checksum: str


class DatastoreWriter:
    """Writes keys and values chunk by chunk, in place, at the rows where they belong.

    Several writers, one a shard, may work on one directory at a time: each writes its own rows
    of the same files, so nothing is joined or copied afterwards. Use as a context manager; the
    lock of a shard ends with its process.

    Args:
        path (str): the directory, made if missing.
        settings (dict): everything that decides the content (JSON); a directory begun with other
            settings is refused. Becomes part of the manifest.
        chunk_sizes (sequence of int): rows of each chunk of the whole datastore.
        dimension (int): D.
        dtype (numpy.dtype): of the values.
        num_shards, shard_id (int): which writer this is.
        overwrite (bool): drop what an earlier build left or finished.
        index_bytes (int): disk space to keep free for the index.

    Raises:
        UserError: if the directory cannot be written, is finished, was begun with other settings,
            has another builder at work, or the disk is too small.
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
    ):
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self._ends = np.cumsum(np.asarray(chunk_sizes, dtype=np.int64))
        self._plan = {
            "num_shards": num_shards,
            "count": self.count,
            "chunks": checksum(self._ends),
            "dimension": dimension,
            "dtype": str(np.dtype(dtype)),
        }
        self._arrays = {
            KEYS: ((self.count, dimension), KEY_DTYPE),
            VALUES: ((self.count,), np.dtype(dtype)),
        }
        self._shard = f"{shard_id + 1}-of-{num_shards}"
        self._overwrite = overwrite
        self._index_bytes = index_bytes
        self._stack = contextlib.ExitStack()
        self._files: dict = {}
        self.done: list[int] = []

    @property
    def value_dtype(self) -> np.dtype:
        """The dtype that values must have."""
        return self._arrays[VALUES][1]

    @property
    def count(self) -> int:
        """N, rows of the whole datastore."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __enter__(self):
        try:
            self._prepare()
        except OSError as error:
            self._stack.close()
            raise UserError(
                f"fairseq_knnlm: cannot write --knn-datastore {self.path}: {error}"
            ) from None
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    # -- opening -------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if not self._overwrite:
            refuse_finished(self.path)  # before anything in it is touched
        os.makedirs(self.path, exist_ok=True)
        self._stack.enter_context(self._lock_of_shard(self._shard))
        with lock(self._in(LOCK), "is being set up by another builder", wait=True):
            if self._overwrite or not os.path.exists(self._in(SETTINGS)):
                self._refuse_small_disk()
            if self._overwrite:
                self._refuse_foreign()
                self._remove_build()
            refuse_finished(self.path)
            if os.path.exists(self._in(SETTINGS)):
                self._check_settings()
            else:
                self._start()
            self._allocate()
        for name in self._arrays:
            self._files[name] = self._stack.enter_context(open(self._in(name), "r+b", buffering=0))
        self.done = self._resume()
        self._journal = self._stack.enter_context(
            open(self._in(self._journal_name), "ab", buffering=0)
        )

    def _lock_of_shard(self, shard: str):
        return lock(self._in(f"building-{shard}.lock"), "has another builder at work")

    def _remove_build(self) -> None:
        """Remove the datastore, finished or not, and nothing else; the manifest first."""
        for name in os.listdir(self.path):
            other = _OF_A_SHARD.fullmatch(name)
            if other and other[1] != self._shard:
                with self._lock_of_shard(other[1]):
                    pass  # nobody works on it
        for name in (MANIFEST, SETTINGS, TUNED, KEYS, VALUES, INDEX):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._in(name))
        shutil.rmtree(self.work_path, ignore_errors=True)
        for name in os.listdir(self.path):
            trace = _OF_A_SHARD.fullmatch(name)
            if trace and trace[2] == "journal":
                os.remove(self._in(name))

    def _check_settings(self) -> None:
        with open(self._in(SETTINGS), "rb") as file:
            begun = json.load(file)
        now = self._begun()
        if begun["plan"] == now["plan"] and self._plan["num_shards"] == 1:
            self._accept_another_index(begun)
        if begun != now:
            differing = sorted(
                f"{name} was {_brief(begun[part].get(name))}, is {_brief(now[part].get(name))}"
                for part in now
                for name in {**begun[part], **now[part]}
                if begun[part].get(name) != now[part].get(name)
            )
            raise UserError(
                f"fairseq_knnlm: {self.path} holds an unfinished datastore that was begun with "
                f"other settings ({'; '.join(differing)}); repeat them, or pass --overwrite"
            )

    def _accept_another_index(self, begun: dict) -> None:
        """Keep the keys where only the index is to be another: the first may have failed."""
        index = self.settings.get("index")
        if begun["settings"].get("index") != index:
            begun["settings"]["index"] = index
            if begun == self._begun():
                shutil.rmtree(self.work_path, ignore_errors=True)
                write_atomically(self._in(SETTINGS), json.dumps(begun, indent=1).encode())

    def _begun(self) -> dict:
        return {"settings": self.settings, "plan": self._plan}

    def _refuse_foreign(self) -> None:
        """Refuse to replace files of our names that are no datastore of ours."""
        names = (MANIFEST, KEYS, VALUES, INDEX)
        present = [name for name in names if os.path.exists(self._in(name))]
        if not present or os.path.exists(self._in(SETTINGS)):
            return
        if b'"format_version"' not in _read_if_there(self._in(MANIFEST)):
            raise UserError(
                f"fairseq_knnlm: {self.path} has {', '.join(present)}, but no {MANIFEST} or "
                f"{SETTINGS} of ours: not begun by this tool; use another --knn-datastore"
            )

    def _start(self) -> None:
        self._refuse_foreign()
        write_atomically(self._in(SETTINGS), json.dumps(self._begun(), indent=1).encode())

    def _refuse_small_disk(self) -> None:
        needed = sum(map(self._size, self._arrays)) + self._index_bytes
        refuse_small_disk(self.path, needed, self.count)

    def _allocate(self) -> None:
        """Give the arrays their headers and sizes; rows that are there stay."""
        for name, (shape, dtype) in self._arrays.items():
            with open(os.open(self._in(name), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                file.write(npy_header(shape, dtype))
                file.truncate(self._size(name))

    def _resume(self) -> list[int]:
        """The chunks of this shard's journal whose rows are really on the disk."""
        path = self._in(self._journal_name)
        journal = _read_if_there(path)
        whole = [written for written in _parse_journal(journal) if self._on_disk(written)]
        kept = b"".join(map(_journal_line, whole))
        if kept != journal:
            write_atomically(path, kept)
        return [written.chunk for written in whole]

    def _on_disk(self, written: _Written) -> bool:
        if written.chunk >= len(self._ends):
            return False
        found = [checksum(self._read(name, written.chunk)) for name in (KEYS, VALUES)]
        return found == [written.keys_checksum, written.values_checksum]

    # -- writing -------------------------------------------------------------------------------

    def write(self, chunk: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write the rows of one chunk.

        Args:
            chunk (int): its number.
            keys (ndarray): shape (n, D), float16.
            values (ndarray): shape (n,), the writer's dtype.

        Raises:
            UserError: if a key is not finite in float16, or the disk is full; what was written
                before stays, and the same command goes on from there.
        """
        start, stop = self._rows(chunk)
        assert len(keys) == len(values) == stop - start
        if not np.isfinite(keys).all():
            raise UserError(
                "fairseq_knnlm: a key is infinite or not a number in float16; the model's states "
                "are beyond 65504, or broken (half-precision overflow? try without --fp16)"
            )
        sums = []
        with self._disk_errors_explained():
            for name, rows in ((KEYS, keys), (VALUES, values)):
                rows = np.ascontiguousarray(rows)
                assert rows.dtype == self._arrays[name][1]
                self._files[name].seek(self._offset(name, start))
                _write_all(self._files[name], rows)
                sums.append(checksum(rows))
            _write_all(self._journal, _journal_line(_Written(chunk, *sums)))
        self.done.append(chunk)

    @contextlib.contextmanager
    def _disk_errors_explained(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"fairseq_knnlm: cannot write --knn-datastore {self.path}: {error}; what is "
                "written so far is kept, run the same command again to go on"
            ) from None

    # -- finishing -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def finishing(self):
        """Held by the one builder that finishes a datastore all of whose chunks are written.

        Yields:
            str: what other shards have not done yet; empty when it can be finished; None when
            another builder has finished it.
        """
        with self._disk_errors_explained():
            for file in self._files.values():
                os.fsync(file.fileno())  # the builder that finishes relies on the journal
        if os.path.exists(self._in(MANIFEST)):
            yield None
            return
        with lock(self._in(LOCK), "is being finished by another builder", wait=True):
            if os.path.exists(self._in(MANIFEST)):
                yield None
            else:
                yield self._missing()

    def _missing(self) -> str:
        journals = [name for name in os.listdir(self.path) if name.endswith(".journal")]
        # also one whose share is empty: it would find the datastore finished, and fail
        waiting = self._plan["num_shards"] - len(journals)
        chunks = len(self._ends) - len(self._written())
        return f"{chunks} chunks, {waiting} shards not begun" if chunks or waiting else ""

    def finish(self, index: dict, **more) -> None:
        """Write the manifest, the last file of a datastore, and remove the traces of the build.

        Args:
            index (dict): description of the index in ``index.faiss``, for the manifest.
            more: what else the manifest is to say (JSON).
        """
        with self._disk_errors_explained():
            self._finish(index, more)

    def _finish(self, index: dict, more: dict) -> None:
        written = self._written()
        in_order = [written[chunk] for chunk in range(len(self._ends))]
        files = {
            name: {"dtype": str(dtype), "size_bytes": os.path.getsize(self._in(name))}
            for name, (_, dtype) in self._arrays.items()
        }
        files[INDEX] = {
            "size_bytes": os.path.getsize(self._in(INDEX)),
            "checksums": file_checksums(self._in(INDEX)),
        }
        manifest = {
            **self.settings,
            **more,
            "format_version": FORMAT_VERSION,
            "count": self.count,
            "dimension": self._plan["dimension"],
            "index": index,
            "files": files,
            "chunks": {
                "rows": self._ends.tolist(),
                KEYS: [w.keys_checksum for w in in_order],
                VALUES: [w.values_checksum for w in in_order],
            },
        }
        write_atomically(self._in(MANIFEST), render(manifest))
        remove_traces(self.path)

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
        return np.load(self._in(KEYS), mmap_mode="r")

    def values(self) -> np.ndarray:
        """The values as they are on the disk, shape (N,), memory-mapped."""
        return np.load(self._in(VALUES), mmap_mode="r")

    def _written(self) -> dict[int, _Written]:
        """What the journals of all shards say, by chunk."""
        return {
            written.chunk: written
            for name in os.listdir(self.path)
            if name.endswith(".journal")
            for written in _parse_journal(_read_if_there(self._in(name)))
        }

    # -- places --------------------------------------------------------------------------------

    @property
    def _journal_name(self) -> str:
        return f"building-{self._shard}.journal"

    def _in(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _rows(self, chunk: int) -> tuple[int, int]:
        return int(self._ends[chunk - 1]) if chunk else 0, int(self._ends[chunk])

    def _size(self, name: str) -> int:
        return self._offset(name, self.count)

    def _offset(self, name: str, row: int) -> int:
        shape, dtype = self._arrays[name]
        return len(npy_header(shape, dtype)) + row * int(np.prod(shape[1:])) * dtype.itemsize

    def _read(self, name: str, chunk: int) -> bytes:
        start, stop = (self._offset(name, row) for row in self._rows(chunk))
        self._files[name].seek(start)
        return self._files[name].read(stop - start) if stop > start else b""


def _brief(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _journal_line(written: _Written) -> bytes:
    return " ".join(map(str, written)).encode() + b"\n"


def _parse_journal(data: bytes) -> list[_Written]:
    """The whole lines of a journal; a line that a kill cut short does not count."""
    lines = re.findall(rb"^(\d+) ([0-9a-f]{8}) ([0-9a-f]{8})\n", data, flags=re.MULTILINE)
    return [_Written(int(chunk), *(s.decode() for s in sums)) for chunk, *sums in lines]


def _read_if_there(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def remove_traces(path: str) -> None:
    """Remove what only a build in progress needs."""
    shutil.rmtree(os.path.join(path, INDEX_WORK), ignore_errors=True)
    of_shards = filter(_OF_A_SHARD.fullmatch, sorted(os.listdir(path)))
    for name in (*of_shards, SETTINGS, f"{SETTINGS}.tmp", LOCK):
        with contextlib.suppress(FileNotFoundError):  # another shard may be doing the same
            os.remove(os.path.join(path, name))


@contextlib.contextmanager
def lock(path: str, otherwise: str, wait: bool = False):
    """Hold an advisory lock on a file; it ends with the process that holds it, however it ends.

    Raises:
        UserError: if another process holds it and *wait* is False.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"fairseq_knnlm: --knn-datastore {os.path.dirname(path)} {otherwise}"
            ) from None
        yield


def _write_all(file, data) -> None:
    """Write to an unbuffered file, which may take less than all at a time."""
    data = memoryview(data).cast("B")
    while data:
        data = data[file.write(data) :]
