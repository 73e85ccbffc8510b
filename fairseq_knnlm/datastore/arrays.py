"""Keys and values while they are written: at full size from the start, each row in its place."""

import contextlib
import os

import numpy as np

from ..errors import UserError
from ..files import checksum, write_all
from .manifest import Layout, npy_bytes, npy_header


class Arrays:
    """The ``.npy`` files of a directory, written a range of rows at a time, in any order.

    Several processes may write different rows of the same files.

    Args:
        path (str): the directory.
        layout (dict): from ``manifest.array_layout``.
    """

    def __init__(self, path: str, layout: Layout):
        self.layout = layout
        self._path = path
        self._files: dict = {}

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(npy_bytes(*each) for each in self.layout.values())

    def allocate(self) -> None:
        """Give the files their headers and sizes; rows that are there stay."""
        for name, (shape, dtype) in self.layout.items():
            path = os.path.join(self._path, name)
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                file.write(npy_header(shape, dtype))
                file.truncate(npy_bytes(shape, dtype))

    def open(self, stack: contextlib.ExitStack) -> None:
        """Open the files for ``write`` and ``checksums``; *stack* closes them."""
        for name in self.layout:
            path = os.path.join(self._path, name)
            self._files[name] = stack.enter_context(open(path, "r+b", buffering=0))

    def check(self, name: str, start: int, stop: int, rows: np.ndarray) -> None:
        """Refuse rows that do not belong into a file.

        Args:
            name (str): of the file.
            start, stop (int): numbers of the first row and of the one after the last.
            rows (ndarray): what is to be written there.

        Raises:
            UserError: if shape or dtype are others than in the layout.
        """
        shape, dtype = self.layout[name]
        shape = (stop - start, *shape[1:])
        if rows.shape != shape or rows.dtype != dtype:
            raise UserError(
                f"rows {start} to {stop} of {name} must be {dtype} of shape {shape}, got "
                f"{rows.dtype} of shape {rows.shape}"
            )

    def write(self, name: str, start: int, rows: np.ndarray) -> str:
        """Write rows; they are in the operating system's hands when this returns, see ``sync``.

        Args:
            name (str): of the file.
            start (int): number of the first row.
            rows (ndarray): shape and dtype as in the layout, but for their number.

        Returns:
            str: their checksum.

        Raises:
            OSError: if they cannot be written; a part of them may be.
        """
        rows = np.ascontiguousarray(rows)
        self._files[name].seek(self._offset(name, start))
        write_all(self._files[name], rows)
        return checksum(rows)

    def checksums(self, start: int, stop: int) -> list[str]:
        """Read rows back: a checksum for each file, in the order of the layout.

        Args:
            start, stop (int): the first row and the one after the last.
        """
        return [checksum(self._read(name, start, stop)) for name in self.layout]

    def _read(self, name: str, start: int, stop: int) -> bytes:
        begin, end = self._offset(name, start), self._offset(name, stop)
        self._files[name].seek(begin)
        return self._files[name].read(end - begin)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def map(self, name: str) -> np.ndarray:
        """An array as it is on the disk now, memory-mapped."""
        return np.load(os.path.join(self._path, name), mmap_mode="r")

    def _offset(self, name: str, row: int) -> int:
        shape, dtype = self.layout[name]
        return len(npy_header(shape, dtype)) + row * int(np.prod(shape[1:])) * dtype.itemsize
