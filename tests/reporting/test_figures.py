"""The figures: what a reader must be able to see in them."""

import re
from xml.etree import ElementTree

import matplotlib
import pytest
from helpers.study import CACHE_GRID
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fairseq_knnlm.reporting import figures, look


@pytest.fixture(scope="module")
def results(study):
    result = {"split": "test", "base_perplexity": 3.0}
    return {
        "split": "test", "tuned_on": {**result, "split": "valid"}, "reported_on": result,
        "best": study.best._asdict(), "best_knn_cache": CACHE_GRID[1]._asdict(),
        "tables": study.tables,
    }  # fmt: skip


@pytest.fixture(scope="module")
def drawn(results):
    return figures.draw(results)


def plotted(drawing, results):
    """A figure as it is laid out, its axes and its renderer."""
    with matplotlib.rc_context(look.LOOK):
        figure = Figure()
        drawing(figure, results)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return figure, figure.axes, canvas.get_renderer()


def test_without_a_cache_there_is_no_figure_of_it(results, drawn):
    assert "cache" in drawn
    tables = {**results["tables"], "cache_grid": []}
    assert set(drawn) - set(figures.draw({**results, "tables": tables})) == {"cache"}


def test_pictures_have_the_resolution_that_papers_ask_for(drawn):
    for formats in drawn.values():
        width = int.from_bytes(formats["png"][16:20], "big")  # of the header
        assert width == pytest.approx(300 * look.LOOK["figure.figsize"][0], abs=1)


@pytest.mark.parametrize("name", ["k", "lambda", "temperature", "cache", "size"])
def test_a_legend_covers_nothing_and_is_not_cut(results, name):
    figure, every, renderer = plotted(getattr(figures, f"_draw_{name}"), results)
    for axes in every:
        legend = axes.get_legend().get_window_extent(renderer)
        assert legend.y0 >= axes.get_window_extent(renderer).y1 - 1
        assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
        assert legend.y1 <= figure.bbox.y1


@pytest.mark.parametrize("name", ["k", "size"])
def test_a_line_shows_below_another(results, name):
    """Of two lines the one below is broader, and its markers are larger."""
    _, (axes,), _ = plotted(getattr(figures, f"_draw_{name}"), results)
    _, below, above = axes.get_lines()
    assert below.get_linewidth() >= 2 * above.get_linewidth()
    assert below.get_markersize() >= 1.5 * above.get_markersize()
    assert below.get_marker() != above.get_marker()
    assert below.get_linestyle() != above.get_linestyle()


@pytest.mark.parametrize("name", ["k", "lambda", "temperature", "size"])
def test_curves_have_a_band(results, name):
    _, (axes,), _ = plotted(getattr(figures, f"_draw_{name}"), results)
    rows = [row for row in results["tables"][name] if row["perplexity"] < 3]
    low = min(path.vertices[:, 1].min() for band in axes.collections for path in band.get_paths())
    assert low == pytest.approx(min(row["perplexity_low"] for row in rows))


def test_unknown_words_stand_apart(results):
    _, (axes,), _ = plotted(figures._draw_frequency, results)
    labels = [label.get_text().split("\n")[0] for label in axes.get_xticklabels()]
    assert labels == ["never", "1+", "10+", "100+", "<unk>"]
    places = axes.get_xticks()
    assert places[-1] - places[-2] > places[1] - places[0]


@pytest.mark.parametrize(
    "lowest, highest, words",
    [(0, 0, "never"), (1, 9, "1+"), (1000, 9999, "1,000+"), (10**5, 10**6 - 1, "100k+"),
     (10**7, 10**8 - 1, "10M+")],
)  # fmt: skip
def test_buckets_in_few_letters(lowest, highest, words):
    assert figures._least_frequency({"lowest": lowest, "highest": highest}) == words


@pytest.mark.parametrize(
    "values, ticks",
    [
        ([127790, 2044645], [200_000, 500_000, 1_000_000, 2_000_000]),
        ([0.25, 64.0], [0.5, 1, 2, 5, 10, 20, 50]),
        ([0.03125, 2048.0], [0.1, 1, 10, 100, 1000]),
        ([0.002, 0.011], [0.002, 0.005, 0.01]),
        ([3.0, 4.0, 3.0], [3.0, 4.0]),
        ([8.0], [8.0]),
    ],
)
def test_ticks_are_round_numbers(values, ticks):
    assert look.round_numbers(values) == ticks


def test_on_the_page_every_colour_has_one_for_the_dark(drawn):
    for formats in drawn.values():
        text = look.for_page(formats["svg"]).decode()
        ElementTree.fromstring(text)
        style, rest = re.search(r"<style>(.*?)</style>(.*)", text, re.S).groups()
        assert "prefers-color-scheme:dark" in style
        used = set(re.findall(r"var\(--(\w+)\)", rest))
        assert used <= set(look.COLOURS) and {"ink", "paper", "first"} <= used | {"first"}
        # what is no variable would be the same in the dark
        assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"', "", rest))


def test_for_papers_colours_are_plain(drawn):
    assert all(b"var(" not in formats["svg"] for formats in drawn.values())
