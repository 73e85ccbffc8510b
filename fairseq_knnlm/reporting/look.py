"""How the figures of a report look: colours in light and dark, lines, legends and ticks."""

import math
from collections.abc import Sequence

# Each colour by name, in light and in dark: Okabe and Ito's blue and orange, in dark a lighter one.
# Lines, markers and hatches differ as well.
COLOURS = {
    "paper": ("#ffffff", "#14171a"),
    "ink": ("#1b1b1b", "#e6e6e6"),
    "grid": ("#d5d5d5", "#363c42"),
    "first": ("#0072b2", "#56b4e9"),
    "second": ("#d55e00", "#ff9f4a"),
    "bar": ("#9ecae9", "#22588f"),
    "apart": ("#c9c9c9", "#5a6168"),
}
PAPER, INK, GRID, FIRST, SECOND, BAR, APART = (light for light, _ in COLOURS.values())
LOOK = {
    # A column of a paper, or the width of a telephone.
    "figure.figsize": (4.8, 3.4),
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "font.size": 9.5,
    "text.color": INK,
    "axes.facecolor": PAPER,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # letters that a journal's programs can read
    # Without a fixed salt the names in an SVG would differ from one report to the next.
    "svg.hashsalt": "fairseq_knnlm",
}


def for_page(svg: bytes) -> bytes:
    """An SVG that is dark where the reader's other pages are.

    Args:
        svg (bytes): from ``draw``.

    Returns:
        bytes: the same, with the colours named in a style sheet for light and one for dark.
    """
    light, dark = (
        ";".join(f"--{name}:{pair[place]}" for name, pair in COLOURS.items()) for place in (0, 1)
    )
    text = svg.decode()
    for name, (colour, _) in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    head, tag, rest = text.partition("<defs>")
    style = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f"{head}<style>{style}</style>{tag}{rest}".encode()


def legend(axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, borderaxespad=0.2,
        labelspacing=0.2,
    )  # fmt: skip


def line(axes, rows: Sequence[dict], x: str, y: str = "perplexity", **look) -> None:
    """A line through the rows of a table.

    Args:
        axes: matplotlib's.
        rows (sequence of dict): of the table.
        x, y (str): the columns along and upwards.
        look: as matplotlib draws lines.
    """
    axes.plot([row[x] for row in rows], [drawable(row[y]) for row in rows], **look)


def curve(axes, rows: Sequence[dict], x: str, **look) -> None:
    """A line of perplexities, in a band of their intervals.

    Args:
        axes, rows, x, look: as of ``line``; *look* has a ``color``.
    """
    line(axes, rows, x, **look)
    bounded = [row for row in rows if row["perplexity_low"] is not None]
    axes.fill_between(
        [row[x] for row in bounded],
        [drawable(row["perplexity_low"]) for row in bounded],
        [drawable(row["perplexity_high"]) for row in bounded],
        color=look["color"], alpha=0.15, linewidth=0,
    )  # fmt: skip


def broad(colour: str) -> dict:
    """The look of a line that another may run over: broad, so that it shows on both sides."""
    return {"color": colour, "marker": "o", "markersize": 7, "linewidth": 4, "alpha": 0.55}


def thin(colour: str) -> dict:
    """The look of a line that may run over another."""
    return {
        "color": colour, "marker": "s", "markersize": 3.5, "linewidth": 1.3, "linestyle": "--",
        "markerfacecolor": PAPER,
    }  # fmt: skip


def mark(axes, rows: Sequence[dict], x: str, chosen: float) -> None:
    """A diamond where a setting was chosen.

    Args:
        axes, rows, x: as of ``line``.
        chosen (float): the setting, in column *x*.
    """
    for row in rows:
        if row[x] == chosen:
            axes.plot(
                [chosen], [drawable(row["perplexity"])], "D", color=SECOND,
                label=f"chosen: {chosen:.4g}", markersize=7,
            )  # fmt: skip


def drawable(value: float) -> float:
    """The value; nan, which leaves a gap, where it is infinite."""
    return value if math.isfinite(value) else math.nan


def log_axis(axes, ticks: Sequence[float], form: str = "{x:,g}") -> None:
    """Make the axis along logarithmic.

    Args:
        axes: matplotlib's.
        ticks (sequence of float): where it has any.
        form (str): how they are written.
    """
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(form)


def round_numbers(values: Sequence[float], most: int = 7) -> list[float]:
    """Ticks within the range of *values*, which are > 0.

    1, 2, 5, 10, 20 and so on; powers of ten where those would be more than *most*; the values
    themselves where the range has fewer than two.

    Args:
        values (sequence of float): of the axis.
        most (int): how many ticks have room.
    """
    low, high = min(values), max(values)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        rounded = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
        within = [number for number in rounded if low <= number <= high]
        if len(within) <= most:
            break
    return within if len(within) >= 2 else sorted(set(values))
