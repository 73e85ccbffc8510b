"""What a datastore is on disk: the names of its files, their layout, the fields of its manifest.

A datastore is a directory that explains itself:

- ``manifest.json``, written last: what is in it, of which model and text, with checksums;
- ``keys.npy``, float16, shape (N, D), and ``values.npy``, the smallest unsigned integer that
  holds the vocabulary, shape (N,);
- ``positions.npy``, int64, shape (N,): the position in the text of the value of each row. Only
  where that is not the number of the row: without it row i is position i;
- ``index.faiss``, the search structure over the keys;
- ``tuned.json``, only where ``fairseq-knnlm-tune`` has run: the setting that it chose; and
  ``gate.npz``, only where it fitted a gate: see ``gating.store``.

Fields of the manifest:

- ``format_version`` (int) and ``checksum``, of all other fields;
- ``count`` (int): N; ``dimension`` (int): D, numbers of a stored key; ``model_dimension`` (int):
  numbers of the model's state that a key is made of, absent where it is D;
- ``files``: by name, ``size_bytes``, of an array its ``dtype``, and ``checksums`` of the segments
  of a file that is not in ``chunks``;
- ``chunks``: ``rows``, the row behind each chunk, and of ``keys.npy`` and ``values.npy`` a checksum
  for each chunk;
- ``index``: what ``search.index_factory`` says of the index;
- whatever the builder was given as settings and learnt at its end: ``key``, ``metric``, ``model``,
  ``dictionary``, ``data``, ``context``, ``versions`` and ``temperature`` of
  ``fairseq-knnlm-build``.
"""

import contextlib
import os
from collections.abc import Sequence

from ..errors import UserError
from ..fields import is_whole
from ..files import file_checksums, is_rendered, parse_json
from .layout import (
    INDEX,
    KEYS,
    MANIFEST,
    POSITIONS,
    VALUES,
    Layout,
    array_layout,
    manifest_layout,
    npy_bytes,
    npy_header,
)
from .schema import FORMAT_VERSION, refuse_faulty

SETTINGS, TUNED, GATE = "building.json", "tuned.json", "gate.npz"
# All that a finished datastore has, or may have. Without the first there is none.
PARTS = MANIFEST, SETTINGS, TUNED, GATE, KEYS, VALUES, POSITIONS, INDEX

# The names of files and their layout are of this module too, for those who read or write them.
__all__ = [
    "FORMAT_VERSION",
    "GATE",
    "INDEX",
    "KEYS",
    "MANIFEST",
    "PARTS",
    "POSITIONS",
    "SETTINGS",
    "TUNED",
    "VALUES",
    "Layout",
    "array_layout",
    "check_files",
    "make_manifest",
    "manifest_layout",
    "npy_bytes",
    "npy_header",
    "open_manifest",
    "parse_manifest",
    "read_manifest",
    "reading",
    "refuse_part",
]


# -- writing and reading a manifest ----------------------------------------------------------------


def make_manifest(
    path: str,
    layout: Layout,
    model_dimension: int,
    chunk_ends: Sequence[int],
    chunk_checksums: dict,
    index: dict,
    others: dict,
) -> dict:
    """The manifest of a datastore whose other files are all written.

    Args:
        path (str): the directory.
        layout (dict): from ``array_layout``.
        model_dimension (int): numbers of the model's state that a key is made of.
        chunk_ends (sequence of int): the row behind each chunk.
        chunk_checksums (dict): for each file of *layout* the checksum of each chunk.
        index (dict): description of the index.
        others (dict): all further fields.

    Raises:
        OSError: if a file cannot be read.
    """
    count, dimension = layout[KEYS][0]
    files = {
        name: {"dtype": str(dtype), "size_bytes": os.path.getsize(os.path.join(path, name))}
        for name, (_, dtype) in layout.items()
    }
    index_path = os.path.join(path, INDEX)
    files[INDEX] = {
        "size_bytes": os.path.getsize(index_path),
        "checksums": file_checksums(index_path),
    }
    return {
        **others,
        "format_version": FORMAT_VERSION,
        "count": count,
        "dimension": dimension,
        "model_dimension": model_dimension,
        "index": index,
        "files": files,
        "chunks": {"rows": list(chunk_ends), **chunk_checksums},
    }


@contextlib.contextmanager
def reading(path: str):
    """Explain what the operating system says when files of a datastore cannot be read.

    Args:
        path (str): the directory.

    Raises:
        UserError: in place of an ``OSError``, naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else path
        raise UserError(
            f"cannot read the datastore {path}: {name}: {error.strerror or error}; its files must "
            "be there and readable for this user"
        ) from None


def read_manifest(path: str) -> dict:
    """The manifest of a finished datastore.

    Args:
        path (str): the directory.

    Raises:
        UserError: if there is none, it cannot be read, is of a version we do not know, or says what
            cannot be.
    """
    with reading(path), open_manifest(path) as file:
        return parse_manifest(path, file.read())


def open_manifest(path: str):
    """The manifest of a finished datastore as a file to read from.

    Args:
        path (str): the directory.

    Raises:
        UserError: if there is none.
        OSError: if it cannot be opened.
    """
    if not os.path.isdir(path):
        raise UserError(f"no datastore at {path}: no such directory")
    try:
        return open(os.path.join(path, MANIFEST), "rb")
    except FileNotFoundError:
        state = (
            "is unfinished: run the same fairseq-knnlm-build command again and it goes on"
            if os.path.exists(os.path.join(path, SETTINGS))
            else f"is no datastore: it has no {MANIFEST}"
        )
        raise UserError(f"{path} {state}") from None


def parse_manifest(path: str, data: bytes) -> dict:
    """What the bytes of a manifest say.

    Args:
        path (str): the directory, for messages.
        data (bytes): all of them.

    Raises:
        UserError: as ``read_manifest``.
    """
    try:
        manifest = parse_json(data)
    except ValueError as error:
        raise UserError(f"{path}/{MANIFEST} is damaged: {error}") from None
    version = manifest.get("format_version")
    if is_whole(version, 0) and version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this release reads version "
            f"{FORMAT_VERSION}: use another release or build it again"
        )
    if not is_rendered(data, manifest):
        raise UserError(
            f"{path}/{MANIFEST} is damaged or was edited: its checksum does not "
            "match; build the datastore again"
        )
    refuse_faulty(path, manifest)
    return manifest


def check_files(path: str, manifest: dict) -> None:
    """Compare the files of a datastore with its manifest: sizes, and the headers of the arrays.

    Args:
        path (str): the directory.
        manifest (dict): from ``read_manifest``.

    Raises:
        UserError: naming the first file that is not as the manifest says.
        OSError: if one cannot be read.
    """
    for name, entry in manifest["files"].items():
        _check_size(os.path.join(path, name), entry["size_bytes"])
    for name, (shape, dtype) in manifest_layout(manifest).items():
        header = npy_header(shape, dtype)
        with open(os.path.join(path, name), "rb") as file:
            if file.read(len(header)) != header:
                raise UserError(
                    f"{os.path.join(path, name)} is no {dtype} array of shape "
                    f"{shape}, as its manifest says; the datastore is damaged, build it again"
                )


def _check_size(path: str, expected: int) -> None:
    try:
        size_bytes = os.path.getsize(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; build the datastore again") from None
    if size_bytes != expected:
        raise UserError(
            f"{path} has {size_bytes} bytes where its manifest says {expected}: "
            "truncated or overwritten; build the datastore again"
        )


def refuse_part(flag: str, path: str) -> None:
    """Refuse a file to write that is one of a datastore, such as the ``tuned.json`` in it.

    Args:
        flag (str): that names the file.
        path (str): of the file.

    Raises:
        UserError: naming both.
    """
    folder, name = os.path.split(os.path.abspath(path))
    if name in PARTS and os.path.exists(os.path.join(folder, MANIFEST)):
        raise UserError(
            f"{flag} {path} would replace a file of the datastore {folder}: write it elsewhere, or "
            "by another name"
        )
