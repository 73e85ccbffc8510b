"""Reading a datastore, only if it is whole; and where in its text a row stands."""

import contextlib
import functools
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Optional, Union

import numpy as np

from ..errors import UserError
from ..files import damaged_ranges
from .layout import INDEX, KEYS, MANIFEST, POSITION_DTYPE, POSITIONS, VALUES
from .manifest import check_files, manifest_layout, parse_manifest, reading
from .reading_lock import open_for_reading
from .row_checks import RowChecks, refusal


class Datastore:
    """A finished datastore, opened for reading with ``Datastore.open``.

    As long as it lives, ``fairseq-knnlm-build --overwrite`` does not replace its files.

    Attributes:
        path (str): the directory.
        manifest (dict): what it says of itself, see ``datastore.manifest``.
        keys (ndarray): shape (N, D), float16, memory-mapped. They are verified by who is about to
            use them, see ``check_rows``.
    """

    def __init__(self, path: str, manifest_file: BinaryIO, verify: bool):
        """Only ``open`` calls this, after it has locked the directory.

        Args:
            path (str): the directory.
            manifest_file (BinaryIO): its manifest, open and locked.
            verify (bool): as for ``open``.
        """
        self.path = path
        weakref.finalize(self, manifest_file.close)  # the lock lasts as long as the file is open
        self._manifest_bytes = manifest_file.read()
        self.manifest = parse_manifest(path, self._manifest_bytes)
        check_files(path, self.manifest)
        self._verify = verify
        self._maps = {name: self._map(name) for name in manifest_layout(self.manifest)}
        self._checks = {name: self._row_checks(name) for name in (KEYS, VALUES)}
        self.keys = self._maps[KEYS]

    @classmethod
    def open(cls, path: str, verify: bool = True) -> "Datastore":
        """Open a datastore after checking that it is whole: files, sizes, shapes.

        Args:
            path (str): the directory.
            verify (bool): compare with its checksum what is read, when it is read first: the chunk
                that a key is in, all values, the index.

        Raises:
            UserError: if there is none, it cannot be read, or it is unfinished, truncated or of
                another format.

        >>> datastore = Datastore.open(directory)
        >>> datastore.keys.shape == (len(datastore), datastore.dimension)
        True
        >>> before, after = datastore.context(7, before=5, after=2)  # around datastore.values[7]
        >>> before.tolist() == datastore.text[2:7].tolist()
        True
        """
        with reading(path), contextlib.ExitStack() as stack:
            file = stack.enter_context(open_for_reading(path))
            datastore = cls(path, file, verify)
            stack.pop_all()  # it stays open
        return datastore

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

    @functools.cached_property
    def values(self) -> np.ndarray:
        """Shape (N,), unsigned, memory-mapped; that of row i belongs to the key of row i.

        Raises:
            UserError: if they are not what was written.
        """
        if self._verify:
            self._checks[VALUES].all_rows()
        return self._maps[VALUES]

    # -- verifying what is read ------------------------------------------------------------------

    def check_rows(self, rows: Union[range, np.ndarray]) -> None:
        """Verify keys that are about to be used, each chunk of them once in a process.

        Args:
            rows (range or ndarray of int): of any shape and in any order; negative ones are none.

        Raises:
            UserError: if a chunk of theirs is not what was written, naming its bytes. Without
                *verify* of ``open``, never.
        """
        if self._verify:
            self._checks[KEYS](rows)

    @contextlib.contextmanager
    def reading_index(self) -> Iterator[str]:
        """Verify the index; held while it is read.

        Yields:
            str: its file.

        Raises:
            UserError: if it is not what was written; or, when it has been read, if the datastore
                has been replaced or removed meanwhile.
        """
        try:
            if self._verify:
                self._check_file(INDEX)
            yield self.index_path
        finally:
            self._refuse_replaced()

    def _check_file(self, name: str) -> None:
        """Refuse a file that is not what was written, by its checksums in the manifest."""
        path = os.path.join(self.path, name)
        with reading(self.path):
            for first, last in damaged_ranges(path, self.manifest["files"][name]["checksums"]):
                raise UserError(refusal(path, f"damaged between bytes {first} and {last}"))

    def _refuse_replaced(self) -> None:
        """Refuse a directory that is not any more what was opened, by its manifest."""
        with contextlib.suppress(OSError), open(os.path.join(self.path, MANIFEST), "rb") as file:
            if file.read() == self._manifest_bytes:
                return
        raise UserError(
            f"the datastore {self.path} was replaced or removed while it was read: run the command "
            "again with what is there now"
        )

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
        """Read everything; yield one line for each byte range that is not what was written.

        Raises:
            UserError: if a file cannot be read.
        """
        for name, checks in self._checks.items():
            yield from (f"{name}: {fault}" for fault in checks.faults())
        for name, entry in self.manifest["files"].items():
            if "checksums" in entry:
                path = os.path.join(self.path, name)
                with reading(self.path):
                    for first, last in damaged_ranges(path, entry["checksums"]):
                        yield f"{name}: damaged between bytes {first} and {last}"

    # -- files -----------------------------------------------------------------------------------

    def _map(self, name: str) -> np.ndarray:
        return np.load(os.path.join(self.path, name), mmap_mode="r")

    def _row_checks(self, name: str) -> RowChecks:
        chunks, array = self.manifest["chunks"], self._maps[name]
        path = os.path.join(self.path, name)
        return RowChecks(path, array.shape, array.dtype, chunks["rows"], chunks[name])

    @functools.cached_property
    def _positions(self) -> Optional[np.ndarray]:
        """Where in the text the value of each row stands; None: at the number of the row."""
        if POSITIONS in self._maps and self._verify:
            self._check_file(POSITIONS)
        return self._maps.get(POSITIONS)
