"""What the arguments of a ``DatastoreWriter`` must be, checked before it touches a file."""

import json

import numpy as np

from ..arguments import or_none, refuse
from ..fields import MOST, TEXT, Kind, Record, faults, is_whole, whole
from .schema import settings_faults


def check_writer_arguments(arguments: dict) -> None:
    """Refuse arguments that cannot be.

    Args:
        arguments (dict): by name all arguments of ``DatastoreWriter``; other names are ignored.

    Raises:
        UserError: naming each that cannot be, what it must be, and what it is.
    """
    num_shards = arguments["num_shards"]
    # Where the number of shards is wrong itself, the shard is not compared with it.
    last_shard = num_shards - 1 if is_whole(num_shards, 1) else MOST
    of_shard = Kind(f"a whole number in [0, {num_shards})", lambda v: is_whole(v, 0, last_shard))
    found = list(faults(arguments, Record({**_KINDS, "shard_id": of_shard}, {})))
    if _is_json_dict(arguments["settings"]):
        found += [f"in settings, {fault}" for fault in settings_faults(arguments["settings"])]
    refuse("DatastoreWriter", found)


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
    are_whole = sizes.dtype.kind in "iu" or sizes.size == 0
    return are_whole and sizes.ndim == 1 and not (sizes < 0).any()


def _is_unsigned(value) -> bool:
    try:
        return np.dtype(value).kind == "u"
    except TypeError:
        return False


_KINDS = {
    "path": TEXT,
    "settings": Kind("a dict that JSON can hold", _is_json_dict),
    "chunk_sizes": Kind("a sequence of whole numbers >= 0", _are_sizes),
    "dimension": whole(1),
    "dtype": Kind("an unsigned integer dtype", _is_unsigned),
    "num_shards": whole(1),
    "overwrite": Kind("True or False", lambda v: isinstance(v, bool)),
    "index_bytes": whole(0),
    "model_dimension": or_none(whole(1)),
}
