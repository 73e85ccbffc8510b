"""A build in progress: its locks, what it was begun with, what is written, and its traces.

While a datastore is written it has no manifest. Instead there are

- ``building.json``, the settings it was begun with;
- for each shard a journal, ``building-2-of-8.journal`` say, with one line for each chunk of rows
  that is whole, and its checksums: a killed dump goes on from there, after checking that what the
  journal says is really on the disk;
- for each shard a lock, and one for what only one process may do at a time;
- ``index.building``, the parts of the index.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from typing import Callable, NamedTuple, Optional

from ..errors import UserError
from ..files import parse_json, write_all, write_atomically
from .manifest import INDEX, KEYS, MANIFEST, PARTS, POSITIONS, SETTINGS, VALUES
from .reading_lock import kept_from_readers

LOCK = "building.lock"
INDEX_WORK = "index.building"
_SHARD_FILE = re.compile(r"building-(?P<shard>\d+-of-\d+)\.(?P<kind>lock|journal)(?:\.tmp)?")


# -- locks -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: str, otherwise: str, wait: bool = False):
    """Hold an advisory lock on a file; it ends with the process that holds it, however it ends.

    Args:
        path (str): the file, in the directory of the datastore; made if missing.
        otherwise (str): what the error says if another process holds it.
        wait (bool): wait for the other process instead.

    Raises:
        UserError: if another process holds it and *wait* is False.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"--knn-datastore {os.path.dirname(path)} {otherwise}") from None
        yield


def lock_shard(path: str, shard: str):
    """Hold the lock of a shard.

    Args:
        path (str): the directory of the datastore.
        shard (str): ``2-of-8``, say.

    Raises:
        UserError: if another process holds it.
    """
    return lock(os.path.join(path, f"building-{shard}.lock"), "has another builder at work")


# -- what a build was begun with -------------------------------------------------------------------


def is_unfinished(path: str) -> bool:
    """Whether a build was begun in a directory, and is not finished."""
    return os.path.exists(os.path.join(path, SETTINGS))


def begin(path: str, settings: dict, plan: dict) -> None:
    """Begin a build, or find that the one that is there was begun with the same.

    Another index alone is accepted, where one process builds: the first may have failed.

    Args:
        path (str): the directory.
        settings (dict): everything that decides the content.
        plan (dict): how it is cut into chunks and shards.

    Raises:
        UserError: if it was begun with others, or the directory has files of our names that are
            not ours.
    """
    now = {"settings": settings, "plan": plan}
    if not is_unfinished(path):
        refuse_foreign(path)
        _save_settings(path, now)
        return
    before = _load_settings(path)
    if before["plan"] == plan and plan["num_shards"] == 1 and "index" in settings:
        changed = before["settings"].get("index") != settings["index"]
        before["settings"]["index"] = settings["index"]
        if changed and before == now:
            shutil.rmtree(os.path.join(path, INDEX_WORK), ignore_errors=True)
            _save_settings(path, now)
    if before != now:
        raise UserError(
            f"{path} holds an unfinished datastore that was begun with "
            f"other settings ({'; '.join(_differences(before, now))}); repeat them, or pass "
            "--overwrite"
        )


def _save_settings(path: str, value: dict) -> None:
    write_atomically(os.path.join(path, SETTINGS), json.dumps(value, indent=1).encode())


def _load_settings(path: str) -> dict:
    file = os.path.join(path, SETTINGS)
    try:
        value = parse_json(_read_if_there(file))
        if not all(isinstance(value.get(part), dict) for part in ("settings", "plan")):
            raise ValueError("it lacks settings or plan")
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}), so that the build that it is of cannot go on: pass "
            "--overwrite to build the datastore anew"
        ) from None
    return value


def _differences(before: dict, now: dict) -> list[str]:
    return sorted(
        f"{name} was {_brief(before[part].get(name))}, is {_brief(now[part].get(name))}"
        for part in now
        for name in {**before[part], **now[part]}
        if before[part].get(name) != now[part].get(name)
    )


def _brief(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- what is written -------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of a journal: a chunk that is on the disk."""

    chunk: int
    keys_checksum: str
    values_checksum: str


def journal_line(entry: Entry) -> bytes:
    """A line as it stands in a journal."""
    return " ".join(map(str, entry)).encode() + b"\n"


def parse_journal(data: bytes) -> list[Entry]:
    """The whole lines of a journal; a line that a kill cut short does not count."""
    lines = re.findall(rb"^(\d{1,18}) ([0-9a-f]{8}) ([0-9a-f]{8})\n", data, flags=re.MULTILINE)
    return [Entry(int(chunk), *(s.decode() for s in checksums)) for chunk, *checksums in lines]


class Journal:
    """What one shard of a build has written.

    Args:
        path (str): the directory of the datastore.
        shard (str): ``2-of-8``, say.
    """

    def __init__(self, path: str, shard: str):
        self._path = os.path.join(path, f"building-{shard}.journal")
        self._file: Optional[object] = None

    def resume(self, is_on_disk: Callable[[Entry], bool]) -> list[int]:
        """The chunks that need not be written again; all other lines are dropped.

        Args:
            is_on_disk (callable): whether the rows of a chunk are on the disk as its line says.

        Returns:
            list of int: numbers of chunks.

        Raises:
            OSError: if the journal cannot be read or written.
        """
        data = _read_if_there(self._path)
        entries = [entry for entry in parse_journal(data) if is_on_disk(entry)]
        kept = b"".join(map(journal_line, entries))
        if kept != data:
            write_atomically(self._path, kept)
        return [entry.chunk for entry in entries]

    def open(self, stack: contextlib.ExitStack) -> None:
        """Open the file for ``append``; *stack* closes it."""
        self._file = stack.enter_context(open(self._path, "ab", buffering=0))

    def append(self, entry: Entry) -> None:
        """Add a line, once the rows of its chunk are written.

        Raises:
            OSError: if it cannot be written.
        """
        write_all(self._file, journal_line(entry))


def read_journals(path: str, num_shards: int, num_chunks: int) -> list[list[Entry]]:
    """The lines of the journals of all shards that were begun.

    Args:
        path (str): the directory of the datastore.
        num_shards (int): of the build.
        num_chunks (int): of all shards together.

    Raises:
        OSError: if one cannot be read.
        UserError: if there is one of no shard of this build, or a line of no chunk of it.
    """
    names = [name for name in _shard_files(path, "journal") if not name.endswith(".tmp")]
    journals = [parse_journal(_read_if_there(os.path.join(path, name))) for name in names]
    shards = {f"{number + 1}-of-{num_shards}" for number in range(num_shards)}
    for name, entries in zip(names, journals):
        beyond = [entry.chunk for entry in entries if entry.chunk >= num_chunks]
        if beyond or _SHARD_FILE.fullmatch(name)["shard"] not in shards:
            raise UserError(
                f"{os.path.join(path, name)} is no journal of this build, which has {num_shards} "
                f"shards and {num_chunks} chunks"
                + (f": it has a line of chunk {beyond[0]}" if beyond else "")
                + "; pass --overwrite to build the datastore anew"
            )
    return journals


def _read_if_there(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


# -- traces ----------------------------------------------------------------------------------------


def _shard_files(path: str, kind: str = "") -> list[str]:
    """Names of the locks and journals of all shards, or of those of one kind."""
    matches = map(_SHARD_FILE.fullmatch, sorted(os.listdir(path)))
    return [match[0] for match in matches if match and kind in ("", match["kind"])]


def remove_traces(path: str) -> None:
    """Remove what only a build in progress needs."""
    shutil.rmtree(os.path.join(path, INDEX_WORK), ignore_errors=True)
    for name in (*_shard_files(path), SETTINGS, f"{SETTINGS}.tmp", LOCK):
        with contextlib.suppress(FileNotFoundError):  # another shard may be doing the same
            os.remove(os.path.join(path, name))


def remove_build(path: str, shard: str) -> None:
    """Remove a datastore, finished or not, and nothing else; the manifest first.

    Args:
        path (str): the directory.
        shard (str): whose lock this process holds.

    Raises:
        UserError: if another process is at work on it, or reads it.
    """
    for name in _shard_files(path):
        other = _SHARD_FILE.fullmatch(name)["shard"]
        if other != shard:
            with lock_shard(path, other):
                pass  # nobody works on it
    with kept_from_readers(path):
        for name in PARTS:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(path, name))
    shutil.rmtree(os.path.join(path, INDEX_WORK), ignore_errors=True)
    for name in _shard_files(path, "journal"):
        os.remove(os.path.join(path, name))


def refuse_finished(path: str) -> None:
    """Refuse to build over a finished datastore.

    What a build that was killed after its manifest left behind is removed, where it can be.

    Raises:
        UserError: if there is one at *path*.
    """
    if os.path.exists(os.path.join(path, MANIFEST)):
        with contextlib.suppress(OSError):  # they stay on a disk that must not be written
            remove_traces(path)
        raise UserError(
            f"{path} holds a finished datastore; pass --overwrite to build it "
            "anew, or another --knn-datastore"
        )


def refuse_foreign(path: str) -> None:
    """Refuse to replace files of our names that are no datastore of ours.

    Raises:
        UserError: naming them.
    """
    folders = [name for name in PARTS if os.path.isdir(os.path.join(path, name))]
    if folders:
        raise UserError(
            f"{path} has a directory where {', '.join(folders)} would be written: not made by this "
            "tool; use another --knn-datastore"
        )
    names = (MANIFEST, KEYS, VALUES, POSITIONS, INDEX)
    present = [name for name in names if os.path.exists(os.path.join(path, name))]
    if not present or is_unfinished(path):
        return
    if b'"format_version"' not in _read_if_there(os.path.join(path, MANIFEST)):
        raise UserError(
            f"{path} has {', '.join(present)}, but no {MANIFEST} or "
            f"{SETTINGS} of ours: not begun by this tool; use another --knn-datastore"
        )
