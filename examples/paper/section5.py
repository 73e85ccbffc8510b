"""Section 5: keys (Table 5), neighbours (Figure 4), interpolation (Figure 5), precision.

The paper: the input of the last feed-forward network after its layer norm is the best key, that of
the layer before slightly worse; more neighbours help, with diminishing return; quantised distances
cost half of the gain.
"""

import section4_1
from recipe import knn_name
from report import FAILS, HOLDS, Panel, Plot, Section, Table, Trend, all_of, lowers, percent

TITLE = "Section 5: tuning nearest neighbour search"
CHOSEN = "ffn-input"
# Table 5: the --knn-key, the paper's words for it, its perplexity of valid.
KEYS = {
    "output": ("model output", "17.07"),
    "output-after-norm": ("model output after layer norm", "17.01"),
    CHOSEN: ("FFN input after layer norm", "16.06"),
    "ffn-input-before-norm": ("FFN input before layer norm", "17.06"),
    "attn-input": ("attention input after layer norm", "16.76"),
    "attn-input-before-norm": ("attention input before layer norm", "17.14"),
}
# The chosen key of the second-last layer, which the paper's text compares without a figure.
LAYER_BEFORE = "key-layer-before"
# Figure 4, read off the plot, valid.
PAPER_K = [(1, 17.6), (2, 17.3), (8, 16.8), (64, 16.3), (256, 16.2), (1024, 16.1)]
QUANTISED = "knn-distances-index"


def _name(lab, key):
    return lab.knn if key == CHOSEN else f"key-{key}"


def steps(lab):
    """A datastore for every key; the other distances in the first of them."""
    section4_1.steps(lab)
    model = lab.model(lab.scale.main)
    for key in KEYS:
        if key != CHOSEN:
            flags = ("--knn-key", key)
            datastore = lab.datastore(model, model.data, *flags, suffix=f"-{key}")
            lab.evaluate(_name(lab, key), model, model.data, [datastore])
    flags = ("--knn-key-layer", "-2")
    datastore = lab.datastore(model, model.data, *flags, suffix="-layer-before")
    lab.evaluate(LAYER_BEFORE, model, model.data, [datastore])
    datastore = lab.datastore(model, model.data)
    lab.evaluate(QUANTISED, model, model.data, [datastore], "--knn-distances", "index")


def results(lab):
    """Table 5, Figures 4 and 5, and the precision, with ours beside the paper's."""
    keys, *key_trends = _keys(lab)
    k_table, k_trend, k_plot = _neighbours(lab)
    precision, precision_trend = _precision(lab)
    best = lab.tuned(lab.knn)["best"]
    return Section(
        TITLE,
        f"`{lab.scale.main.name}`, as in section 4.1; every key and k with its own lambda and "
        "temperature.",
        [keys, k_table, precision],
        [*key_trends, *k_trend, precision_trend],
        [k_plot, _interpolation(lab, best)],
    )


def _keys(lab):
    rows = [["none", "17.96", f"{lab.perplexity(lab.lm, 'valid'):.2f}",
             f"{lab.perplexity(lab.lm):.2f}", "", ""]]  # fmt: skip
    against = {}

    def add(name, words, paper):
        best = lab.tuned(name)["best"]
        if name != lab.knn:
            against[name] = lab.change(name, lab.knn)
        rows.append(
            [words, paper, f"{best['perplexity']:.2f}", f"{lab.perplexity(name):.2f}",
             percent(lab.change(lab.lm, name)), percent(against[name]) if name in against else ""]
        )  # fmt: skip

    for key, (words, paper) in KEYS.items():
        add(_name(lab, key), f"{words} (`{key}`)", paper)
    add(LAYER_BEFORE, f"{KEYS[CHOSEN][0]} of the second-last layer", "slightly worse")
    table = Table(
        "Table 5: the key",
        ["key", "paper, valid", "here, valid", "test", "change of test", "chosen key against it"],
        rows,
    )
    layer_before = against.pop(LAYER_BEFORE)
    return (
        table,
        Trend(
            "the FFN input after layer norm is the best key",
            all_of(map(lowers, against.values())),
            "Against the others, in the order of the table: "
            + "; ".join(map(percent, against.values())) + ".",
        ),
        Trend(
            "the last layer's key is better than the second-last layer's",
            lowers(layer_before),
            f"{percent(layer_before)}.",
        ),
    )  # fmt: skip


def _neighbours(lab):
    rows = lab.curve(lab.knn, "k")
    curve = [(row["k"], row["perplexity"]) for row in rows]
    paper = dict(PAPER_K)
    base = lab.perplexity(lab.lm, "valid")
    table = Table(
        "Figure 4: neighbours per query, valid",
        ["k", "paper (read off the plot)", "here", "lambda"],
        [
            [str(row["k"]), f"{paper[row['k']]}" if row["k"] in paper else "",
             f"{row['perplexity']:.2f}", f"{row['knn_lambda']:.3f}"]
            for row in rows
        ],
    )  # fmt: skip
    steps = list(zip(curve, curve[1:]))
    falls = all(after <= before for (_, before), (_, after) in steps)
    gains = [before - after for (_, before), (_, after) in steps]
    returns = [gain / (after - before) for gain, ((before, _), (after, _)) in zip(gains, steps)]
    largest = max(range(len(gains)), key=gains.__getitem__)
    trends = [
        Trend(
            "more neighbours never hurt",
            HOLDS if falls else FAILS,
            f"From {curve[0][1]:.2f} at k = 1 to {curve[-1][1]:.2f} at k = {curve[-1][0]:,} "
            "(valid, where lambda and temperature are tuned for each).",
        ),
        Trend(
            "the return of one more neighbour diminishes",
            HOLDS if returns == sorted(returns, reverse=True) else FAILS,
            f"One more gains {returns[0]:.2f} at k = {curve[0][0]} and {returns[-1]:.4f} at k = "
            f"{curve[-2][0]:,}. A doubling gains {gains[0]:.2f} at k = {curve[0][0]}, most at k = "
            f"{curve[largest][0]:,}, {gains[largest]:.2f}, and {gains[-1]:.2f} at the end; in the "
            "paper 0.3 at k = 1 and 0.05 at the end.",
        ),
    ]
    plot = Plot(
        "figure4",
        "Figure 4: perplexity of valid against the number of neighbours",
        [
            Panel("paper, read off its plot", "k", "perplexity", {"kNN-LM": PAPER_K},
                  {"language model": 17.96}, 2),
            Panel("here", "k", "perplexity", {"kNN-LM": curve}, {"language model": base}, 2),
        ],
    )  # fmt: skip
    return table, trends, plot


def _interpolation(lab, best):
    series = {"in domain": _lambda_curve(lab, lab.knn)}
    source, target = lab.scale.domains[0]
    adapted = knn_name(source, target)
    if lab.tuned(adapted):
        series["domain adaptation"] = _lambda_curve(lab, adapted)
    return Plot(
        "figure5",
        "Figure 5: perplexity of valid against lambda, relative to no neighbours",
        [Panel("here (paper: best at 0.25 in domain, 0.65 in adaptation)", "lambda",
               "perplexity / language model's", series)],
    )  # fmt: skip


def _lambda_curve(lab, name):
    rows = lab.curve(name, "lambda")
    base = rows[0]["perplexity"]
    return [
        (row["knn_lambda"], row["perplexity"] / base)
        for row in rows
        if row["perplexity"] and row["perplexity"] < 1.3 * base
    ]


def _precision(lab):
    change = lab.change(QUANTISED, lab.knn)
    rows = [
        [words, paper, f"{lab.tuned(name)['best']['perplexity']:.2f}",
         f"{lab.perplexity(name):.2f}", percent(lab.change(lab.lm, name))]
        for words, paper, name in (
            ("quantised", "16.5", QUANTISED), ("exact", "16.06", lab.knn),
        )
    ]  # fmt: skip
    table = Table(
        "Precision of the distances",
        ["distances", "paper, valid", "here, valid", "test", "change of test"],
        rows,
    )
    trend = Trend(
        "exact distances are better than quantised ones",
        lowers(change),
        f"{percent(change)}; in the paper -2.7% (valid). The index here has finer codes for its "
        "dimension than the paper's: 64 bytes for 256 numbers, not for 1,024.",
    )
    return table, trend
