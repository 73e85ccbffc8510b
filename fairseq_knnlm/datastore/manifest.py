"""What a datastore is on disk: the names of its files, their layout, the fields of its manifest.

A datastore is a directory that explains itself:

- ``manifest.json``, written last: what is in it, of which model and text, with checksums;
- ``keys.npy``, float16, shape (N, D), and ``values.npy``, the smallest unsigned integer that
  holds the vocabulary, shape (N,);
- ``positions.npy``, int64, shape (N,): the position in the text of the value of each row. Only
  where that is not the number of the row: without it row i is position i;
- ``index.faiss``, the search structure over the keys;
- ``tuned.json``, only where ``fairseq-knnlm-tune`` has run: the setting that it chose.

Fields of the manifest:

- ``format_version`` (int) and ``checksum``, of all other fields;
- ``count`` (int): N; ``dimension`` (int): D, numbers of a stored key; ``model_dimension`` (int):
  numbers of the model's state that a key is made of, absent where it is D;
- ``files``: by name, ``size_bytes``, of an array its ``dtype``, and ``checksums`` of the segments
  of a file that is not in ``chunks``;
- ``chunks``: ``rows``, the row behind each chunk, and of ``keys.npy`` and ``values.npy`` a checksum
  for each chunk;
- ``index``: what ``search.factory`` says of the index;
- whatever the builder was given as settings and learnt at its end: ``key``, ``metric``, ``model``,
  ``dictionary``, ``data``, ``context``, ``versions`` and ``temperature`` of
  ``fairseq-knnlm-build``.
"""

import io
import json
import os
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..files import file_checksums, render

FORMAT_VERSION = 1
MANIFEST, SETTINGS = "manifest.json", "building.json"
KEYS, VALUES, POSITIONS, INDEX = "keys.npy", "values.npy", "positions.npy", "index.faiss"
TUNED = "tuned.json"
KEY_DTYPE, POSITION_DTYPE = np.dtype("float16"), np.dtype("int64")

# By the name of a file, the shape and dtype of its array.
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


# -- layout ----------------------------------------------------------------------------------------


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The bytes in front of the data of a C-ordered ``.npy`` file.

    Args:
        shape (tuple of int): of the array.
        dtype (numpy.dtype): of the array.
    """
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


def npy_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The size of a C-ordered ``.npy`` file.

    Args:
        shape (tuple of int): of the array.
        dtype (numpy.dtype): of the array.
    """
    items = 1
    for size in shape:
        items *= int(size)
    return len(npy_header(shape, dtype)) + items * dtype.itemsize


def array_layout(count: int, dimension: int, dtype: np.dtype) -> Layout:
    """The arrays that a dump writes.

    Args:
        count (int): N.
        dimension (int): D.
        dtype (numpy.dtype): of the values.
    """
    return {KEYS: ((count, dimension), KEY_DTYPE), VALUES: ((count,), np.dtype(dtype))}


def manifest_layout(manifest: dict) -> Layout:
    """The arrays of a datastore, as its manifest says."""
    count, files = manifest["count"], manifest["files"]
    layout = array_layout(count, manifest["dimension"], np.dtype(files[VALUES]["dtype"]))
    if POSITIONS in files:
        layout[POSITIONS] = ((count,), POSITION_DTYPE)
    return layout


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


def read_manifest(path: str) -> dict:
    """The manifest of a finished datastore.

    Raises:
        UserError: if there is none, it cannot be read, or it is of a version we do not know.
    """
    if not os.path.isdir(path):
        raise UserError(f"no datastore at {path}: no such directory")
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
        raise UserError(f"{path} {state}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/{MANIFEST} is damaged: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this release reads version "
            f"{FORMAT_VERSION}: use another release or build it again"
        )
    if data != render(manifest):
        raise UserError(
            f"{path}/{MANIFEST} is damaged or was edited: its checksum does not "
            "match; build the datastore again"
        )
    return manifest


def check_files(path: str, manifest: dict) -> None:
    """Compare the files of a datastore with its manifest: sizes, and the headers of the arrays.

    Args:
        path (str): the directory.
        manifest (dict): from ``read_manifest``.

    Raises:
        UserError: naming the first file that is not as the manifest says.
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
