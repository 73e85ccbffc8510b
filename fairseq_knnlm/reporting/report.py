"""A report in a directory: one page; figures and tables for papers beside it; and all as JSON."""

import csv
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import numpy as np

from ..errors import UserError
from ..files import json_bytes, refuse_unwritable_directory, write_atomically
from ..tuning.choice import Chosen
from ..tuning.grid import CacheGridPoint, KNNGridPoint
from ..tuning.tuning_data import TuningData
from .figures import draw, refuse_missing_matplotlib
from .gate_tables import make_gate_tables
from .latex import latex
from .report_page import render
from .sizes import SizePoint
from .tables import make_tables, training_counts
from .text_tables import text_tables

if TYPE_CHECKING:  # A cache alone is tuned without FAISS.
    from ..search.retriever import Retriever

PAGE, DATA = "report.html", "report.json"
# Folders beside the page.
FIGURES, TABLES = "figures", "tables"


def refuse_impossible(directory: str) -> None:
    """Refuse, before any work, a report that could not be written after it.

    Args:
        directory (str): of ``--report``.

    Raises:
        UserError: if matplotlib is missing, or *directory* cannot be written into or made.
    """
    refuse_missing_matplotlib()
    refuse_unwritable_directory("--report", directory)


def write(
    directory: str,
    summary: dict,
    knn_grid: Sequence[KNNGridPoint],
    cache_grid: Sequence[CacheGridPoint],
    data: TuningData,
    sizes: Sequence[SizePoint],
    retriever: "Retriever",
    dictionary,
    word_starts: Optional[np.ndarray] = None,
    chosen: Optional[Chosen] = None,
) -> str:
    """Write a report.

    Args:
        directory (str): made if it is not there; files of the same names are replaced.
        summary (dict): what ``fairseq-knnlm-tune`` ends with, and ``date``, ``model``, ``context``
            and ``versions``: when and with what, the latter three as dicts of names and values.
        knn_grid (sequence of KNNGridPoint): all that was tried on the split that is tuned on.
        cache_grid (sequence of CacheGridPoint): the same, of a cache besides neighbours; empty
            without one.
        data (TuningData): of the split that is reported on, or else of the one that is tuned on.
        sizes (sequence of SizePoint): from ``tune_sizes``, of the split that is tuned on.
        retriever (Retriever): what was searched.
        dictionary: fairseq's, of the targets.
        word_starts (ndarray): see ``make_tables``.
        chosen (Chosen): for the tables of its gate; None: without them.

    Returns:
        str: path of the page.

    Raises:
        UserError: if it cannot be written.
    """
    counts = training_counts(retriever.datastores, len(dictionary))
    results = {
        **summary,
        "split": summary.get("reported_on", summary["tuned_on"])["split"],
        "search": {
            "k": data.distances.size(1),
            "nprobe": retriever.nprobe,
            "distances": retriever.distances,
        },
        "datastores": [_description(datastore) for datastore in retriever.datastores],
        "tables": make_tables(knn_grid, cache_grid, data, sizes, counts, dictionary, word_starts),
    }
    if chosen is not None and chosen.gate:
        results["tables"].update(make_gate_tables(chosen, data, counts, word_starts))
    try:
        for name, content in _files(results).items():
            path = os.path.join(directory, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write --report {directory}: {error}") from None
    return os.path.join(directory, PAGE)


def _files(results: dict) -> dict[str, bytes]:
    """All files, by their paths within the directory; the page is the last."""
    figures, texts = draw(results), text_tables(results)
    pictures = {name: formats["svg"] for name, formats in figures.items()}
    return {
        DATA: json_bytes(results),
        **{
            os.path.join(FIGURES, f"{name}.{kind}"): content
            for name, formats in figures.items()
            for kind, content in formats.items()
        },
        **{
            os.path.join(TABLES, f"{name}.csv"): _csv(rows)
            for name, rows in results["tables"].items()
        },
        **{
            os.path.join(TABLES, f"{name}.tex"): latex(table).encode()
            for name, table in texts.items()
        },
        PAGE: render(results, texts, pictures).encode(),
    }


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
