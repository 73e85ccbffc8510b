"""What one pass of model and search over a text leaves to tune with, and the file that keeps it.

A file of neighbours is an ``.npz`` that ``np.load`` opens:

- ``log_p_lm``, float32, shape (N,): log p_lm of the targets, in corpus order;
- ``distances``, float32, shape (N, k): nearest first, +inf where there is no neighbour;
- ``matches``, uint8, shape (N, ceil(k / 8)): whether each neighbour's value is the target, one bit
  each: ``np.unpackbits(matches, axis=1, count=k)``;
- ``targets``, int64, shape (N,): token ids;
- ``document_starts``, int64, shape (M,): rows at which documents begin, the first of them 0;
- ``parts``, uint8, shape (N, k): which of 16 random parts of the datastore each neighbour is in;
- ``queries``, float32, shape (N, D): the hidden states, where a continuous cache was tuned or a
  gate fitted;
- ``values``, int32, shape (N, k), ``confidence``, float32, shape (N, 2), ``contexts``, int32, shape
  (N, 4), and ``seconds``, float64, shape (2,): values of the neighbours, maximum and entropy of
  p_lm, the last tokens, and what model and search took, where a gate was fitted;
- ``settings``, a string: JSON of what all this depends on (model, datastores, data, context, k);
- ``checksum``, a string: CRC-32 of all others, their names, dtypes and shapes included.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..arguments import check_arguments, refuse
from ..errors import UserError
from ..fields import Record, whole
from ..files import atomic_file, checksum
from ..gating.ngram_counts import ORDERS

# Version 1 had no checksum.
FORMAT_VERSION = 2
# What a file depends on, of which only the number of neighbours is read here.
_SETTINGS = Record({"k": whole(0)}, {})
_ARRAYS = ("log_p_lm", "distances", "matches", "targets", "document_starts", "parts")
# Arrays of shape (N, k), and what a gate is fitted to beside the hidden states.
_OF_NEIGHBORS = ("distances", "matches", "parts", "values")
_FOR_GATE = {
    "values": np.int32, "confidence": np.float32, "contexts": np.int32, "seconds": np.float64,
}  # fmt: skip
# Random parts of a datastore, of which curves over its size are made. It is a power of two, and one
# byte holds the number of a part.
PARTS = 16
# 2^32 over the golden ratio: Fibonacci hashing (Knuth, volume 3, section 6.4).
_HASH_FACTOR, _HASH_BITS = 0x9E3779B1, 32
# A log-probability may be rounded to a little more than 0.
_ROUNDING = 1e-5


class TuningData(NamedTuple):
    """What one pass of model and search leaves to tune with.

    log_p_lm (Tensor): shape (N,), float32, log p_lm of the targets.
    distances (Tensor): shape (N, k), float32, nearest first; +inf where there is no neighbour.
    matches (BoolTensor): shape (N, k), whether the neighbour's value is the target.
    targets (LongTensor): shape (N,), token ids.
    document_starts (ndarray): shape (M,), int64, rows at which documents begin.
    parts (ByteTensor): shape (N, k), which of ``PARTS`` random parts of the datastore a neighbour
        is in, see ``parts_of``.
    queries (Tensor): shape (N, D), float32, the hidden states, for a continuous cache or a gate.
    values (IntTensor): shape (N, k), values of the neighbours, for a gate.
    confidence (Tensor): shape (N, 2), float32, see ``encoding.confidence``, for a gate.
    contexts (IntTensor): shape (N, ``ORDERS``), see ``encoding.contexts``, for a gate.
    seconds (ndarray): shape (2,), float64, what model and search took, for a gate.
    """

    log_p_lm: torch.Tensor
    distances: torch.Tensor
    matches: torch.Tensor
    targets: Optional[torch.Tensor] = None
    document_starts: Optional[np.ndarray] = None
    parts: Optional[torch.Tensor] = None
    queries: Optional[torch.Tensor] = None
    values: Optional[torch.Tensor] = None
    confidence: Optional[torch.Tensor] = None
    contexts: Optional[torch.Tensor] = None
    seconds: Optional[np.ndarray] = None


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
        UserError: if *data* or *settings* lack something or do not fit, or it cannot be written.
    """
    arrays = {name: np.asarray(part) for name, part in data._asdict().items() if part is not None}
    check_arguments("save", settings=(settings, _SETTINGS))
    for_gate = ("queries", *_FOR_GATE) if any(name in arrays for name in _FOR_GATE) else ()
    lacking = [name for name in (*_ARRAYS, *for_gate) if name not in arrays]
    if lacking:
        refuse("save", [f"data lacks {', '.join(lacking)}, which collect gives"])
    arrays["matches"] = np.packbits(arrays["matches"], axis=1)
    try:
        _check_layout(arrays, settings["k"])
    except ValueError as error:
        raise UserError(f"save: {error}") from None
    arrays["settings"] = np.array(_text({"format_version": FORMAT_VERSION, **settings}))
    try:
        with atomic_file(path) as file:
            np.savez(file, checksum=np.array(_checksum(arrays)), **arrays)
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
            f"release reads version {FORMAT_VERSION}: name another file, and what is in it will be "
            "collected again"
        )
    differing = [
        f"{name} was {_text(kept.get(name))}, is {_text(expected)}"
        for name, expected in settings.items()
        if kept.get(name) != expected and not (name == "k" and kept["k"] > expected)
    ]
    if differing:
        raise UserError(
            f"--knn-neighbors {path} holds neighbours found with other settings ("
            f"{'; '.join(differing)}): name another file, and it will be written"
        )


def load(path: str, k: int, types: Optional[int] = None) -> TuningData:
    """Read a file of neighbours, the *k* nearest of each query.

    Args:
        path (str): of a file that ``save`` wrote.
        k (int): at most the neighbours in it; 0: none.
        types (int): of the dictionary of the text, one more than the largest target; None: unknown.

    Returns:
        TuningData: with queries and what a gate is fitted to where the file has them.

    Raises:
        UserError: if it is no such file, damaged, or holds what cannot be or fewer neighbours.
    """
    with _opened(path) as file:
        arrays = {name: file[name] for name in file.files if name != "checksum"}
        if str(file["checksum"]) != _checksum(arrays):
            raise ValueError("its checksum is not that of its content")
        _check_layout(arrays, _settings_of(file)["k"])
        _check_ranges(arrays, types)
    check_arguments("load", k=(k, whole(0, arrays["distances"].shape[1])))
    arrays["matches"] = np.unpackbits(arrays["matches"], axis=1, count=k).view(bool)
    data = {name: array for name, array in arrays.items() if name in TuningData._fields}
    data.update({name: data[name][:, :k] for name in _OF_NEIGHBORS if name in data})
    for name in set(data) - {"document_starts", "seconds"}:
        data[name] = torch.from_numpy(data[name])
    return TuningData(**data)


def _checksum(arrays: dict) -> str:
    """CRC-32 of arrays by name, dtypes and shapes included, as 8 hexadecimal digits."""
    parts = [
        f"{name} {array.dtype.str} {array.shape} {checksum(np.atleast_1d(array))}"
        for name, array in sorted(arrays.items())
    ]
    return checksum("\n".join(parts).encode())


def _check_layout(arrays: dict, k: int) -> None:
    """Refuse arrays of other dtypes or shapes than a file of neighbours has.

    Args:
        arrays (dict): by name, all of a file.
        k (int): neighbours of each query.

    Raises:
        KeyError: if one is missing.
        ValueError: naming the array.
    """
    count = len(arrays["log_p_lm"])
    layout = {
        "log_p_lm": (np.float32, (count,)),
        "distances": (np.float32, (count, k)),
        "matches": (np.uint8, (count, -(-k // 8))),
        "targets": (np.int64, (count,)),
        "document_starts": (np.int64, (len(arrays["document_starts"]),)),
        "parts": (np.uint8, (count, k)),
    }
    layout.update(_extra_layout(arrays, count, k))
    for name, (dtype, shape) in layout.items():
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise ValueError(
                f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}, no "
                f"{np.dtype(dtype)} of shape {shape}"
            )


def _check_ranges(arrays: dict, types: Optional[int]) -> None:
    """Refuse numbers that no pass of model and search gives.

    Args:
        arrays (dict): by name, all of a file.
        types (int): see ``load``.

    Raises:
        ValueError: saying what cannot be.
    """
    for fault, what in _range_faults(arrays, types):
        if fault:
            raise ValueError(what)


def _extra_layout(arrays: dict, count: int, k: int) -> dict:
    """Dtype and shape of what only some tuning needs; what a gate needs is all there or not at all.

    Args:
        arrays (dict): by name, all of a file.
        count (int): N, tokens.
        k (int): neighbours of each query.
    """
    layout = {}
    for_gate = any(name in arrays for name in _FOR_GATE)
    if "queries" in arrays or for_gate:
        layout["queries"] = (np.float32, (count, arrays["queries"].shape[-1]))
    if for_gate:
        shapes = ((count, k), (count, 2), (count, ORDERS), (2,))
        layout.update(dict(zip(_FOR_GATE, zip(_FOR_GATE.values(), shapes))))
    return layout


def _range_faults(arrays: dict, types: Optional[int]) -> Iterator[tuple[bool, str]]:
    """Whether there is a number in an array that cannot be, and what it would be."""
    log_p_lm, targets, starts = (
        arrays[name] for name in ("log_p_lm", "targets", "document_starts")
    )
    yield not np.isfinite(log_p_lm).all(), "a log-probability is not finite"
    yield (log_p_lm > _ROUNDING).any(), "a log-probability is more than 0"
    last = np.inf if types is None else types - 1
    yield (targets < 0).any() or (targets > last).any(), "a target is no word of the dictionary"
    distances = arrays["distances"]
    yield np.isnan(distances).any() or np.isneginf(distances).any(), "a distance is no number"
    yield (distances[:, 1:] < distances[:, :-1]).any(), "the distances are not nearest first"
    yield (arrays["parts"] >= PARTS).any(), f"a part of the datastore is not below {PARTS}"
    in_order = starts[:1].tolist() == [0] and (np.diff(starts) > 0).all()
    yield len(targets) and not (in_order and starts[-1] < len(targets)), "documents begin nowhere"
    queries = arrays.get("queries")
    yield queries is not None and not np.isfinite(queries).all(), "a hidden state is not finite"
    if "values" in arrays:
        for name, least in (("values", 0), ("contexts", -1)):
            ids = arrays[name]
            yield (ids < least).any() or (ids > last).any(), f"{name} has no word of the dictionary"
        highest, entropy = arrays["confidence"].T
        possible = np.isfinite(highest) & np.isfinite(entropy)
        possible &= (highest <= _ROUNDING) & (entropy >= -_ROUNDING)
        yield not possible.all(), "a maximum or an entropy of p_lm cannot be"
        yield not (arrays["seconds"] >= 0).all(), "a duration is below 0"


def _text(value) -> str:
    return json.dumps(value, sort_keys=True)


def _settings_of(file) -> dict:
    settings = json.loads(str(file["settings"]))
    if not isinstance(settings, dict):
        raise ValueError("its settings are no dictionary")
    if type(settings["k"]) is not int or settings["k"] < 0:
        raise ValueError(f"its k is {settings['k']!r}, no whole number >= 0")
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
    # A damaged archive ends in exceptions of numpy, zipfile, zlib, struct and json.
    except Exception as error:
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
