"""What the benchmark found: tables and a plot."""

import logging

# where fairseq is imported, everything is logged
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, told apart by colour-blind readers as well; markers tell them in grey.
MODEL, OURS, OTHERS = "#000000", "#0072B2", "#D55E00"
COLORS = (OURS, OTHERS, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^v*PX<>"

# Titles, keys and formats of the columns.
FLOOR = (
    ("model alone", "name", "<22"),
    ("tokens", "tokens", ",d"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("", "held_up", "<1"),
    ("/ stock", "of_stock", ".3f"),
    ("/ bare", "of_bare_forward", ".3f"),
)
DATASTORES = (
    ("datastore", "share", "<10g"),
    ("entries", "entries", ",d"),
    ("index", "factory", ">20"),
    ("dump tok/s", "dump_tokens_per_s", ",.0f"),
    ("index s", "index_s", ".1f"),
    ("B/entry", "bytes_per_entry", ".0f"),
    ("of index", "index_bytes_per_entry", ".1f"),
    ("peak MiB", "build_peak_mib", ",.0f"),
)
COMMANDS = (
    ("fairseq-eval-lm", "name", "<22"),
    ("tokens", "tokens", ",d"),
    ("whole s", "seconds", ".1f"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("/ stock", "of_stock", ".3f"),
    ("perplexity", "perplexity", ".2f"),
    ("peak MiB", "peak_mib", ",.0f"),
)
METHODS = (
    ("method", "method", "<16"),
    ("k", "k", "d"),
    ("distances", "distances", ">10"),
    ("entries", "entries", ",d"),
    ("tokens", "tokens", ",d"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("", "held_up", "<1"),
    ("/ stock", "of_stock", ".3f"),
    ("CPU s", "cpu_s", ".1f"),
    ("kNN us", "knn_us_per_token", ",.0f"),
    ("perplexity", "perplexity", ".3f"),
    ("gap", "perplexity_gap", "+.3%"),
    ("recall", "recall", ".4f"),
    ("of mass", "mass_recall", ".4f"),
)
KINDS = (
    ("kind of CPU", "kind", "<16"),
    ("k", "k", "d"),
    ("queries", "queries", ",d"),
    ("float32 CPU s", "float32_cpu_s", ".2f"),
    ("bfloat16 CPU s", "bfloat16_cpu_s", ".2f"),
    ("int8 CPU s", "int8_cpu_s", ".2f"),
    ("chosen", "chosen", ">10"),
    ("/ best", "of_best", ".2f"),
)
GENERATION = (
    ("generation", "name", "<16"),
    ("k", "k", "d"),
    ("entries", "entries", ",d"),
    ("tokens", "tokens", ",d"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("", "held_up", "<1"),
    ("/ model alone", "of_alone", ".3f"),
    ("kNN ms/step", "knn_ms_per_step", ".2f"),
)
GROWTH = (
    ("growth", "method", "<16"),
    ("k", "k", "d"),
    ("distances", "distances", ">10"),
    ("entries x", "entries", ".1f"),
    ("time x", "time", ".2f"),
    ("of kNN x", "knn_time", ".2f"),
    ("", "held_up", "<1"),
)
RATIOS = (("ratio", "name", "<62"), ("value", "value", ".3f"), ("", "held_up", "<1"))
TYPES = (
    ("index", "factory", "<22"),
    ("B/entry", "bytes_per_entry", ".1f"),
    ("build s", "build_s", ".1f"),
    ("k", "k", "d"),
    ("distances", "distances", ">10"),
    ("queries/s", "queries_per_s", ",.0f"),
    ("", "held_up", "<1"),
    ("perplexity", "perplexity", ".3f"),
    ("gap", "perplexity_gap", "+.3%"),
    ("recall", "recall", ".4f"),
    ("of mass", "mass_recall", ".4f"),
)


def lines(results):
    """The lines of all tables."""
    tables = (
        (COMMANDS, "commands"),
        (FLOOR, "floor"),
        (DATASTORES, "datastores"),
        (KINDS, "kinds"),
        (METHODS, "methods"),
        (GENERATION, "generation"),
        (GROWTH, "growth"),
        (RATIOS, "ratios"),
        (TYPES, "index_types"),
    )
    for columns, name in tables:
        if results[name]:
            yield ""
            yield from _table(columns, [_readable(row) for row in results[name]])


def _readable(row):
    """A row with sizes in MiB as well, and a star for what was held up."""
    row = {**row, "held_up": "*" if row.get("held_up") else ""}
    found = [name for name in row if name.endswith("_bytes") and row[name] is not None]
    return {**row, **{name.replace("_bytes", "_mib"): row[name] / (1 << 20) for name in found}}


def _table(columns, rows):
    cells = [[title for title, _, _ in columns]]
    for row in rows:
        values = [(row.get(name), form) for _, name, form in columns]
        cells.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        yield "  ".join(
            cell.ljust(width) if column[2].startswith("<") else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns)
        ).rstrip()


def plot(results, path):
    """Speeds side by side, growth with the datastore, and kinds of index."""
    panels = [_plot_speeds, _plot_growth] + [_plot_types] * bool(results["index_types"])
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.8), constrained_layout=True
    )
    for axis, draw in zip(axes, panels):
        draw(axis, results)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label(row):
    """What a row of the methods is called in a plot."""
    if row["k"] is None:
        return row["method"]
    name = f"k={row['k']}, {row['distances']}"
    return name if row["method"] == "fairseq_knnlm" else f"{row['method']}, {name}"


def _plot_speeds(axis, results):
    entries = max(row["entries"] for row in results["datastores"])
    bars = [(row["name"], row["tokens_per_s"], MODEL) for row in results["floor"]]
    bars += [
        (label(row), row["tokens_per_s"], OURS if row["method"] == "fairseq_knnlm" else OTHERS)
        for row in results["methods"]
        if row["entries"] == entries and row.get("tokens_per_s")
    ]
    names, speeds, colors = zip(*bars[::-1])
    drawn = axis.barh(names, speeds, color=colors)
    axis.bar_label(drawn, fmt="{:,.0f}", padding=3)
    axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.set_xlabel("tokens/s (higher is better)")
    axis.set_title(f"{entries:,} entries", fontsize="medium")


def _plot_growth(axis, results):
    curves = {}
    for row in results["methods"]:
        if row.get("tokens_per_s"):
            point = row["entries"], 1e6 / row["tokens_per_s"]
            curves.setdefault(label(row), []).append(point)
    for number, (name, points) in enumerate(sorted(curves.items())):
        axis.plot(
            *zip(*sorted(points)), marker=MARKERS[number % len(MARKERS)],
            color=COLORS[number % len(COLORS)], label=name,
            linestyle="-" if "index" in name else "--",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("entries of the datastore")
    axis.set_ylabel("microseconds per token (lower is better)")
    axis.set_title("growth, forward pass included", fontsize="medium")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _plot_types(axis, results):
    k = max(row["k"] for row in results["index_types"])
    factories = list(dict.fromkeys(row["factory"] for row in results["index_types"]))
    for row in results["index_types"]:
        if row["k"] == k:
            number, exact = factories.index(row["factory"]), row["distances"] == "exact"
            axis.plot(
                row["queries_per_s"], 100 * row["perplexity_gap"],
                MARKERS[number % len(MARKERS)], color=COLORS[number % len(COLORS)],
                fillstyle="none" if exact else "full",
                label=None if exact else row["factory"],
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("queries/s (higher is better)")
    axis.set_ylabel("perplexity, % beyond exhaustive search")
    entries = results["index_types"][0]["entries"]
    axis.set_title(f"k={k}, {entries:,} entries; hollow: exact distances", fontsize="medium")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
