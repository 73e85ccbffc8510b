"""A report in a directory: one page, its figures as PNG, its tables as CSV, and all as JSON."""

import csv
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import json_bytes, refuse_unwritable_directory, write_atomically
from ..tuning.grid import KNNGridPoint
from ..tuning.tuning_data import TuningData
from .figures import draw, refuse_missing_matplotlib
from .report_page import render
from .sizes import SizePoint
from .tables import make_tables, training_counts

if TYPE_CHECKING:  # A cache alone is tuned without FAISS.
    from ..search.retriever import Retriever

PAGE, DATA = "report.html", "report.json"


def refuse_impossible(directory: str) -> None:
    """Refuse, before any work, a report that could not be written after it.

    Args:
        directory (str): of ``--report``.

    Raises:
        UserError: if matplotlib is missing, or *directory* neither is one nor can be made.
    """
    refuse_missing_matplotlib()
    refuse_unwritable_directory("--report", directory)


def write(
    directory: str,
    summary: dict,
    grid: Sequence[KNNGridPoint],
    data: TuningData,
    sizes: Sequence[SizePoint],
    retriever: "Retriever",
    dictionary,
) -> str:
    """Write a report.

    Args:
        directory (str): made if it is not there; files of the same names are replaced.
        summary (dict): what ``fairseq-knnlm-tune`` ends with.
        grid (sequence of KNNGridPoint): all that was tried on the split that is tuned on.
        data (TuningData): of the split that is reported on, or else of the one that is tuned on.
        sizes (sequence of SizePoint): from ``tune_sizes``, of the split that is tuned on.
        retriever (Retriever): what was searched.
        dictionary: fairseq's, of the targets.

    Returns:
        str: path of the page.

    Raises:
        UserError: if it cannot be written.
    """
    split = summary.get("reported_on", summary["tuned_on"])["split"]
    retuned = split != summary["tuned_on"]["split"]
    counts = training_counts(retriever.datastores, len(dictionary))
    results = {
        **summary,
        "split": split,
        "search": {
            "k": data.distances.size(1),
            "nprobe": retriever.nprobe,
            "distances": retriever.distances,
        },
        "datastores": [_description(datastore) for datastore in retriever.datastores],
        "tables": make_tables(grid, data, retuned, sizes, counts, dictionary.symbols),
    }
    files = {DATA: json_bytes(results)}
    figures = {}
    for name, (png, svg) in draw(results).items():
        files[f"{name}.png"], figures[name] = png, svg
    for name, rows in results["tables"].items():
        files[f"{name}.csv"] = _csv(rows)
    files[PAGE] = render(results, figures).encode()
    try:
        os.makedirs(directory, exist_ok=True)
        for name, content in files.items():
            write_atomically(os.path.join(directory, name), content)
    except OSError as error:
        raise UserError(f"cannot write --report {directory}: {error}") from None
    return os.path.join(directory, PAGE)


def _description(datastore) -> dict:
    manifest = datastore.manifest
    return {
        "path": datastore.path,
        "entries": manifest["count"],
        "dimension": manifest["dimension"],
        "key": f"{manifest['key']['type']}, layer {manifest['key']['layer']}",
        "metric": manifest["metric"],
        "index": manifest["index"]["factory"],
    }


def _csv(rows: list[dict]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()
