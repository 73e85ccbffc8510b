"""A report in a directory: one page, its figures as PNG, its tables as CSV, and all as JSON.

Only here is matplotlib imported, and only when a report is asked for.
"""

import csv
import io
import json
import math
import os

from .analysis import BIN_NATS, tables, training_counts
from .datastore import write_atomically
from .errors import UserError
from .metrics import without_infinities
from .report_html import render

PAGE, DATA = "report.html", "report.json"
# Okabe and Ito's colours; lines and markers differ as well.
_BASE, _FIRST, _SECOND = "#000000", "#0072B2", "#D55E00"
_LOOK = {
    "figure.figsize": (6.4, 4.0),
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.framealpha": 0.9,
    "savefig.dpi": 150,
    "svg.hashsalt": "fairseq_knnlm",  # the same report gives the same file
}
# Of the curve over lambda only what is not much worse than no neighbours is shown.
_WORST = 1.25


def refuse_impossible(directory: str) -> None:
    """Refuse, before any work, a report that could not be written after it.

    Raises:
        UserError: if matplotlib is missing, or *directory* neither is one nor can be made.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"fairseq_knnlm: --report draws with matplotlib, which cannot be imported ({error}): "
            "pip install 'fairseq_knnlm[plot]'"
        ) from None
    existing = os.path.isdir(directory)
    parent = directory if existing else os.path.dirname(os.path.abspath(directory))
    taken = not directory or os.path.exists(directory) and not existing
    if taken or not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"fairseq_knnlm: --report {directory} cannot be written: it must name a directory, one "
            "that is there and writable or a new one in such a directory"
        )


def write(directory: str, summary: dict, settings, retrieved, sizes, retriever, dictionary) -> str:
    """Write a report.

    Args:
        directory (str): made if it is not there; files of the same names are replaced.
        summary (dict): what ``fairseq-knnlm-tune`` ends with.
        settings (list of Setting): the grid, of the split that is tuned on.
        retrieved (Retrieved): of the split that is reported on, or else of the other.
        sizes (list of SizeSetting): from ``analysis.tune_sizes``, of the split that is tuned on.
        retriever (Retriever): what was searched.
        dictionary: fairseq's, of the targets.

    Returns:
        str: path of the page.

    Raises:
        UserError: if it cannot be written.
    """
    split = summary.get("reported_on", summary["tuned_on"])["split"]
    counts = training_counts(retriever.datastores, len(dictionary))
    results = {
        **summary,
        "split": split,
        "search": {
            "k": retrieved.distances.size(1),
            "nprobe": retriever.nprobe,
            "distances": retriever.distances,
        },
        "datastores": [_description(datastore) for datastore in retriever.datastores],
        "tables": tables(
            settings, retrieved, split != summary["tuned_on"]["split"], sizes, counts,
            dictionary.symbols,
        ),
    }  # fmt: skip
    files = {DATA: json.dumps(without_infinities(results), indent=1).encode()}
    figures = {}
    for name, (png, svg) in _drawn(results).items():
        files[f"{name}.png"], figures[name] = png, svg
    for name, rows in results["tables"].items():
        files[f"{name}.csv"] = _csv(rows)
    files[PAGE] = render(results, figures).encode()
    try:
        os.makedirs(directory, exist_ok=True)
        for name, data in files.items():
            write_atomically(os.path.join(directory, name), data)
    except OSError as error:
        raise UserError(f"fairseq_knnlm: cannot write --report {directory}: {error}") from None
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


# -- figures ---------------------------------------------------------------------------------------


def _drawn(results: dict) -> dict:
    """PNG and SVG of each figure, by name."""
    import matplotlib
    from matplotlib.figure import Figure

    drawings = {
        "k": _draw_k,
        "found": _draw_found,
        "lambda": _draw_lambda,
        "temperature": _draw_temperature,
        "frequency": _draw_frequency,
        "log_ratio": _draw_log_ratio,
        "size": _draw_size,
    }
    drawn = {}
    with matplotlib.rc_context(_LOOK):
        for name, draw in drawings.items():
            figure = Figure()
            draw(figure, results)
            # a date would make every file another one
            formats = (("png", {}), ("svg", {"metadata": {"Date": None}}))
            drawn[name] = tuple(_saved(figure, kind, options) for kind, options in formats)
    return drawn


def _saved(figure, kind: str, options: dict) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, **options)
    return file.getvalue()


def _perplexity_axes(figure, results: dict, label: str):
    """Axes of perplexity, with that of the model alone."""
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel(f"perplexity on {results['split']}")
    base = results.get("reported_on", results["tuned_on"])["base_perplexity"]
    axes.axhline(base, color=_BASE, linestyle=":", label=f"without neighbours: {base:.2f}")
    return axes


def _plot(axes, rows, x: str, line: str, color: str, label: str, y: str = "perplexity") -> None:
    axes.plot(
        [row[x] for row in rows], [_drawable(row[y]) for row in rows], line, color=color,
        label=label, markersize=5,
    )  # fmt: skip


def _drawable(value: float) -> float:
    """A gap where it is infinite."""
    return value if math.isfinite(value) else math.nan


def _log2(axes, ticks=None, form: str = "{x:,.4g}") -> None:
    axes.set_xscale("log", base=2)
    if ticks is not None:
        axes.set_xticks(ticks)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(form)


def _draw_k(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "k, number of neighbours")
    rows, best = results["tables"]["k"], results["best"]
    _plot(
        axes, results["tables"]["k_at_temperature"], "k", "s--", _SECOND,
        f"best lambda, T = {best['temperature']:g}",
    )  # fmt: skip
    _plot(axes, rows, "k", "o-", _FIRST, "best lambda and T")
    _log2(axes, [row["k"] for row in rows])
    axes.legend()


def _draw_found(figure, results: dict) -> None:
    axes = figure.add_subplot()
    rows = results["tables"]["found"]
    _plot(axes, rows, "k", "o-", _FIRST, "", "targets_found")
    _log2(axes, [row["k"] for row in rows])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("k, number of neighbours")
    axes.set_ylabel("targets among the neighbours")


def _draw_lambda(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "lambda, weight of p_knn")
    rows, best = results["tables"]["lambda"], results["best"]
    shown = [row for row in rows if row["perplexity"] <= _WORST * rows[0]["perplexity"]]
    _plot(axes, shown, "knn_lambda", "-", _FIRST, "with neighbours")
    chosen = [row for row in shown if row["knn_lambda"] == best["knn_lambda"]]
    _plot(axes, chosen, "knn_lambda", "D", _SECOND, f"chosen: {best['knn_lambda']:g}")
    axes.legend()


def _draw_temperature(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "temperature T")
    rows, best = results["tables"]["temperature"], results["best"]
    _plot(axes, rows, "temperature", "o-", _FIRST, "best k and lambda")
    chosen = [row for row in rows if row["temperature"] == best["temperature"]]
    _plot(axes, chosen, "temperature", "D", _SECOND, f"chosen: {best['temperature']:g}")
    _log2(axes)
    axes.legend()


def _draw_size(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "entries of the datastore")
    rows = results["tables"]["size"]
    same_k = [row for row in rows if row["k"]]
    _plot(axes, same_k, "entries", "o-", _FIRST, f"{same_k[0]['k']:,} nearest neighbours")
    every = [row for row in rows if not row["k"]]
    _plot(axes, every, "entries", "s--", _SECOND, "all known neighbours of the part")
    _log2(axes, [row["entries"] for row in every], "{x:,.0f}")
    axes.legend()


def _draw_frequency(figure, results: dict) -> None:
    axes = figure.add_subplot()
    rows = results["tables"]["frequency"]
    changes = [_drawable(row["relative_change"]) for row in rows]
    axes.bar(range(len(rows)), changes, width=0.7, color="#9ecae9", edgecolor=_FIRST)
    sure = [
        (place, row)
        for place, row in enumerate(rows)
        if row["low"] is not None and math.isfinite(row["high"])
    ]
    axes.errorbar(
        [place for place, _ in sure],
        [row["relative_change"] for _, row in sure],
        yerr=[
            [max(0.0, row["relative_change"] - row["low"]) for _, row in sure],
            [max(0.0, row["high"] - row["relative_change"]) for _, row in sure],
        ],
        fmt="none", ecolor=_BASE, capsize=4,
    )  # fmt: skip
    axes.axhline(0, color=_BASE, linewidth=0.8)
    axes.set_xticks(
        range(len(rows)), [_from(row) + f"\n{row['share']:.1%}" for row in rows],
        fontsize="small",
    )  # fmt: skip
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_formatter("{x:+.0%}")
    axes.set_xlabel("occurrences of the target in the datastore; share of tokens")
    axes.set_ylabel("change of perplexity")


def _from(row: dict) -> str:
    """A bucket of frequencies, in few letters."""
    return "never" if row["highest"] == 0 else f"{row['lowest']:,}+"


def _draw_log_ratio(figure, results: dict) -> None:
    above, below = figure.subplots(2, sharex=True)
    rows = results["tables"]["log_ratio"]
    left = [row["to"] - BIN_NATS if row["from"] is None else row["from"] for row in rows]
    tokens = sum(row["tokens"] for row in rows)
    for axes, heights in (
        (above, [row["tokens"] / tokens for row in rows]),
        (below, [_drawable(row["nats"]) for row in rows]),
    ):
        for start, height in zip(left, heights):
            hurt = start < 0
            axes.bar(
                start, height, BIN_NATS, align="edge", linewidth=0.4, edgecolor=_BASE,
                color=_SECOND if hurt else _FIRST, hatch="////" if hurt else None,
            )  # fmt: skip
        axes.axvline(0, color=_BASE, linewidth=0.8)
        axes.grid(axis="x", visible=False)
    above.yaxis.set_major_formatter("{x:.0%}")
    above.set_ylabel("tokens")
    below.axhline(0, color=_BASE, linewidth=0.8)
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.set_ylabel("nats")
    below.set_xlabel("ln(p_mixture / p_lm): hatched, neighbours hurt; plain, they help")
