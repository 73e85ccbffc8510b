"""The datastores that are compared: of all of the text and of parts of it."""

import json
import os
import shutil

from parts import write_part
from processes import build_apart

from fairseq_knnlm.datastore.datastore import Datastore


def make_datastores(data, given, shares, flags, work):
    """Build datastores of the first *shares* of the train split.

    Args:
        given (Path): a datastore of all of it that is there already, or None.
        flags (list): of fairseq-knnlm-build.

    Returns:
        list of dict: a row for each, with its ``path``.
    """
    return [_make_datastore(data, given if share == 1 else None, share, flags, work)
            for share in shares]  # fmt: skip


def _make_datastore(data, given, share, flags, work):
    path, figures = given or work / f"datastore-{share:g}", {}
    if given is None:

        def build():
            part = data
            if share < 1:
                part = work / f"data-{share:g}"
                shutil.rmtree(part, ignore_errors=True)
                write_part(data, part, share=share)
            return build_apart(part, path, [*flags, "--gen-subset", "train", "--overwrite"])

        figures = once(work / f"datastore-{share:g}.json", build)
    datastore = Datastore.open(str(path))
    size = sum(file.stat().st_size for file in path.iterdir())
    return {
        "share": share,
        "entries": len(datastore),
        "dimension": datastore.dimension,
        "factory": datastore.manifest["index"]["factory"],
        "dump_s": figures.get("dump_s"),
        "dump_tokens_per_s": len(datastore) / figures["dump_s"] if figures else None,
        "index_s": figures.get("index_s"),
        "build_peak_bytes": figures.get("peak_bytes"),
        "index_bytes_per_entry": os.path.getsize(datastore.index_path) / len(datastore),
        "bytes_per_entry": size / len(datastore),
        "path": str(path),
    }


def once(path, make):
    """What *make* gives, kept as JSON in *path* for the next time."""
    if not path.exists():
        path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
