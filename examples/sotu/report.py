"""What the demonstration found: a table, the same as results.json, and a plot."""

import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402
from pipeline import in_time  # noqa: E402

# Okabe and Ito's colours, told apart by colour-blind readers as well; markers tell them in grey.
BASE, CURVE, BEST = "#000000", "#0072B2", "#D55E00"

# Methods as the JSON of fairseq-knnlm-tune names them, and in words.
METHODS = {
    "base": "language model",
    "cache": "+ continuous cache",
    "knn": "+ nearest neighbours",
    "knn_cache": "+ nearest neighbours and cache",
}
BESIDES = "knn_cache_change_from_knn"


def write_report(work, tuned, evaluated, seconds, pages):
    """Print the table; write results.json and perplexity.png to the folder *work*.

    Args:
        work (Path): folder.
        tuned (dict): what ``fairseq-knnlm-tune`` wrote.
        evaluated (dict): tokens and perplexity on test that ``fairseq-eval-lm`` gave, by method.
        seconds (dict): duration of every step.
        pages (dict of Path): what there is to open in a browser, by what it is.
    """
    results = collect(tuned, evaluated, seconds)
    with open(work / "results.json", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    plot(tuned, work / "perplexity.png")
    print("\n".join(["", *table(results), ""]))
    shown = Path(os.path.relpath(work))
    print(f"The same: {shown / 'results.json'}; the plot: {shown / 'perplexity.png'}")
    for what, page in pages.items():
        print(f"{what}: {page.resolve().as_uri()}")


def collect(tuned, evaluated, seconds):
    """All figures of the demonstration in one dictionary."""
    valid, test = tuned["tuned_on"], tuned["reported_on"]
    for name, (tokens, perplexity) in evaluated.items():
        # The stock command gives the perplexity of tokens in either case.
        expected = of_tokens(test, name) if name == "base" else test[f"{name}_perplexity"]
        expected = round(expected, 2)
        # the log has two decimals
        if tokens != test["tokens"] or abs(perplexity - expected) > 0.011:
            raise ValueError(
                f"fairseq-eval-lm gave {perplexity} over {tokens} tokens with {name}, "
                f"fairseq-knnlm-tune {expected} over {test['tokens']}"
            )
    return {
        "valid": valid,
        "test": test,
        "knn": tuned["best"],
        "knn_cache": tuned["best_knn_cache"],
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def of_tokens(measured, name):
    """Perplexity of the tokens of a text, where that of its words was measured."""
    return measured[f"{name}_perplexity"] ** (measured["counted"] / measured["tokens"])


def table(results):
    """The lines of the table that the demonstration ends with."""
    valid, test = results["valid"], results["test"]
    yield f"{'perplexity (lower is better)':<36}{'valid':>9}{'test':>9}{'change':>9}  95% interval"
    for name, words in METHODS.items():
        perplexities = "".join(f"{split[f'{name}_perplexity']:>9.2f}" for split in (valid, test))
        yield f"  {words:<34}{perplexities}{with_interval(change_of(test, name))}"
    yield f"  {'the cache, besides neighbours':<52}" + with_interval(test[BESIDES])
    if test["counted"] != test["tokens"]:
        yield from lines_of_pieces(valid, test)
    yield f"{'tokens':<36}{valid['tokens']:>9,}{test['tokens']:>9,}"
    knn, both = results["knn"], results["knn_cache"]
    yield (
        f"neighbours: k {knn['k']}, temperature {knn['temperature']:.3g}, lambda "
        f"{knn['knn_lambda']:.3f}; with a cache of {both['cache_size']}, theta "
        f"{both['cache_theta']:.3g}:"
    )
    yield (
        f"lambda {both['knn_lambda']:.3f}, weight of the cache {both['cache_lambda']:.3f}. "
        "Tuned on valid, reported on test"
    )
    yield units_in_words(test[BESIDES])
    yield ""
    yield f"{'step':<44}{'time':>12}"
    for step, duration in results["seconds"].items():
        yield f"  {step:<42}{in_time(duration):>12}"


def change_of(split, name):
    """The relative change of perplexity by a method; None for the language model."""
    return split.get("relative_change" if name == "knn" else f"{name}_change")


def with_interval(change):
    """A relative change of perplexity on test and its 95% interval; nothing for None."""
    if change is None:
        return ""
    bounds = bounds_of(change)
    words = "none" if bounds is None else "{:.1%} to {:.1%}".format(*bounds)
    return f"{change['value']:>9.1%}  {words}"


def lines_of_pieces(valid, test):
    """What the table says besides where its perplexities are of words that are several tokens."""
    yield "the same of tokens, pieces of words"
    for name, words in METHODS.items():
        yield f"  {words:<34}" + "".join(f"{of_tokens(each, name):>9.2f}" for each in (valid, test))
    if None not in (valid["bytes"], test["bytes"]):
        yield "bits per byte of the text"
        for name, words in METHODS.items():
            bits = "".join(f"{each[f'{name}_bits_per_byte']:>9.3f}" for each in (valid, test))
            yield f"  {words:<34}{bits}"
    yield f"{'words':<36}{valid['counted']:>9,}{test['counted']:>9,}"


def units_in_words(change):
    """What an interval is of, or is not for want of."""
    unit = change["unit"] if change["units"] != 1 else change["unit"].rstrip("s")
    units = f"{change['units']:,} {unit} of test"
    if bounds_of(change) is None:
        return f"intervals: none, too few: {units}"
    return f"intervals: paired bootstrap over {units}"


def plot(tuned, path):
    """Perplexity on test of every method, and on valid against k."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    plot_methods(left, tuned["reported_on"])
    plot_k(right, tuned)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def plot_methods(axes, test):
    """One line a method, named beside the axis, and the interval of its change from the model."""
    base = test["base_perplexity"]
    for place, name in enumerate(METHODS):
        perplexity, marker = test[f"{name}_perplexity"], "s" if name == "base" else "o"
        bounds = bounds_of(change_of(test, name))
        if bounds:
            axes.plot([base * (1 + bound) for bound in bounds], [place] * 2, color=CURVE)
        axes.plot(perplexity, place, marker, color=BASE if name == "base" else CURVE)
        axes.annotate(
            f"{perplexity:.2f}", (perplexity, place), xytext=(0, 7), textcoords="offset points",
            ha="center", fontsize="small",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.axvline(base, color=BASE, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(METHODS)), list(METHODS.values()))
    axes.set_ylim(len(METHODS) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"perplexity on {test['split']} (lower is better)")
    axes.set_title(f"95% {units_in_words(test[BESIDES])}", fontsize="medium")


def plot_k(axes, tuned):
    """Perplexity on the tuned split against k, temperature and lambda at their best for each."""
    split, base = tuned["tuned_on"]["split"], tuned["tuned_on"]["base_perplexity"]
    curve = lowest_perplexities(tuned["grid"], "k")
    ks = [k for k, _ in curve]
    axes.axhline(base, color=BASE, linestyle=":", linewidth=1)
    axes.annotate(
        "language model", (ks[-1], base), xytext=(0, -4), textcoords="offset points",
        ha="right", va="top", fontsize="small",
    )  # fmt: skip
    axes.plot(*zip(*curve), "o-", color=CURVE)
    best = tuned["best"]
    axes.plot(best["k"], best["perplexity"], "D", color=BEST, markersize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, ks, fontsize="small")
    axes.minorticks_off()
    axes.set_xlabel("number of neighbours k")
    axes.set_ylabel(f"perplexity on {split}")
    axes.set_title("best T and lambda for each k; diamond: chosen", fontsize="medium")
    axes.grid(alpha=0.3)


def bounds_of(change):
    """The interval of a change; None where there is none."""
    if change is None or change["low"] is None:
        return None
    return change["low"], change["high"]


def lowest_perplexities(grid, name):
    """Pairs of each value that the grid has for *name* and the lowest perplexity with it."""
    lowest = {}
    for setting in grid:
        value, perplexity = setting[name], setting["perplexity"]
        lowest[value] = min(perplexity, lowest.get(value, perplexity))
    return sorted(lowest.items())
