"""The setting that ``fairseq-knnlm-tune`` chose, kept in the datastore that it was tuned with.

``tuned.json`` lies beside the manifest; of several datastores that were searched as one it lies in
the first. It names the datastores by the checksums of their manifests, and so the model, the text
and the index that it holds for: it is of no use with others, and refused.
"""

import json
import os
from collections.abc import Sequence
from typing import Optional

from .datastore import TUNED, read_manifest, render, write_atomically
from .errors import UserError

FORMAT_VERSION = 1


def save_tuned(paths: Sequence[str], tuned: dict) -> str:
    """Store what was tuned with some datastores in the first of them.

    Args:
        paths: their directories.
        tuned (dict): JSON; what a search and a mixture are done with among it.

    Returns:
        str: the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = os.path.join(paths[0], TUNED)
    checksums = [read_manifest(each)["checksum"] for each in paths]
    write_atomically(
        path, render({"format_version": FORMAT_VERSION, "datastores": checksums, **tuned})
    )
    return path


def read_tuned(path: str) -> Optional[dict]:
    """What is stored in a datastore; None where nothing is.

    Raises:
        UserError: if it cannot be read.
    """
    path = os.path.join(path, TUNED)
    try:
        with open(path, "rb") as file:
            data = file.read()
        tuned = json.loads(data)
        if tuned["format_version"] != FORMAT_VERSION or data != render(tuned):
            raise ValueError("edited, or of another release")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"fairseq_knnlm: {path} is damaged ({error}): run fairseq-knnlm-tune again"
        ) from None
    return tuned


def tuned_for(paths: Sequence[str]) -> dict:
    """What was tuned with exactly these datastores.

    Raises:
        UserError: if nothing was, or it was with others.
    """
    tuned = read_tuned(paths[0])
    if tuned is None:
        raise UserError(
            f"fairseq_knnlm: --knn-tuned: {paths[0]} has no {TUNED}: run fairseq-knnlm-tune with "
            "it first, or give the settings as flags"
        )
    expected = tuned["datastores"]
    if len(paths) != len(expected):
        raise UserError(
            f"fairseq_knnlm: --knn-tuned: {paths[0]} was tuned with {len(expected)} datastores "
            f"searched as one, --knn-datastore names {len(paths)}: name the same, or tune again"
        )
    for path, checksum in zip(paths, expected):
        found = read_manifest(path)["checksum"]
        if found != checksum:
            raise UserError(
                f"fairseq_knnlm: --knn-tuned: {path} (manifest checksum {found}) is not what was "
                f"tuned with ({checksum}): its index, model or text is another; tune again"
            )
    return tuned
