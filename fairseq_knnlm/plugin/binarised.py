"""The files of fairseq-preprocess, looked at before fairseq maps them into memory and trusts them.

A damaged index ends in one of several exceptions of Python's, or reads other tokens than were
written. A token that the dictionary does not have ends inside the model.
"""

import contextlib
import os

import numpy as np
from fairseq.data.indexed_dataset import _code_to_dtype, infer_dataset_impl

from ..errors import UserError

# What an index begins with, as MMapIndexedDataset of fairseq writes it. Behind it are int32 sizes
# and int64 offsets in bytes, one each a line.
_HEADER = np.dtype([("magic", "V9"), ("version", "<u8"), ("dtype", "u1"), ("lines", "<u8")])
_BEGINNING = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little")
_BYTES_PER_LINE = 4 + 8
# Tokens that are looked at at a time, so that memory is bounded.
_TOKENS_STEP = 1 << 24

_AGAIN = "run fairseq-preprocess again"


@contextlib.contextmanager
def read_as(path: str, what: str):
    """Name the file of whatever exception ends its reading by fairseq, which has none for damage.

    Args:
        path (str): the file.
        what (str): it should be, for the message.

    Raises:
        UserError: in place of all other exceptions but those of the operating system.
    """
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as {what}: {reason}; {_AGAIN}") from error


def refuse_damaged_split(prefix: str, types: int) -> None:
    """Refuse a split whose two files do not fit each other, or the dictionary.

    A split that is not there is left to fairseq, and so is one in another of its formats.

    Args:
        prefix (str): path of the split, without ``.idx`` and ``.bin``.
        types (int): size of the dictionary.

    Raises:
        UserError: naming the file and what is wrong with it.
        OSError: if one cannot be read.
    """
    index, text = f"{prefix}.idx", f"{prefix}.bin"
    missing = [path for path in (index, text) if not os.path.exists(path)]
    if len(missing) == 1:
        raise UserError(f"{missing[0]} is missing, its other half is there: {_AGAIN}")
    if missing or infer_dataset_impl(prefix) not in (None, "mmap"):
        return
    with open(text, "rb"):  # a directory and a file that must not be read are refused by name
        size_bytes = os.path.getsize(text)
    if size_bytes == 0:
        raise UserError(f"{text} is empty: the split {os.path.basename(prefix)!r} has no text")
    dtype, expected = _read_index(index)
    if size_bytes != expected:
        raise UserError(
            f"{text} has {size_bytes} bytes, {index} expects {expected}: one of them is damaged; "
            f"{_AGAIN}"
        )
    _refuse_other_tokens(text, dtype, types)


def _read_index(path: str) -> tuple[np.dtype, int]:
    """How tokens are stored, and the bytes of all of them."""
    data = np.fromfile(path, dtype=np.uint8)
    header = data[: _HEADER.itemsize].tobytes()
    if len(header) < _HEADER.itemsize or not header.startswith(_BEGINNING):
        raise UserError(f"{path} is damaged: it does not begin as an index of a split; {_AGAIN}")
    (fields,) = np.frombuffer(header, dtype=_HEADER)
    lines, dtype = int(fields["lines"]), np.dtype(_code_to_dtype.get(int(fields["dtype"]), "V"))
    if len(data) != _HEADER.itemsize + lines * _BYTES_PER_LINE:
        raise UserError(f"{path} is damaged: it has {len(data)} bytes, of {lines} lines; {_AGAIN}")
    rest = data[_HEADER.itemsize :]
    sizes = rest[: 4 * lines].view("<i4").astype(np.int64)
    ends = np.cumsum(sizes) * dtype.itemsize
    starts = np.append(0, ends)[:-1]
    follow = np.array_equal(rest[4 * lines :].view("<i8"), starts) and (sizes >= 0).all()
    if dtype.kind not in "iu" or not follow:
        raise UserError(f"{path} is damaged: its lines do not follow one another; {_AGAIN}")
    return dtype, int(ends[-1]) if lines else 0


def _refuse_other_tokens(path: str, dtype: np.dtype, types: int) -> None:
    tokens = np.memmap(path, dtype=dtype, mode="r")
    for start in range(0, len(tokens), _TOKENS_STEP):
        part = tokens[start : start + _TOKENS_STEP]
        outside = np.flatnonzero((part < 0) | (part >= types))
        if len(outside):
            raise UserError(
                f"{path}: token {start + outside[0]} is {part[outside[0]]}, the dictionary has "
                f"{types} types: one of them is damaged, or they are not of the same data"
            )
