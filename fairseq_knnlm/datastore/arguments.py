"""What the arguments of a ``DatastoreWriter`` must be, checked before it touches a file."""

import json
import math
import numbers

import numpy as np

from ..errors import UserError


def check_writer_arguments(arguments: dict) -> None:
    """Refuse arguments that cannot be.

    Args:
        arguments (dict): by name all arguments of ``DatastoreWriter``; other names are ignored.

    Raises:
        UserError: naming each that cannot be, what it must be, and what it is.
    """
    num_shards = arguments["num_shards"]
    # Where the number of shards is wrong itself, the shard is not compared with it.
    last_shard = num_shards - 1 if _is_whole(num_shards, 1) else math.inf
    rules = {
        "path": (lambda value: isinstance(value, str) and value, "a text that is not empty"),
        "settings": (_is_json_dict, "a dict that JSON can hold"),
        "chunk_sizes": (_are_sizes, "a sequence of whole numbers >= 0"),
        "dimension": (lambda value: _is_whole(value, 1), "a whole number >= 1"),
        "dtype": (_is_unsigned, "an unsigned integer dtype"),
        "num_shards": (lambda value: _is_whole(value, 1), "a whole number >= 1"),
        "shard_id": (
            lambda value: _is_whole(value, 0) and value <= last_shard,
            f"a whole number in [0, {num_shards})",
        ),
        "overwrite": (lambda value: isinstance(value, bool), "True or False"),
        "index_bytes": (lambda value: _is_whole(value, 0), "a whole number >= 0"),
        "model_dimension": (
            lambda value: value is None or _is_whole(value, 1),
            "a whole number >= 1, or None",
        ),
    }
    faults = [
        f"{name} must be {expected}, got {_brief(arguments[name])}"
        for name, (holds, expected) in rules.items()
        if not holds(arguments[name])
    ]
    if faults:
        raise UserError(f"DatastoreWriter: {'; '.join(faults)}")


def _is_whole(value, least: int) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and value >= least


def _is_json_dict(value) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return isinstance(value, dict)


def _are_sizes(value) -> bool:
    try:
        sizes = np.asarray(value)
    except ValueError:  # Lists of different lengths.
        return False
    whole = sizes.dtype.kind in "iu" or sizes.size == 0
    return whole and sizes.ndim == 1 and not (sizes < 0).any()


def _is_unsigned(value) -> bool:
    try:
        return np.dtype(value).kind == "u"
    except TypeError:
        return False


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
