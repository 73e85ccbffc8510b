"""The settings among what ``fairseq-knnlm-tune`` stored, in the same ranges as flags."""

import os

from ..datastore.manifest import TUNED
from ..errors import UserError
from .settings import Settings, range_faults, weight_fault

_NEEDED = ("k", "knn_lambda", "temperature", "nprobe", "distances")
_NEEDED_WITH_CACHE = ("cache_lambda", "cache_theta", "cache_metric", "cache_reset")


def settings_of_tuned(tuned: dict, path: str) -> dict:
    """The settings that were tuned.

    Args:
        tuned (dict): from ``datastore.read_tuned`` or ``datastore.tuned_for``.
        path (str): directory of the datastore that it is stored in, for the message.

    Returns:
        dict: fields of ``Settings``; those of a cache only where one was tuned.

    Raises:
        UserError: naming every setting that is missing, or that a flag could not have, as that
            flag.
    """
    settings = {name: tuned[name] for name in Settings._fields if name in tuned}
    needed = _NEEDED + (_NEEDED_WITH_CACHE if settings.get("cache_size") else ())
    # Null is no setting: what the flags leave out is not stored.
    missing = [name for name in needed if settings.get(name) is None]
    found = [f"{name} is missing" for name in missing] + range_faults(settings)
    if not found and settings.get("cache_size"):
        fault = weight_fault(Settings(**settings))
        found = [fault] if fault else []
    if found:
        raise UserError(
            f"{os.path.join(path, TUNED)} cannot be used: {'; '.join(found)}: run "
            "fairseq-knnlm-tune again"
        )
    return {name: value for name, value in settings.items() if value is not None}
