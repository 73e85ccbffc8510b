"""The files of a datastore by name, and the shapes and bytes of its arrays."""

import io

import numpy as np

MANIFEST = "manifest.json"
KEYS, VALUES, POSITIONS, INDEX = "keys.npy", "values.npy", "positions.npy", "index.faiss"
KEY_DTYPE, POSITION_DTYPE = np.dtype("float16"), np.dtype("int64")

# By the name of a file, the shape and dtype of its array.
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


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
