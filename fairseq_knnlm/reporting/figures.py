"""The figures of a report, as PNG and SVG. The only door to matplotlib.

matplotlib is imported when a report is asked for, and not before: the commands run without it.
"""

import io
import math
from collections.abc import Sequence
from typing import Optional

from ..errors import UserError
from .tables import BIN_NATS

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
    # Without a fixed salt the names in an SVG would differ from one report to the next.
    "svg.hashsalt": "fairseq_knnlm",
}
# The curve over lambda ends where perplexity is this many times that of the model alone.
_WORST = 1.25


def refuse_missing_matplotlib() -> None:
    """Refuse, before any work, a report that could not be drawn after it.

    Raises:
        UserError: if matplotlib cannot be imported.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--report draws with matplotlib, which cannot be imported ({error}): "
            "pip install 'fairseq_knnlm[plot]'"
        ) from None


def draw(results: dict) -> dict:
    """All figures of a report.

    Args:
        results (dict): what ``report.write`` stores as JSON.

    Returns:
        dict: PNG and SVG of each figure, a pair of bytes, by name.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawings = {
        "k": _draw_k,
        "found": _draw_targets_found,
        "lambda": _draw_lambda,
        "temperature": _draw_temperature,
        "frequency": _draw_frequency,
        "log_ratio": _draw_log_ratio,
        "size": _draw_size,
    }
    drawn = {}
    with matplotlib.rc_context(_LOOK):
        for name, drawing in drawings.items():
            figure = Figure()
            drawing(figure, results)
            # With a date in it no two files would be the same.
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


def _plot(
    axes, rows: Sequence[dict], x: str, line: str, color: str, label: str, y: str = "perplexity"
) -> None:
    """A line of two columns of a table, *x* and *y*."""
    axes.plot(
        [row[x] for row in rows], [_drawable(row[y]) for row in rows], line, color=color,
        label=label, markersize=5,
    )  # fmt: skip


def _drawable(value: float) -> float:
    """The value; nan, which leaves a gap, where it is infinite."""
    return value if math.isfinite(value) else math.nan


def _log2(axes, ticks: Optional[Sequence] = None, form: str = "{x:,.4g}") -> None:
    """Powers of two along x, with labels of that form."""
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


def _draw_targets_found(figure, results: dict) -> None:
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
    with_interval = [
        (place, row)
        for place, row in enumerate(rows)
        if row["low"] is not None and math.isfinite(row["high"])
    ]
    axes.errorbar(
        [place for place, _ in with_interval],
        [row["relative_change"] for _, row in with_interval],
        yerr=[
            [max(0.0, row["relative_change"] - row["low"]) for _, row in with_interval],
            [max(0.0, row["high"] - row["relative_change"]) for _, row in with_interval],
        ],
        fmt="none", ecolor=_BASE, capsize=4,
    )  # fmt: skip
    axes.axhline(0, color=_BASE, linewidth=0.8)
    axes.set_xticks(
        range(len(rows)), [_least_frequency(row) + f"\n{row['share']:.1%}" for row in rows],
        fontsize="small",
    )  # fmt: skip
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_formatter("{x:+.0%}")
    axes.set_xlabel("occurrences of the target in the datastore; share of tokens")
    axes.set_ylabel("change of perplexity")


def _least_frequency(row: dict) -> str:
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
