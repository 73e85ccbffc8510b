"""What the demonstration found: a table, the same as results.json, and a plot."""

import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, told apart by colour-blind readers as well; markers tell them in grey.
BASE, CURVE, BEST = "#000000", "#0072B2", "#D55E00"


def write_report(work, tuned, base, knn, seconds):
    """Print the table; write results.json and perplexity.png to the folder *work*.

    Args:
        work (Path): folder.
        tuned (dict): what ``fairseq-knnlm-tune`` wrote.
        base (tuple): tokens and perplexity of the language model on test.
        knn (tuple): the same with neighbours.
        seconds (dict): duration of every step.
    """
    results = collect(tuned, base, knn, seconds)
    with open(work / "results.json", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    plot(tuned, work / "perplexity.png")
    print("\n".join(["", *table(results), ""]))
    shown = Path(os.path.relpath(work))
    print(f"The same: {shown / 'results.json'}; the plot: {shown / 'perplexity.png'}")


def collect(tuned, base, knn, seconds):
    """All figures of the demonstration in one dictionary."""
    (tokens, base_perplexity), (knn_tokens, knn_perplexity) = base, knn
    if tokens != knn_tokens:
        raise ValueError(f"test has {tokens} tokens without neighbours and {knn_tokens} with them")
    best = tuned["best"]
    return {
        "valid": {
            "tokens": tuned["tuned_on"]["tokens"],
            "base_perplexity": tuned["tuned_on"]["base_perplexity"],
            "knn_perplexity": best["perplexity"],
        },
        "test": {
            "tokens": tokens,
            "base_perplexity": base_perplexity,
            "knn_perplexity": knn_perplexity,
        },
        "knn": {"k": best["k"], "lambda": best["knn_lambda"], "temperature": best["temperature"]},
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def table(results):
    """The lines of the table that the demonstration ends with."""
    valid, test, knn = results["valid"], results["test"], results["knn"]
    yield f"{'perplexity (lower is better)':<44}{'valid':>12}{'test':>12}"
    yield f"{'  language model':<44}" + "".join(
        f"{split['base_perplexity']:>12.2f}" for split in (valid, test)
    )
    yield f"{'  with its nearest neighbours':<44}" + "".join(
        f"{split['knn_perplexity']:>12.2f}" for split in (valid, test)
    )
    yield f"{'  change':<44}" + "".join(
        f"{split['knn_perplexity'] / split['base_perplexity'] - 1:>12.1%}"
        for split in (valid, test)
    )
    yield f"{'tokens':<44}{valid['tokens']:>12,}{test['tokens']:>12,}"
    yield (
        f"neighbours: k {knn['k']}, lambda {knn['lambda']:.3f}, temperature "
        f"{knn['temperature']:.3g}: tuned on valid, reported on test"
    )
    yield ""
    yield f"{'step':<44}{'seconds':>12}"
    for step, duration in results["seconds"].items():
        yield f"  {step:<42}{duration:>12.0f}"


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
