"""What a datastore is on disk, and opening one only if it is whole.

A datastore is a directory that explains itself:

- ``manifest.json``, written last: what is in it, of which model and text, with checksums;
- ``keys.npy``, float16, shape (N, D), and ``values.npy``, the smallest unsigned integer that
  holds the vocabulary, shape (N,), both in corpus order: the context of row i is the values
  before it;
- ``index.faiss``, the search structure over the keys;
- ``tuned.json``, only where ``fairseq-knnlm-tune`` has run: the setting that it chose.
"""

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterator

import numpy as np

from .errors import UserError

FORMAT_VERSION = 1
MANIFEST, SETTINGS = "manifest.json", "building.json"
KEYS, VALUES, INDEX = "keys.npy", "values.npy", "index.faiss"
TUNED = "tuned.json"
SEGMENT_BYTES = 1 << 24


def checksum(data) -> str:
    """CRC-32 of bytes or of an array's memory, as 8 hexadecimal digits."""
    return f"{zlib.crc32(memoryview(data).cast('B')):08x}"


def file_checksums(path: str) -> list:
    """CRC-32 of every ``SEGMENT_BYTES`` of a file."""
    with open(path, "rb") as file:
        return [checksum(data) for data in iter(lambda: file.read(SEGMENT_BYTES), b"")]


def render(manifest: dict) -> bytes:
    """The one byte representation of a manifest, which holds the checksum of the rest of it."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    rest["checksum"] = checksum(json.dumps(rest, sort_keys=True).encode())
    return json.dumps(rest, indent=1, sort_keys=True).encode() + b"\n"


@contextlib.contextmanager
def atomic_file(path: str):
    """A file to write that takes its name when it is whole, also after a power cut."""
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
    """Write a file that is either whole or not there, also after a power cut."""
    with atomic_file(path) as file:
        file.write(data)


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The bytes in front of the data of a C-ordered ``.npy`` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": tuple(shape),
        },
    )
    return buffer.getvalue()


class Datastore:
    """A finished datastore, opened for reading.

    Attributes:
        path (str): the directory.
        manifest (dict): what it says of itself.
        keys (ndarray): shape (N, D), float16, memory-mapped.
        values (ndarray): shape (N,), unsigned, memory-mapped.
    """

    def __init__(self, path: str, manifest: dict):
        self.path = path
        self.manifest = manifest
        self.keys = np.load(os.path.join(path, KEYS), mmap_mode="r")
        self.values = np.load(os.path.join(path, VALUES), mmap_mode="r")

    @classmethod
    def open(cls, path: str) -> "Datastore":
        """Open a datastore after checking that it is whole: files, sizes, shapes.

        Raises:
            UserError: if there is none, or it is unfinished, truncated or of another format.

        >>> datastore = Datastore.open(directory)
        >>> datastore.keys.shape == (len(datastore), datastore.dimension)
        True
        >>> context, value = datastore.values[:7], datastore.values[7]  # in corpus order
        """
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            _check_size(os.path.join(path, name), entry["size_bytes"])
        for name, shape, dtype in _layout(manifest):
            header = npy_header(shape, dtype)
            with open(os.path.join(path, name), "rb") as file:
                if file.read(len(header)) != header:
                    raise UserError(
                        f"fairseq_knnlm: {os.path.join(path, name)} is no {dtype} array of shape "
                        f"{shape}, as its manifest says; the datastore is damaged, build it again"
                    )
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest["count"]

    @property
    def dimension(self) -> int:
        """D, the size of a key."""
        return self.manifest["dimension"]

    @property
    def index_path(self) -> str:
        """Where the FAISS index lies."""
        return os.path.join(self.path, INDEX)

    def verify(self) -> Iterator[str]:
        """Read everything; yield one line for each byte range that is not what was written."""
        ends = self.manifest["chunks"]["rows"]
        for name, array in ((KEYS, self.keys), (VALUES, self.values)):
            header_bytes = len(npy_header(array.shape, array.dtype))
            row_bytes = array.nbytes // max(len(array), 1)
            for start, stop, expected in zip([0] + ends, ends, self.manifest["chunks"][name]):
                if checksum(np.ascontiguousarray(array[start:stop])) != expected:
                    first, last = header_bytes + start * row_bytes, header_bytes + stop * row_bytes
                    yield f"{name}: damaged between bytes {first} and {last - 1}"
        expected = self.manifest["files"][INDEX]["checksums"]
        for number, found in enumerate(file_checksums(self.index_path)):
            if found != expected[number]:
                first = number * SEGMENT_BYTES
                last = min(first + SEGMENT_BYTES, os.path.getsize(self.index_path)) - 1
                yield f"{INDEX}: damaged between bytes {first} and {last}"


def read_manifest(path: str) -> dict:
    """The manifest of a finished datastore.

    Raises:
        UserError: if there is none, it cannot be read, or it is of a version we do not know.
    """
    if not os.path.isdir(path):
        raise UserError(f"fairseq_knnlm: no datastore at {path}: no such directory")
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            data = file.read()
        manifest = json.loads(data)
        version = manifest["format_version"]
    except FileNotFoundError:
        state = (
            "is unfinished: run the same fairseq-knnlm-build command again and it goes on"
            if os.path.exists(os.path.join(path, SETTINGS))
            else f"is no datastore: it has no {MANIFEST}"
        )
        raise UserError(f"fairseq_knnlm: {path} {state}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"fairseq_knnlm: {path}/{MANIFEST} is damaged: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"fairseq_knnlm: {path} has format version {version}, this release reads version "
            f"{FORMAT_VERSION}: use another release or build it again"
        )
    if data != render(manifest):
        raise UserError(
            f"fairseq_knnlm: {path}/{MANIFEST} is damaged or was edited: its checksum does not "
            "match; build the datastore again"
        )
    return manifest


def _layout(manifest: dict):
    """Name, shape and dtype of the two arrays."""
    count, dimension = manifest["count"], manifest["dimension"]
    yield KEYS, (count, dimension), np.dtype(manifest["files"][KEYS]["dtype"])
    yield VALUES, (count,), np.dtype(manifest["files"][VALUES]["dtype"])


def _check_size(path: str, expected: int) -> None:
    try:
        found = os.path.getsize(path)
    except FileNotFoundError:
        raise UserError(f"fairseq_knnlm: {path} is missing; build the datastore again") from None
    if found != expected:
        raise UserError(
            f"fairseq_knnlm: {path} has {found} bytes where its manifest says {expected}: "
            "truncated or overwritten; build the datastore again"
        )
