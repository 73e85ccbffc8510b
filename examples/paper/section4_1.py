"""Section 4.1: the training data as the datastore (Table 1).

The paper: neighbours from the text that the model was trained on lower perplexity without further
training; a continuous cache of the recent past gains less.
"""

from recipe import cached
from report import Section, Table, Trend, lowers, percent

TITLE = "Section 4.1: the training data as the datastore"
# Table 1, valid and test.
PAPER = {
    "language model": ("17.96", "18.65"),
    "+ kNN": ("16.06", "16.12"),
    "+ continuous cache": ("17.67", "18.27"),
    "+ kNN + continuous cache": ("15.81", "15.79"),
}
CACHE_SIZE = 2000


def steps(lab):
    """Train, store the training text, tune on valid, score test."""
    model = lab.model(lab.scale.main)
    datastore = lab.datastore(model, model.data)
    lab.evaluate(lab.knn, model, model.data, [datastore], cache=CACHE_SIZE)
    for split in ("valid", "test"):
        lab.score(lab.lm, model, model.data, split)


def results(lab):
    """Table 1 with ours beside it."""
    tuned, (cache, both) = lab.tuned(lab.knn), cached(lab.knn)
    best = tuned["best"]
    change, cache_change, both_change = (
        lab.change(lab.lm, name) for name in (lab.knn, cache, both)
    )
    cache_against_knn, both_against_knn = lab.change(cache, lab.knn), lab.change(lab.knn, both)
    figures = [
        (lab.perplexity(lab.lm, "valid"), lab.lm, ""),
        (best["perplexity"], lab.knn, percent(change)),
        (tuned["best_cache"]["perplexity"], cache, percent(cache_change)),
        (tuned["best_knn_cache"]["perplexity"], both, percent(both_change)),
    ]
    rows = [
        [words, *paper, f"{valid:.2f}", f"{lab.perplexity(name):.2f}", changed]
        for (words, paper), (valid, name, changed) in zip(PAPER.items(), figures)
    ]
    setting = (
        f"Model and datastore: `{lab.scale.main.name}`. k {best['k']}, lambda "
        f"{best['knn_lambda']:.3f}, temperature {best['temperature']:.3g}; cache of "
        f"{tuned['best_knn_cache']['cache_size']:,} tokens. Intervals are over the "
        f"{change.units:,} {change.unit} of test."
    )
    head = ["", "paper, valid", "test", "here, valid", "test", "change of test"]
    trends = [
        Trend(
            "neighbours from the training data lower perplexity",
            lowers(change),
            f"{percent(change)}; in the paper -13.6%.",
        ),
        Trend(
            "they gain more than a continuous cache",
            lowers(cache_against_knn),
            f"kNN against the cache: {percent(cache_against_knn)}; in the paper -11.8%.",
        ),
        Trend(
            "a continuous cache gains besides neighbours",
            lowers(both_against_knn),
            f"Both against kNN: {percent(both_against_knn)}; in the paper -2.0%.",
        ),
    ]
    return Section(TITLE, setting, [Table("Table 1", head, rows)], trends)
