"""Reading a datastore, only if it is whole; and where in its text a row stands."""

import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import UserError
from ..files import checksum, damaged_ranges
from .manifest import (
    INDEX,
    KEYS,
    POSITION_DTYPE,
    POSITIONS,
    VALUES,
    check_files,
    npy_header,
    read_manifest,
)


class Datastore:
    """A finished datastore, opened for reading with ``Datastore.open``.

    Attributes:
        path (str): the directory.
        manifest (dict): what it says of itself, see ``datastore.manifest``.
        keys (ndarray): shape (N, D), float16, memory-mapped.
        values (ndarray): shape (N,), unsigned, memory-mapped; the value of row i belongs to the
            key of row i.
    """

    def __init__(self, path: str, manifest: dict):
        """Only ``open`` calls this, after it has checked the files."""
        self.path = path
        self.manifest = manifest
        self.keys = self._map(KEYS)
        self.values = self._map(VALUES)
        self._positions = self._map(POSITIONS) if POSITIONS in manifest["files"] else None

    @classmethod
    def open(cls, path: str) -> "Datastore":
        """Open a datastore after checking that it is whole: files, sizes, shapes.

        Args:
            path (str): the directory.

        Raises:
            UserError: if there is none, or it is unfinished, truncated or of another format.

        >>> datastore = Datastore.open(directory)
        >>> datastore.keys.shape == (len(datastore), datastore.dimension)
        True
        >>> before, after = datastore.context(7, before=5, after=2)  # around datastore.values[7]
        >>> before.tolist() == datastore.text[2:7].tolist()
        True
        """
        manifest = read_manifest(path)
        check_files(path, manifest)
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest["count"]

    @property
    def dimension(self) -> int:
        """D, numbers of a stored key."""
        return self.manifest["dimension"]

    @property
    def model_dimension(self) -> int:
        """Numbers of the model's state that a key is made of."""
        return self.manifest.get("model_dimension", self.dimension)

    @property
    def index_path(self) -> str:
        """Where the FAISS index lies."""
        return os.path.join(self.path, INDEX)

    # -- rows and the text -----------------------------------------------------------------------

    def positions(self, rows: Sequence[int]) -> np.ndarray:
        """Where the values of rows stand in the text.

        Args:
            rows (sequence of int): shape (n,), each in [0, N).

        Returns:
            ndarray: shape (n,), int64, positions in ``text``, from 0.

        Raises:
            UserError: if there is no such row.
        """
        rows = np.asarray(rows)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size or (rows.size and rows.dtype.kind not in "iu"):
            first = outside.flat[0] if outside.size else rows.flat[0]
            raise UserError(f"rows of {self.path} must be in [0, {len(self)}), got {first}")
        rows = rows.astype(POSITION_DTYPE)
        return rows if self._positions is None else np.asarray(self._positions[rows])

    @functools.cached_property
    def text(self) -> np.ndarray:
        """The text of the datastore: shape (T,), token ids in their order.

        Every token of the text is the value of one row, unless rows were left out when the
        datastore was made: their tokens are not stored anywhere, and -1 stands in their places.
        What is counted in such a text, lines for example, misses those.

        Raises:
            UserError: if two rows have one position, or a position is negative.
        """
        if self._positions is None:
            return self.values
        positions = np.asarray(self._positions)
        length = int(positions.max()) + 1 if len(positions) else 0
        stored = np.zeros(length, dtype=bool)
        stored[positions[positions >= 0]] = True
        if np.count_nonzero(stored) != len(positions):
            raise UserError(
                f"{os.path.join(self.path, POSITIONS)} does not name one place in the text for "
                "each row; the datastore is damaged, build it again"
            )
        dtype = self.values.dtype
        if length == len(positions):
            text = np.empty(length, dtype)
        else:  # A signed type that holds all token ids.
            text = np.full(length, -1, dtype=f"i{min(2 * dtype.itemsize, 8)}")
        text[positions] = self.values
        return text

    def context(self, row: int, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens around the value of a row in the text.

        Where rows were left out of the datastore, so are their tokens of the context, which is
        shorter by them. The others keep their order; none from further away takes their place.

        Args:
            row (int): in [0, N).
            before (int): places in front of the value that are looked at, >= 0.
            after (int): places behind it, >= 0.

        Returns:
            tuple of ndarray: token ids in front of the value, at most *before* of them, and behind
            it, at most *after*; fewer at the ends of the text.

        Raises:
            UserError: if there is no such row, or a number is negative.
        """
        if before < 0 or after < 0:
            raise UserError(f"before and after must be >= 0, got {before} and {after}")
        (position,) = self.positions([row])
        sides = (
            self.text[max(0, position - before) : position],
            self.text[position + 1 : position + 1 + after],
        )
        return tuple(np.asarray(tokens[tokens >= 0]) for tokens in sides)

    # -- reading everything ----------------------------------------------------------------------

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
        for name, entry in self.manifest["files"].items():
            if "checksums" in entry:
                path = os.path.join(self.path, name)
                for first, last in damaged_ranges(path, entry["checksums"]):
                    yield f"{name}: damaged between bytes {first} and {last}"

    def _map(self, name: str) -> np.ndarray:
        return np.load(os.path.join(self.path, name), mmap_mode="r")
