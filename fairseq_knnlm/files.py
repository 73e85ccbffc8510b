"""Files: written whole or not at all, JSON without infinities, checksums, and early refusals.

Everything that the package writes goes through these functions, but for the keys and values of a
datastore, which are written in place (``datastore.arrays``), and the index, which FAISS writes.
"""

import contextlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Optional

from .errors import UserError

# Bytes that have a checksum of their own: what is damaged is named to this precision.
SEGMENT_BYTES = 1 << 24
_PIECE_BYTES = 1 << 18


# -- checksums -------------------------------------------------------------------------------------


def checksum(data) -> str:
    """CRC-32 of bytes or of an array's memory, as 8 hexadecimal digits."""
    return f"{zlib.crc32(_bytes_of(data)):08x}"


def checksum_of_range(file, first: int, count: int) -> str:
    """CRC-32 of a range of bytes of a file, read in pieces that stay in a core's cache.

    Threads may read one file at a time: its position is not used.

    Args:
        file: a binary file, open for reading.
        first (int): the first byte.
        count (int): how many; of those that the file does not have there are none.

    Raises:
        OSError: if it cannot be read.
    """
    value, piece = 0, memoryview(bytearray(min(count, _PIECE_BYTES)))
    while count:
        read = os.preadv(file.fileno(), [piece[:count]], first)
        if not read:
            break
        value = zlib.crc32(piece[:read], value)
        first, count = first + read, count - read
    return f"{value:08x}"


def _bytes_of(data) -> memoryview:
    """The memory of bytes or of an array; that of an array without elements cannot be cast."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def file_checksums(path: str) -> list[str]:
    """CRC-32 of every ``SEGMENT_BYTES`` of a file."""
    with open(path, "rb") as file:
        return [checksum(data) for data in iter(lambda: file.read(SEGMENT_BYTES), b"")]


def damaged_ranges(path: str, checksums: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Read a whole file and compare it with its checksums.

    Args:
        path (str): the file.
        checksums (sequence of str): from ``file_checksums``, when it was written.

    Yields:
        tuple of int: first and last byte of each segment that is not what was written.

    Raises:
        OSError: if it cannot be read.
    """
    size_bytes = os.path.getsize(path)
    pairs = itertools.zip_longest(file_checksums(path), checksums)
    for number, (actual, expected) in enumerate(pairs):
        if actual != expected:
            first = number * SEGMENT_BYTES
            yield first, min(first + SEGMENT_BYTES, size_bytes) - 1


def render(value: dict) -> bytes:
    """The one byte representation, as JSON, of a dict together with the checksum of the rest of it.

    Args:
        value (dict): JSON; a ``checksum`` in it is replaced.

    Returns:
        bytes: the file. Read back and rendered again it is the same, unless somebody edited it.
    """
    rest = {name: part for name, part in value.items() if name != "checksum"}
    rest["checksum"] = checksum(json.dumps(rest, sort_keys=True).encode())
    return json.dumps(rest, indent=1, sort_keys=True).encode() + b"\n"


def parse_json(data: bytes) -> dict:
    """A JSON object of finite numbers.

    Raises:
        ValueError: saying why the bytes are none.
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, got a {type(value).__name__}")
    return value


def is_rendered(data: bytes, value: dict) -> bool:
    """Whether bytes are what ``render`` makes of what was read from them, checksum included.

    Args:
        data (bytes): of a file.
        value (dict): from ``parse_json``.
    """
    try:
        return data == render(value)
    except RecursionError:  # nested more deeply than can be written
        return False


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


# -- writing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str):
    """A file to write that takes its name when it is whole, also after a power cut.

    Yields:
        a binary file; it is removed again if the block ends with an exception.

    Raises:
        OSError: if it cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_atomically(path: str, data: bytes) -> None:
    """Write a file that is either whole or not there, also after a power cut.

    Args:
        path (str): replaced if it is there.
        data (bytes): all that it is to hold.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_file(path) as file:
        file.write(data)


def write_all(file, data) -> None:
    """Write to an unbuffered file, which may take less than all at a time.

    Args:
        file: a binary file, opened with ``buffering=0``.
        data: bytes, or an array that is contiguous in memory.

    Raises:
        OSError: if it cannot be written; a part of *data* may be.
    """
    data = _bytes_of(data)
    while data:
        data = data[file.write(data) :]


def without_infinities(value):
    """The same with None for every number that JSON does not have: infinities and nan.

    Args:
        value: what JSON can hold. Dictionaries, lists and tuples are copied, tuples as lists.
    """
    if isinstance(value, dict):
        return {name: without_infinities(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_bytes(value) -> bytes:
    """JSON that every reader takes, one line an entry: null for infinities and nan."""
    return json.dumps(without_infinities(value), indent=1, allow_nan=False).encode()


def write_json(path: str, value) -> None:
    """Write JSON that every reader takes; the file is either whole or not there.

    Args:
        path (str): replaced if it is there.
        value: what JSON can hold, and infinities and nan, in whose place null is written.

    Raises:
        OSError: if it cannot be written.
    """
    write_atomically(path, json_bytes(value))


# -- refusing before any work ----------------------------------------------------------------------


def refuse_unwritable(flag: str, path: str) -> None:
    """Refuse, before any work, a file that could not be written after it.

    Args:
        flag (str): that named it.
        path (str): of a file, there already or not.

    Raises:
        UserError: naming the flag.
    """
    # A device or a pipe would be replaced by the file.
    is_other = os.path.exists(path) and not os.path.isfile(path)
    if not path or is_other or not _is_writable_directory(os.path.dirname(path) or "."):
        raise UserError(
            f"{flag} {path} cannot be written: it must name a file in a directory that is there "
            "and writable"
        )


def refuse_unwritable_outputs(outputs: dict[str, Optional[str]]) -> None:
    """Refuse the files of a command of which one could not be written, or would replace another.

    Args:
        outputs (dict): by flag, the file that it names; None: none.

    Raises:
        UserError: naming the flags.
    """
    flags: dict[str, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        refuse_unwritable(flag, path)
        other = flags.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise UserError(f"{other} and {flag} name the same file, {path}: name two")


def refuse_unwritable_directory(flag: str, path: str) -> None:
    """Refuse, before any work, a directory that nothing could be written into after it.

    Args:
        flag (str): that named it.
        path (str): of a directory, there already or not; if not, its parent must be.

    Raises:
        UserError: naming the flag.
    """
    exists = os.path.exists(path)
    existing = path if exists else os.path.dirname(os.path.abspath(path))
    if not path or not _is_writable_directory(existing):
        raise UserError(
            f"{flag} {path} cannot be written: it must name a directory, one that is there and "
            "writable or a new one in such a directory"
        )


def _is_writable_directory(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)
