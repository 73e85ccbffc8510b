"""The figures of a report, for papers and for its page. The only door to matplotlib.

matplotlib is imported when a report is asked for, and not before: the commands run without it.
"""

import io
import logging
import math
from collections.abc import Sequence

from ..errors import UserError
from .intervals import has_interval
from .tables import BIN_NATS

# Each colour by name, in light and in dark: Okabe and Ito's blue and orange, in dark a lighter one.
# Lines, markers and hatches differ as well.
_COLOURS = {
    "paper": ("#ffffff", "#14171a"),
    "ink": ("#1b1b1b", "#e6e6e6"),
    "grid": ("#d5d5d5", "#363c42"),
    "first": ("#0072b2", "#56b4e9"),
    "second": ("#d55e00", "#ff9f4a"),
    "bar": ("#9ecae9", "#22588f"),
    "apart": ("#c9c9c9", "#5a6168"),
}
_PAPER, _INK, _GRID, _FIRST, _SECOND, _BAR, _APART = (light for light, _ in _COLOURS.values())
_LOOK = {
    # A column of a paper, or the width of a telephone.
    "figure.figsize": (4.8, 3.4),
    "figure.constrained_layout.use": True,
    "figure.facecolor": _PAPER,
    "font.size": 9.5,
    "text.color": _INK,
    "axes.facecolor": _PAPER,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "hatch.color": _INK,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # letters that a journal's programs can read
    # Without a fixed salt the names in an SVG would differ from one report to the next.
    "svg.hashsalt": "fairseq_knnlm",
}
# With a date in it no two files would be the same.
_METADATA = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
# The curve over lambda ends where perplexity is this many times that of the model alone.
_WORST = 1.25
# What a person would write along an axis of p_mixture / p_lm.
_RATIOS = (0.01, 0.1, 0.5, 1, 2, 10, 100, 1000)


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
        dict: by the name of the figure a dict of bytes, ``png``, ``svg`` and ``pdf``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # It tells of every table of every font that it puts into a PDF.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    drawings = {
        "k": _draw_k,
        "found": _draw_targets_found,
        "lambda": _draw_lambda,
        "temperature": _draw_temperature,
        "size": _draw_size,
        "frequency": _draw_frequency,
        "log_ratio": _draw_log_ratio,
    }
    if results["tables"]["cache_grid"]:
        drawings["cache"] = _draw_cache
    drawn = {}
    with matplotlib.rc_context(_LOOK):
        for name, drawing in drawings.items():
            figure = Figure()
            drawing(figure, results)
            drawn[name] = {kind: _saved(figure, kind) for kind in _METADATA}
    return drawn


def for_page(svg: bytes) -> bytes:
    """An SVG that is dark where the reader's other pages are.

    Args:
        svg (bytes): from ``draw``.

    Returns:
        bytes: the same, with the colours named in a style sheet for light and one for dark.
    """
    light, dark = (
        ";".join(f"--{name}:{pair[place]}" for name, pair in _COLOURS.items()) for place in (0, 1)
    )
    text = svg.decode()
    for name, (colour, _) in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    head, tag, rest = text.partition("<defs>")
    style = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f"{head}<style>{style}</style>{tag}{rest}".encode()


def _saved(figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=_METADATA[kind])
    return file.getvalue()


# -- what figures have in common -------------------------------------------------------------------


def _perplexity_axes(figure, results: dict, label: str):
    """Axes of perplexity, with that of the model alone."""
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel(f"perplexity on {results['split']}")
    base = results.get("reported_on", results["tuned_on"])["base_perplexity"]
    axes.axhline(base, color=_INK, linestyle=":", label=f"the model alone: {base:.2f}")
    return axes


def _legend(axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, borderaxespad=0.2,
        labelspacing=0.2,
    )  # fmt: skip


def _line(axes, rows: Sequence[dict], x: str, y: str = "perplexity", **look) -> None:
    """A line of two columns of a table, *x* and *y*."""
    axes.plot([row[x] for row in rows], [_drawable(row[y]) for row in rows], **look)


def _curve(axes, rows: Sequence[dict], x: str, **look) -> None:
    """A line of perplexities, in a band of their intervals."""
    _line(axes, rows, x, **look)
    bounded = [row for row in rows if row["perplexity_low"] is not None]
    axes.fill_between(
        [row[x] for row in bounded],
        [_drawable(row["perplexity_low"]) for row in bounded],
        [_drawable(row["perplexity_high"]) for row in bounded],
        color=look["color"], alpha=0.15, linewidth=0,
    )  # fmt: skip


def _below(colour: str) -> dict:
    """The look of a line that another may run over: broad, so that it shows on both sides."""
    return {"color": colour, "marker": "o", "markersize": 7, "linewidth": 4, "alpha": 0.55}


def _above(colour: str) -> dict:
    """The look of a line that may run over another."""
    return {
        "color": colour, "marker": "s", "markersize": 3.5, "linewidth": 1.3, "linestyle": "--",
        "markerfacecolor": _PAPER,
    }  # fmt: skip


def _mark(axes, rows: Sequence[dict], x: str, chosen: float) -> None:
    """A diamond where a setting was chosen."""
    for row in rows:
        if row[x] == chosen:
            axes.plot(
                [chosen], [_drawable(row["perplexity"])], "D", color=_SECOND,
                label=f"chosen: {chosen:.4g}", markersize=7,
            )  # fmt: skip


def _drawable(value: float) -> float:
    """The value; nan, which leaves a gap, where it is infinite."""
    return value if math.isfinite(value) else math.nan


def _log_axis(axes, ticks: Sequence[float], form: str = "{x:,g}") -> None:
    """Logarithmic along x, with these ticks."""
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(form)


def _round_numbers(values: Sequence[float], most: int = 7) -> list[float]:
    """Ticks within the range of *values*, which are > 0.

    1, 2, 5, 10, 20 and so on; powers of ten where those would be more than *most*; the values
    themselves where the range has fewer than two.
    """
    low, high = min(values), max(values)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        rounded = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
        within = [number for number in rounded if low <= number <= high]
        if len(within) <= most:
            break
    return within if len(within) >= 2 else sorted(set(values))


# -- the figures -----------------------------------------------------------------------------------


def _draw_k(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "k, number of neighbours")
    tables, temperature = results["tables"], results["best"]["temperature"]
    _curve(axes, tables["k"], "k", label="best lambda and T for each k", **_below(_FIRST))
    _line(
        axes, tables["k_at_temperature"], "k", label=f"best lambda, T = {temperature:.4g}",
        **_above(_SECOND),
    )  # fmt: skip
    _log_axis(axes, [row["k"] for row in tables["k"]])
    _legend(axes)


def _draw_targets_found(figure, results: dict) -> None:
    axes = figure.add_subplot()
    rows = results["tables"]["found"]
    _line(axes, rows, "k", "targets_found", color=_FIRST, marker="o", markersize=5)
    _log_axis(axes, [row["k"] for row in rows])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("k, number of neighbours")
    axes.set_ylabel("targets among the neighbours")


def _draw_lambda(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "lambda, weight of p_knn")
    rows = results["tables"]["lambda"]
    shown = [row for row in rows if row["perplexity"] <= _WORST * rows[0]["perplexity"]]
    _curve(axes, shown, "knn_lambda", color=_FIRST, label="with neighbours")
    _mark(axes, shown, "knn_lambda", results["best"]["knn_lambda"])
    _legend(axes)


def _draw_temperature(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "temperature T")
    rows = results["tables"]["temperature"]
    _curve(
        axes, rows, "temperature", color=_FIRST, marker="o", markersize=5,
        label="best k and lambda for each T",
    )  # fmt: skip
    _mark(axes, rows, "temperature", results["best"]["temperature"])
    _log_axis(axes, _round_numbers([row["temperature"] for row in rows]))
    _legend(axes)


def _draw_cache(figure, results: dict) -> None:
    chosen = results["best_knn_cache"]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, label in zip(
        panels, ("cache_size", "cache_theta"), ("positions in the cache", "theta")
    ):
        rows = results["tables"][name]
        _line(axes, rows, name, color=_FIRST, marker="o", markersize=5)
        _mark(axes, rows, name, chosen[name])
        axes.set_xlabel(label)
        _legend(axes)
    _log_axis(panels[0], [row["cache_size"] for row in results["tables"]["cache_size"]])
    thetas = [row["cache_theta"] for row in results["tables"]["cache_theta"]]
    if min(thetas) > 0:
        _log_axis(panels[1], _round_numbers(thetas, most=4))
    panels[0].set_ylabel(f"perplexity on {results['tuned_on']['split']}")


def _draw_size(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "entries of the datastore")
    rows = results["tables"]["size"]
    every = [row for row in rows if not row["k"]]
    same_k = [row for row in rows if row["k"]]
    _curve(axes, every, "entries", label="all known neighbours of the part", **_below(_FIRST))
    _curve(
        axes, same_k, "entries", label=f"{same_k[0]['k']:,} nearest neighbours", **_above(_SECOND)
    )
    _log_axis(axes, _round_numbers([row["entries"] for row in every]), "{x:,.0f}")
    _legend(axes)


def _draw_frequency(figure, results: dict) -> None:
    axes = figure.add_subplot()
    buckets = results["tables"]["frequency"]
    unknown = [row for row in results["tables"]["unknown"] if row["words"] != "known"]
    rows = [*buckets, *unknown]
    places = [*range(len(buckets)), *(len(buckets) + 0.5 for _ in unknown)]
    for place, row in zip(places, rows):
        axes.bar(
            place, _drawable(row["relative_change"]), width=0.7, edgecolor=_INK, linewidth=0.6,
            color=_APART if "words" in row else _BAR, hatch="////" if "words" in row else None,
        )  # fmt: skip
        _error_bar(axes, place, row)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_xticks(places, [f"{_least_frequency(row)}\n{row['share']:.1%}" for row in rows])
    axes.tick_params(axis="x", labelsize="small")
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_formatter(lambda change, _: f"{change:+.0%}" if round(change, 4) else "0")
    axes.set_xlabel("occurrences of the target in the datastore; share of tokens")
    axes.set_ylabel("change of perplexity")


def _error_bar(axes, place: float, row: dict) -> None:
    if has_interval(row) and math.isfinite(row["high"]):
        value = row["relative_change"]
        sizes = [[max(0.0, value - row["low"])], [max(0.0, row["high"] - value)]]
        axes.errorbar([place], [value], yerr=sizes, fmt="none", color=_INK, capsize=4)


def _least_frequency(row: dict) -> str:
    """A bucket of frequencies, in few letters."""
    if "words" in row:
        return row["words"]
    if row["highest"] == 0:
        return "never"
    lowest = row["lowest"]
    if lowest >= 10**6:
        return f"{lowest // 10**6:,}M+"
    return f"{lowest // 1000}k+" if lowest >= 10**4 else f"{lowest:,}+"


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
                start, height, BIN_NATS, align="edge", linewidth=0.4, edgecolor=_INK,
                color=_SECOND if hurt else _FIRST, hatch="////" if hurt else None,
            )  # fmt: skip
        axes.axvline(0, color=_INK, linewidth=0.8)
    _ratio_ticks(below, left)
    above.yaxis.set_major_formatter("{x:.0%}")
    above.set_ylabel("tokens")
    below.axhline(0, color=_INK, linewidth=0.8)
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.set_ylabel("nats")
    below.set_xlabel("p_mixture / p_lm: hatched, neighbours hurt; plain, they help")


def _ratio_ticks(axes, left: Sequence[float]) -> None:
    """Ratios along an axis of their natural logarithms."""
    shown = [
        ratio for ratio in _RATIOS if left[0] <= math.log(ratio) <= left[-1] + BIN_NATS
    ]  # fmt: skip
    axes.set_xticks([math.log(ratio) for ratio in shown], [f"{ratio:,g}" for ratio in shown])
