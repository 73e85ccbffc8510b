"""Section 4.3: domain adaptation (Table 4, and the second curve of Figure 5).

The paper: a model of Wikipedia with a datastore of Books reads Books far better than without, but
not as well as a model of Books; the best lambda is larger than within a domain (0.65, not 0.25).

Both models have the dictionary of both domains, as the paper's share word pieces. At the small
scale it is of words: those that only one domain has were never an input or output of the other's
model, which makes that model worse than it would be with word pieces.
"""

from recipe import knn_name, lm_name
from report import FAILS, HOLDS, Section, Table, Trend, all_of, lowers, percent, raises

TITLE = "Section 4.3: domain adaptation"
# Table 4, valid and test, Books read by: a model of Wikipedia, of Books, of Wikipedia + Books.
PAPER = {
    "out of domain": ("37.13", "34.84"),
    "in domain": ("14.75", "11.89"),
    "out of domain + datastore": ("24.85", "20.47"),
}


def steps(lab):
    """For each direction: the model and its datastore of the other domain; that domain's own."""
    for source, target in lab.scale.domains:
        reader, native = lab.model(source), lab.model(target)
        data = lab.data(target)
        for split in ("valid", "test"):
            lab.score(lm_name(source, target), reader, data, split)
            lab.score(lm_name(target, target), native, data, split)
        lab.evaluate(knn_name(source, target), reader, data, [lab.datastore(reader, data)])
        lab.evaluate(knn_name(target, target), native, data, [lab.datastore(native, data)])


def results(lab):
    """Table 4 with ours beside it, for each direction."""
    tables, gains, against_native, lambdas = [], [], [], []
    for source, target in lab.scale.domains:
        outside, native = lm_name(source, target), lm_name(target, target)
        adapted, own = knn_name(source, target), knn_name(target, target)
        gains.append(lab.change(outside, adapted))
        against_native.append(lab.change(native, adapted))
        lambdas.append([lab.tuned(name)["best"]["knn_lambda"] for name in (adapted, own)])
        rows = [
            [f"model of {source.name}", *PAPER["out of domain"], *lab.on_both(outside), "", ""],
            [f"model of {target.name}", *PAPER["in domain"], *lab.on_both(native), "", ""],
            [f"model of {source.name} + datastore of {target.name}",
             *PAPER["out of domain + datastore"], *_tuned(lab, adapted), percent(gains[-1]),
             f"{lambdas[-1][0]:.3f}"],
            [f"model of {target.name} + datastore of {target.name}", "", "", *_tuned(lab, own),
             percent(lab.change(native, own)), f"{lambdas[-1][1]:.3f}"],
        ]  # fmt: skip
        tables.append(
            Table(
                f"Table 4: {target.name} (paper: Books, and Wikipedia for {source.name})",
                ["", "paper, valid", "test", "here, valid", "test", "change of test", "lambda"],
                rows,
            )
        )
    larger = all(adapted > own for adapted, own in lambdas)
    return Section(
        TITLE,
        "One dictionary of all words of both domains, for both models and both texts.",
        tables,
        [
            Trend(
                "a datastore of the new domain adapts a model to it",
                all_of(map(lowers, gains)),
                f"{'; '.join(map(percent, gains))}; in the paper -41.2%.",
            ),
            Trend(
                "a model of the domain itself is better still",
                all_of(map(raises, against_native)),
                "Adapted against the domain's own model: "
                f"{'; '.join(map(percent, against_native))}; in the paper +72.2%.",
            ),
            Trend(
                "the best lambda is larger than within the domain",
                HOLDS if larger else FAILS,
                "; ".join(f"{adapted:.2f} against {own:.2f}" for adapted, own in lambdas)
                + "; in the paper 0.65 against 0.25 (point estimates, tuned on valid).",
            ),
        ],
    )


def _tuned(lab, name):
    return [f"{lab.tuned(name)['best']['perplexity']:.2f}", f"{lab.perplexity(name):.2f}"]
