"""The setting that ``fairseq-knnlm-tune`` chose, kept in the datastore that it was tuned with.

``tuned.json`` lies beside the manifest; of several datastores that were searched as one it lies in
the first. It names the datastores by the checksums of their manifests, and so the model, the text
and the index that it holds for: it is of no use with others, and refused. A gate that was fitted
lies beside it as ``gate.npz``, and ``tuned.json`` has its checksum.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Optional

from ..errors import UserError
from ..fields import CHECKSUM, CHECKSUMS, TEXT, Kind, Record, faults, is_whole, whole
from ..files import checksum as checksum_of
from ..files import is_rendered, parse_json, render, write_atomically
from .manifest import GATE, TUNED, read_manifest

FORMAT_VERSION = 1
# The settings in it are for ``scoring.tuned_settings`` to check.
_FIELDS = Record(
    {
        "format_version": Kind(
            str(FORMAT_VERSION), lambda value: is_whole(value, FORMAT_VERSION, FORMAT_VERSION)
        ),
        "datastores": Kind(
            "a list of one or more checksums",
            lambda value: CHECKSUMS.holds(value) and len(value) > 0,
        ),
    },
    {
        "tuned_on": Record({"split": TEXT}, {"tokens": whole(0)}),
        "gate": TEXT,
        "gate_checksum": CHECKSUM,
    },
)
# Field of a setting with a continuous cache: k, lambda and temperature of neighbours alone.
WITHOUT_CACHE = "without_cache"


def save_tuned(paths: Sequence[str], tuned: dict, gate: Optional[bytes] = None) -> str:
    """Store what was tuned with datastores in the first of them.

    Args:
        paths (sequence of str): their directories, in the order they were searched in.
        tuned (dict): JSON, finite numbers only; the settings of the search and of the mixture are
            among it.
        gate (bytes): the file of a gate that is a part of it; None: there is none.

    Returns:
        str: the file.

    Raises:
        OSError: if it cannot be written.
        UserError: if a datastore cannot be read, or none is named.
    """
    _refuse_none(paths)
    path = os.path.join(paths[0], TUNED)
    checksums = [read_manifest(each)["checksum"] for each in paths]
    tuned = {"format_version": FORMAT_VERSION, "datastores": checksums, **tuned}
    gate_path = os.path.join(paths[0], GATE)
    if gate is not None:
        # First, so that there is never a setting without its gate.
        write_atomically(gate_path, gate)
        tuned["gate_checksum"] = checksum_of(gate)
    write_atomically(path, render(tuned))
    if gate is None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(gate_path)
    return path


def read_tuned(path: str) -> Optional[dict]:
    """What is stored in a datastore; None where nothing is.

    Args:
        path (str): its directory.

    Raises:
        UserError: if it cannot be read.
    """
    path = os.path.join(path, TUNED)
    try:
        with open(path, "rb") as file:
            data = file.read()
        tuned = parse_json(data)
        if not is_rendered(data, tuned):
            raise ValueError("edited: its checksum does not match")
        found = list(faults(tuned, _FIELDS))
        if found:
            raise ValueError("; ".join(found))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged or of another release ({error}): run fairseq-knnlm-tune again"
        ) from None
    return tuned


def tuned_for(paths: Sequence[str]) -> dict:
    """What was tuned with exactly these datastores.

    Args:
        paths (sequence of str): their directories, in the order they are searched in.

    Raises:
        UserError: if nothing was, or it was with others.
    """
    _refuse_none(paths)
    tuned = read_tuned(paths[0])
    if tuned is None:
        raise UserError(
            f"--knn-tuned: {paths[0]} has no {TUNED}: run fairseq-knnlm-tune with "
            "it first, or give the settings as flags"
        )
    expected = tuned["datastores"]
    if len(paths) != len(expected):
        raise UserError(
            f"--knn-tuned: {paths[0]} was tuned with {len(expected)} datastores "
            f"searched as one, --knn-datastore names {len(paths)}: name the same, or tune again"
        )
    for path, checksum in zip(paths, expected):
        actual = read_manifest(path)["checksum"]
        if actual != checksum:
            raise UserError(
                f"--knn-tuned: {path} (manifest checksum {actual}) is not what was "
                f"tuned with ({checksum}): its index, model or text is another; tune again"
            )
    return tuned


def find_tuned(paths: Sequence[str]) -> Optional[dict]:
    """As ``tuned_for``; None where nothing was tuned with exactly these datastores.

    Args:
        paths (sequence of str): their directories, in the order they are searched in.
    """
    try:
        return tuned_for(paths)
    except UserError:
        return None


def in_words(tuned: dict) -> str:
    """The setting that was tuned, and on what, for a person to read.

    Args:
        tuned (dict): from ``read_tuned``, or with its fields.
    """
    temperature = tuned["temperature"]
    if not isinstance(temperature, str):  # "auto" stays as it is
        temperature = f"{temperature:g}"
    parts = [f"k {tuned['k']}, lambda {tuned['knn_lambda']:g}, temperature {temperature}"]
    distances = tuned.get("distances")
    if distances != "exhaustive" and "nprobe" in tuned:
        parts.append(f"nprobe {tuned['nprobe']}")
    if distances:
        parts.append(f"{distances} distances")
    if tuned.get("cache_size"):
        parts.append(
            f"cache {tuned['cache_size']} of weight {tuned['cache_lambda']:g}, theta "
            f"{tuned['cache_theta']:g}"
        )
    if "gate" in tuned:
        parts.append(f"gate {tuned['gate']}")
    if "tuned_on" in tuned:
        parts.append(f"on {tuned['tuned_on']['split']}")
        if "tokens" in tuned["tuned_on"]:
            parts.append(f"{tuned['tuned_on']['tokens']:,} tokens")
    return ", ".join(parts)


def read_gate(path: str, tuned: dict) -> Optional[bytes]:
    """The file of the gate that is a part of what was tuned; None where none is.

    Args:
        path (str): directory of the first datastore that was tuned with.
        tuned (dict): from ``tuned_for``.

    Raises:
        UserError: if it is missing, or is not the one that was fitted then.
    """
    expected = tuned.get("gate_checksum")
    if expected is None:
        return None
    path = os.path.join(path, GATE)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}), the gate that --knn-tuned needs: run "
            "fairseq-knnlm-tune again"
        ) from None
    if checksum_of(data) != expected:
        raise UserError(
            f"{path} (checksum {checksum_of(data)}) is not the gate that was fitted with what "
            f"{TUNED} beside it holds ({expected}): run fairseq-knnlm-tune again"
        )
    return data


def _refuse_none(paths: Sequence[str]) -> None:
    if isinstance(paths, str) or not paths:
        raise UserError(f"paths must be a list of one or more directories, got {paths!r}")
