"""The settings among what ``fairseq-knnlm-tune`` stored, in the same ranges as flags."""

import os
from typing import Optional

from ..datastore.manifest import TUNED
from ..datastore.tuned import WITHOUT_CACHE
from ..errors import UserError
from ..fields import brief
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
    _refuse(path, found)
    return {name: value for name, value in settings.items() if value is not None}


def neighbors_alone(tuned: dict, path: str) -> Optional[dict]:
    """The best setting of neighbours alone, which is stored beside one with a cache.

    Args:
        tuned (dict), path (str): as of ``settings_of_tuned``.

    Returns:
        dict: k, lambda and temperature; None where no cache was tuned.

    Raises:
        UserError: as ``settings_of_tuned``.
    """
    alone = tuned.get(WITHOUT_CACHE)
    if alone is None:
        return None
    if not isinstance(alone, dict):
        _refuse(path, [f"{WITHOUT_CACHE} must be a dict, got {brief(alone)}"])
    missing = [name for name in _NEEDED[:3] if alone.get(name) is None]
    _refuse(path, [f"{WITHOUT_CACHE}.{name} is missing" for name in missing] + range_faults(alone))
    return alone


def _refuse(path: str, found: list) -> None:
    if found:
        raise UserError(
            f"{os.path.join(path, TUNED)} cannot be used: {'; '.join(found)}: run "
            "fairseq-knnlm-tune again"
        )
