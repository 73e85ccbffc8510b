"""The figures of a report, for papers and for its page. The only door to matplotlib.

matplotlib is imported when a report is asked for, and not before: the commands run without it.
"""

import io
import logging
import math
from collections.abc import Sequence

from ..errors import UserError
from .look import (
    APART,
    BAR,
    FIRST,
    INK,
    LOOK,
    SECOND,
    broad,
    curve,
    drawable,
    legend,
    line,
    log_axis,
    mark,
    round_numbers,
    thin,
)
from .tables import BIN_NATS

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
    if results["tables"].get("gate_quality"):
        drawings["gate_trust"] = _draw_gate_trust
    if results["tables"].get("gate_skip"):
        drawings["gate_skip"] = _draw_gate_skip
    drawn = {}
    with matplotlib.rc_context(LOOK):
        for name, drawing in drawings.items():
            figure = Figure()
            drawing(figure, results)
            drawn[name] = {kind: _saved(figure, kind) for kind in _METADATA}
    return drawn


def _saved(figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=_METADATA[kind])
    return file.getvalue()


# -- the figures -----------------------------------------------------------------------------------


def _perplexity_axes(figure, results: dict, label: str):
    """Axes of perplexity, with that of the model alone."""
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel(f"perplexity on {results['split']}")
    base = results.get("reported_on", results["tuned_on"])["base_perplexity"]
    axes.axhline(base, color=INK, linestyle=":", label=f"the model alone: {base:.2f}")
    return axes


def _draw_k(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "k, number of neighbours")
    tables, temperature = results["tables"], results["best"]["temperature"]
    curve(axes, tables["k"], "k", label="best lambda and T for each k", **broad(FIRST))
    line(
        axes, tables["k_at_temperature"], "k", label=f"best lambda, T = {temperature:.4g}",
        **thin(SECOND),
    )  # fmt: skip
    log_axis(axes, [row["k"] for row in tables["k"]])
    legend(axes)


def _draw_targets_found(figure, results: dict) -> None:
    axes = figure.add_subplot()
    rows = results["tables"]["found"]
    line(axes, rows, "k", "targets_found", color=FIRST, marker="o", markersize=5)
    log_axis(axes, [row["k"] for row in rows])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("k, number of neighbours")
    axes.set_ylabel("targets among the neighbours")


def _draw_lambda(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "lambda, weight of p_knn")
    rows = results["tables"]["lambda"]
    shown = [row for row in rows if row["perplexity"] <= _WORST * rows[0]["perplexity"]]
    curve(axes, shown, "knn_lambda", color=FIRST, label="with neighbours")
    mark(axes, shown, "knn_lambda", results["best"]["knn_lambda"])
    legend(axes)


def _draw_temperature(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "temperature T")
    rows = results["tables"]["temperature"]
    curve(
        axes, rows, "temperature", color=FIRST, marker="o", markersize=5,
        label="best k and lambda for each T",
    )  # fmt: skip
    mark(axes, rows, "temperature", results["best"]["temperature"])
    log_axis(axes, round_numbers([row["temperature"] for row in rows]))
    legend(axes)


def _draw_cache(figure, results: dict) -> None:
    chosen = results["best_knn_cache"]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, label in zip(
        panels, ("cache_size", "cache_theta"), ("positions in the cache", "theta")
    ):
        rows = results["tables"][name]
        line(axes, rows, name, color=FIRST, marker="o", markersize=5)
        mark(axes, rows, name, chosen[name])
        axes.set_xlabel(label)
        legend(axes)
    log_axis(panels[0], [row["cache_size"] for row in results["tables"]["cache_size"]])
    thetas = [row["cache_theta"] for row in results["tables"]["cache_theta"]]
    if min(thetas) > 0:
        log_axis(panels[1], round_numbers(thetas, most=4))
    panels[0].set_ylabel(f"perplexity on {results['tuned_on']['split']}")


def _draw_size(figure, results: dict) -> None:
    axes = _perplexity_axes(figure, results, "entries of the datastore")
    rows = results["tables"]["size"]
    every = [row for row in rows if not row["k"]]
    same_k = [row for row in rows if row["k"]]
    curve(axes, every, "entries", label="all known neighbours of the part", **broad(FIRST))
    curve(axes, same_k, "entries", label=f"{same_k[0]['k']:,} nearest neighbours", **thin(SECOND))
    log_axis(axes, round_numbers([row["entries"] for row in every]), "{x:,.0f}")
    legend(axes)


def _draw_frequency(figure, results: dict) -> None:
    axes = figure.add_subplot()
    buckets = results["tables"]["frequency"]
    unknown = [row for row in results["tables"]["unknown"] if row["words"] != "known"]
    rows = [*buckets, *unknown]
    places = [*range(len(buckets)), *(len(buckets) + 0.5 for _ in unknown)]
    for place, row in zip(places, rows):
        axes.bar(
            place, drawable(row["relative_change"]), width=0.7, edgecolor=INK, linewidth=0.6,
            color=APART if "words" in row else BAR, hatch="////" if "words" in row else None,
        )  # fmt: skip
        _error_bar(axes, place, row)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(places, [f"{_least_frequency(row)}\n{row['share']:.1%}" for row in rows])
    axes.tick_params(axis="x", labelsize="small")
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_formatter(lambda change, _: f"{change:+.0%}" if round(change, 4) else "0")
    axes.set_xlabel("occurrences of the target in the datastore; share of tokens")
    axes.set_ylabel("change of perplexity")


def _error_bar(axes, place: float, row: dict) -> None:
    if row["low"] is not None and math.isfinite(row["high"]):
        value = row["relative_change"]
        sizes = [[max(0.0, value - row["low"])], [max(0.0, row["high"] - value)]]
        axes.errorbar([place], [value], yerr=sizes, fmt="none", color=INK, capsize=4)


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
        (below, [drawable(row["nats"]) for row in rows]),
    ):
        for start, height in zip(left, heights):
            hurt = start < 0
            axes.bar(
                start, height, BIN_NATS, align="edge", linewidth=0.4, edgecolor=INK,
                color=SECOND if hurt else FIRST, hatch="////" if hurt else None,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
    _ratio_ticks(below, left)
    above.yaxis.set_major_formatter("{x:.0%}")
    above.set_ylabel("tokens")
    below.axhline(0, color=INK, linewidth=0.8)
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.set_ylabel("nats")
    below.set_xlabel("p_mixture / p_lm: hatched, neighbours hurt; plain, they help")


def _ratio_ticks(axes, left: Sequence[float]) -> None:
    """Ratios along an axis of their natural logarithms."""
    shown = [
        ratio for ratio in _RATIOS if left[0] <= math.log(ratio) <= left[-1] + BIN_NATS
    ]  # fmt: skip
    axes.set_xticks([math.log(ratio) for ratio in shown], [f"{ratio:,g}" for ratio in shown])


def _draw_gate_trust(figure, results: dict) -> None:
    """Mean lambda of a gate over equal groups of tokens, from the lowest to the highest."""
    axes = figure.add_subplot()
    looks = {
        "gate_quality": {"label": "by d_1 / d_k", **broad(FIRST)},
        "gate_entropy": {"label": "by the entropy of p_lm", **thin(SECOND)},
    }
    for name, look in looks.items():
        rows = enumerate(results["tables"].get(name, []), start=1)
        line(axes, [{**row, "group": group} for group, row in rows], "group", "knn_lambda", **look)
    constant = results["best"]["knn_lambda"]
    axes.axhline(constant, color=INK, linestyle=":", label=f"constant lambda: {constant:.3f}")
    axes.set_xlabel("tenth of the tokens, from the lowest to the highest")
    axes.set_ylabel("mean lambda of the gate")
    legend(axes)


def _draw_gate_skip(figure, results: dict) -> None:
    """Perplexity against the share of searches that are not made, and against speed if known."""
    rows = results["tables"]["gate_skip"]
    measures = {"skipped": "share of searches left out"}
    if all(row["tokens_per_s"] for row in rows):
        measures["tokens_per_s"] = "tokens a second"
    panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    constant = results.get("reported_on", results["tuned_on"])["knn_perplexity"]
    for axes, (measure, label) in zip(panels, measures.items()):
        line(axes, rows, measure, color=FIRST, marker="o", markersize=4, label="the gate")
        axes.axhline(constant, color=INK, linestyle=":", label="constant lambda, all searches")
        axes.set_xlabel(label)
    panels[0].xaxis.set_major_formatter("{x:.0%}")
    panels[0].set_ylabel(f"perplexity on {results['split']}")
    legend(panels[0])
