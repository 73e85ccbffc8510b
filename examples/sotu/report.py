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

# Names of methods and of their changes in the JSON of fairseq-knnlm-tune, and in words.
METHODS = (
    ("base", None, "language model"),
    ("cache", "cache_change", "+ continuous cache"),
    ("knn", "relative_change", "+ nearest neighbours"),
    ("knn_cache", "knn_cache_change", "+ nearest neighbours and cache"),
)
BESIDES = "knn_cache_change_from_knn"


def write_report(work, tuned, evaluated, seconds):
    """Print the table; write results.json and perplexity.png to the folder *work*.

    Args:
        work (Path): folder.
        tuned (dict): what ``fairseq-knnlm-tune`` wrote.
        evaluated (dict): tokens and perplexity on test that ``fairseq-eval-lm`` gave, by method.
        seconds (dict): duration of every step.
    """
    results = collect(tuned, evaluated, seconds)
    with open(work / "results.json", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    plot(tuned, work / "perplexity.png")
    print("\n".join(["", *table(results), ""]))
    shown = Path(os.path.relpath(work))
    print(f"The same: {shown / 'results.json'}; the plot: {shown / 'perplexity.png'}")


def collect(tuned, evaluated, seconds):
    """All figures of the demonstration in one dictionary."""
    valid, test = tuned["tuned_on"], tuned["reported_on"]
    for name, (tokens, perplexity) in evaluated.items():
        expected = round(test[f"{name}_perplexity"], 2)
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


def table(results):
    """The lines of the table that the demonstration ends with."""
    valid, test = results["valid"], results["test"]
    yield f"{'perplexity (lower is better)':<36}{'valid':>9}{'test':>9}{'change':>9}  95% interval"
    for name, change, words in METHODS:
        perplexities = "".join(f"{split[f'{name}_perplexity']:>9.2f}" for split in (valid, test))
        yield f"  {words:<34}{perplexities}{with_interval(test.get(change))}"
    yield f"  {'the cache, besides neighbours':<52}" + with_interval(test[BESIDES])
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
    yield ""
    yield f"{'step':<44}{'time':>12}"
    for step, duration in results["seconds"].items():
        yield f"  {step:<42}{in_time(duration):>12}"


def with_interval(change):
    """A relative change of perplexity on test and its 95% interval; nothing for None."""
    if change is None:
        return ""
    return f"{change['value']:>9.1%}  {change['low']:.1%} to {change['high']:.1%}"


def plot(tuned, path):
    """Perplexity on the tuned split against k and against the temperature, all else at its best."""
    split, base = tuned["tuned_on"]["split"], tuned["tuned_on"]["base_perplexity"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    panels = (
        ("k", "number of neighbours k", "temperature and lambda at their best for each k"),
        ("temperature", "temperature T", "k and lambda at their best for each T"),
    )
    for axis, (name, label, title) in zip(axes, panels):
        curve = lowest_perplexities(tuned["grid"], name)
        axis.axhline(base, color=BASE, linestyle="--", label="language model alone")
        axis.plot(*zip(*curve), "o-", color=CURVE, label="with neighbours")
        best = tuned["best"][name], tuned["best"]["perplexity"]
        axis.plot(*best, "D", color=BEST, markersize=9, label=f"best: {best[0]:.4g}")
        axis.set_xscale("log", base=2 if name == "k" else 10)
        axis.xaxis.set_major_formatter("{x:.4g}")
        axis.set_xlabel(label)
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel(f"perplexity on {split} (lower is better)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def lowest_perplexities(grid, name):
    """Pairs of each value that the grid has for *name* and the lowest perplexity with it."""
    lowest = {}
    for setting in grid:
        value, perplexity = setting[name], setting["perplexity"]
        lowest[value] = min(perplexity, lowest.get(value, perplexity))
    return sorted(lowest.items())
