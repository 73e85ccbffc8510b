"""What a recipe found, and one page of all of it: report.md, with its plots beside it."""

import logging
from typing import NamedTuple

# where fairseq is imported, everything is logged
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, told apart by colour-blind readers as well; markers tell them in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
MARKERS = "osD^v"
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"


class Table(NamedTuple):
    """title (str), head (list of str), rows (list of lists of str)."""

    title: str
    head: list
    rows: list


class Trend(NamedTuple):
    """What the paper claims, whether it holds here, and by which figures."""

    claim: str
    verdict: str
    evidence: str


class Plot(NamedTuple):
    """A plot of one file and its panels."""

    name: str
    caption: str
    panels: list


class Panel(NamedTuple):
    """series: label -> list of (x, y); levels: label -> y; log: base of x, or None."""

    title: str
    x: str
    y: str
    series: dict
    levels: dict = {}
    log: int = None


class Section(NamedTuple):
    """What a recipe found."""

    title: str
    setting: str
    tables: list
    trends: list
    plots: list = []
    text: str = ""


def percent(interval):
    """A change of perplexity and its 95% interval, if there is one."""
    if interval.low is None:
        return f"{interval.value:+.1%} (no interval of {interval.units} {interval.unit})"
    return f"{interval.value:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"


def lowers(interval):
    """Whether a change lowers perplexity, as far as its interval tells."""
    if interval.low is None:
        return OPEN
    if interval.high < 0:
        return HOLDS
    return FAILS if interval.low > 0 else OPEN


def raises(interval):
    """``lowers`` of the reverse claim."""
    if interval.low is None:
        return OPEN
    return lowers(interval._replace(low=-interval.high, high=-interval.low))


def all_of(verdicts):
    """The verdict of a claim that several comparisons must support."""
    verdicts = list(verdicts)
    for verdict in (FAILS, OPEN):
        if verdict in verdicts:
            return verdict
    return HOLDS


def write(folder, scale, sections):
    """Write report.md and its plots; return the path of the page."""
    lines = [
        "# The paper, section by section",
        "",
        f"Khandelwal et al. (2020), the recipes of examples/paper at the scale `{scale}`. "
        "Perplexity is per token, ends of lines included; lower is better. k, lambda and "
        "temperature are tuned on valid. Changes are of test, with their 95% interval by the "
        "paired bootstrap over documents: a trend *holds* where the interval is on its side of "
        "zero, *does not hold* where it is on the other side, and else *cannot be told* from this "
        "much text. No account is taken of the chance in training: every model is trained once.",
        "",
        "| section | trend of the paper | here |",
        "|---|---|---|",
        *(
            f"| {section.title.split(':')[0]} | {trend.claim} | {trend.verdict} |"
            for section in sections
            for trend in section.trends
        ),
    ]
    for section in sections:
        lines += _section(folder, section)
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _section(folder, section):
    yield from ("", f"## {section.title}", "", section.setting)
    for table in section.tables:
        yield from ("", f"**{table.title}**", "")
        yield "| " + " | ".join(table.head) + " |"
        yield "|---" * len(table.head) + "|"
        yield from ("| " + " | ".join(row) + " |" for row in table.rows)
    for plot in section.plots:
        _draw(folder / f"{plot.name}.png", plot.panels)
        yield from ("", f"![{plot.caption}]({plot.name}.png)", "", f"*{plot.caption}*")
    yield ""
    for trend in section.trends:
        yield f"- {trend.claim}: **{trend.verdict}** here. {trend.evidence}"
    if section.text:
        yield from ("", section.text)


def _draw(path, panels):
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), constrained_layout=True, squeeze=False
    )
    for axis, panel in zip(axes[0], panels):
        for (label, points), colour, marker in zip(panel.series.items(), COLOURS, MARKERS):
            many = len(points) > 20
            axis.plot(*zip(*points), "-" if many else f"{marker}-", color=colour, label=label)
        for (label, y), style in zip(panel.levels.items(), ("--", ":", "-.")):
            axis.axhline(y, color=COLOURS[-1], linestyle=style, label=label)
        if panel.log:
            axis.set_xscale("log", base=panel.log)
            axis.xaxis.set_major_formatter("{x:,.8g}")
        axis.set(xlabel=panel.x, ylabel=panel.y)
        axis.set_title(panel.title, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
