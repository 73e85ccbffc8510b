"""What one pass of model and search over a text leaves to tune with, and the file that keeps it.

A file of neighbours is an ``.npz`` that ``np.load`` opens:

- ``log_p_lm``, float32, shape (N,): log p_lm of the targets, in corpus order;
- ``distances``, float32, shape (N, k): nearest first, +inf where there is no neighbour;
- ``matches``, uint8, shape (N, ceil(k / 8)): whether each neighbour's value is the target, one bit
  each: ``np.unpackbits(matches, axis=1, count=k)``;
- ``targets``, int64, shape (N,): token ids;
- ``document_starts``, int64, shape (M,): rows at which documents begin, the first of them 0;
- ``parts``, uint8, shape (N, k): which of 16 random parts of the datastore each neighbour is in;
- ``queries``, float32, shape (N, D): the hidden states, where a continuous cache was tuned;
- ``settings``, a string: JSON of what all this depends on (model, datastores, data, context, k).
"""

import contextlib
import json
import os
import zipfile
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..errors import UserError
from ..files import atomic_file

FORMAT_VERSION = 1
_ARRAYS = ("log_p_lm", "distances", "matches", "targets", "document_starts", "parts")
# Curves over datastore sizes are made of so many random parts: a power of two, and one byte holds
# the number of a part.
PARTS = 16
# 2^32 over the golden ratio: Fibonacci hashing (Knuth, volume 3, section 6.4).
_HASH_FACTOR, _HASH_BITS = 0x9E3779B1, 32


class TuningData(NamedTuple):
    """What one pass of model and search leaves to tune with.

    log_p_lm (Tensor): shape (N,), float32, log p_lm of the targets.
    distances (Tensor): shape (N, k), float32, nearest first; +inf where there is no neighbour.
    matches (BoolTensor): shape (N, k), whether the neighbour's value is the target.
    targets (LongTensor): shape (N,), token ids.
    document_starts (ndarray): shape (M,), int64, rows at which documents begin.
    parts (ByteTensor): shape (N, k), which of ``PARTS`` random parts of the datastore a neighbour
        is in, see ``parts_of``.
    queries (Tensor): shape (N, D), float32, the hidden states, for a continuous cache.
    """

    log_p_lm: torch.Tensor
    distances: torch.Tensor
    matches: torch.Tensor
    targets: Optional[torch.Tensor] = None
    document_starts: Optional[np.ndarray] = None
    parts: Optional[torch.Tensor] = None
    queries: Optional[torch.Tensor] = None


def parts_of(ids: torch.Tensor) -> torch.Tensor:
    """In which random part of the datastore each id is: a hash of it, in [0, ``PARTS``).

    Args:
        ids (LongTensor): any shape.

    Returns:
        ByteTensor: the same shape.
    """
    hashed = (ids * _HASH_FACTOR) & (2**_HASH_BITS - 1)
    return (hashed * PARTS >> _HASH_BITS).to(torch.uint8)


def save(path: str, data: TuningData, settings: dict) -> None:
    """Write a file of neighbours; it is whole or not there.

    Args:
        path (str): replaced if it is there.
        data (TuningData): with targets, document starts and parts.
        settings (dict): JSON, what *data* depends on; ``k`` among it.

    Raises:
        UserError: if it cannot be written.
    """
    arrays = {name: np.asarray(part) for name, part in data._asdict().items() if part is not None}
    arrays["matches"] = np.packbits(arrays["matches"], axis=1)
    settings = _text({"format_version": FORMAT_VERSION, **settings})
    try:
        with atomic_file(path) as file:
            np.savez(file, settings=np.array(settings), **arrays)
    except OSError as error:
        raise UserError(f"cannot write --knn-neighbors {path}: {error}") from None


def refuse_other(path: str, settings: dict) -> None:
    """Refuse a file that is not of these settings; reads no more of it than its own settings.

    A file of more neighbours than ``settings["k"]`` will do: the nearest of them are the same.

    Args:
        path (str): of a file that ``save`` wrote.
        settings (dict): as ``save`` would be given.

    Raises:
        UserError: naming everything that differs.
    """
    with _opened(path) as file:
        kept = _settings_of(file)
    if kept.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"--knn-neighbors {path} has format version {kept.get('format_version')}, this "
            f"release reads version {FORMAT_VERSION}: name another file, and it will be written"
        )
    differing = [
        f"{name} was {_text(kept.get(name))}, is {_text(expected)}"
        for name, expected in settings.items()
        if kept.get(name) != expected and not (name == "k" and kept.get(name, 0) > expected)
    ]
    if differing:
        raise UserError(
            f"--knn-neighbors {path} holds neighbours found with other settings ("
            f"{'; '.join(differing)}): name another file, and it will be written"
        )


def load(path: str, k: int) -> TuningData:
    """Read a file of neighbours, the *k* nearest of each query.

    Args:
        path (str): of a file that ``save`` wrote.
        k (int): at most the neighbours in it.

    Returns:
        TuningData: with queries where the file has them.

    Raises:
        UserError: if it is no such file, or damaged.
    """
    with _opened(path) as file:
        parts = {name: file[name] for name in _ARRAYS}
        queries = file["queries"] if "queries" in file else None
        width = _settings_of(file)["k"]
        count = len(parts["log_p_lm"])
        whole = all(parts[name].shape == (count, width) for name in ("distances", "parts"))
        whole &= len(parts["targets"]) == count and (queries is None or len(queries) == count)
        if not whole or parts["matches"].shape != (count, -(-width // 8)):
            raise ValueError("arrays of other shapes")
    matches = np.unpackbits(parts["matches"], axis=1, count=k).view(bool)
    return TuningData(
        torch.from_numpy(parts["log_p_lm"]),
        torch.from_numpy(parts["distances"])[:, :k],
        torch.from_numpy(matches),
        torch.from_numpy(parts["targets"]),
        parts["document_starts"],
        torch.from_numpy(parts["parts"])[:, :k],
        None if queries is None else torch.from_numpy(queries),
    )


def _text(value) -> str:
    return json.dumps(value, sort_keys=True)


def _settings_of(file) -> dict:
    settings = json.loads(str(file["settings"]))
    if not isinstance(settings, dict):
        raise ValueError("its settings are no dictionary")
    return settings


@contextlib.contextmanager
def _opened(path: str):
    """An ``.npz`` file; whatever is wrong with it becomes one message."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no .npz file")
        with np.load(path) as file:
            yield file
    except UserError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--knn-neighbors {path} is not, or no longer, what fairseq-knnlm-tune writes "
            f"({error}): name another file, and it will be written"
        ) from None


def beside(path: str, split: str) -> str:
    """The file of another split: ``valid.npz`` has ``valid.test.npz`` beside it.

    Args:
        path (str): the file of one split.
        split (str): name of the other.
    """
    root, extension = os.path.splitext(path)
    return f"{root}.{split}{extension}"
