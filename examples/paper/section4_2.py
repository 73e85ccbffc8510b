"""Section 4.2: more data without training (Table 3, Figure 2).

The paper: a model of 100M tokens with a datastore of 3B is better than a model trained on all 3B;
perplexity falls with every larger datastore, and the best lambda grows with it.
"""

from pipeline import read_json
from recipe import lm_name
from report import FAILS, HOLDS, Panel, Plot, Section, Table, Trend, all_of, lowers, percent

TITLE = "Section 4.2: more data without training"
PIECE = "piece-lm"


def name_of(pieces):
    """Name of the scores with a datastore of that many pieces."""
    return f"pieces-{pieces}-knn"


def _datastores(lab):
    model = lab.piece_model()
    return [lab.datastore(model, data) for data in lab.pieces()]


def steps(lab):
    """A model of the first piece, datastores of one, two, ... all pieces, a model of all."""
    model, whole = lab.piece_model(), lab.model(lab.scale.large)
    whole_name = lm_name(lab.scale.large, lab.scale.large)
    datastores = _datastores(lab)
    for count in range(1, len(datastores) + 1):
        lab.evaluate(name_of(count), model, model.data, datastores[:count])
    for split in ("valid", "test"):
        lab.score(PIECE, model, model.data, split)
        lab.score(whole_name, whole, whole.data, split)


def results(lab):
    """Table 3 and Figure 2 with ours beside them."""
    names = [name_of(count) for count in range(1, len(lab.scale.shares) + 1)]
    entries, total = [], 0
    for data in lab.pieces():
        folder = lab.datastore(lab.piece_model(), data)
        total += read_json(folder / "manifest.json")["count"]
        entries.append(total)
    best = [lab.tuned(name)["best"] for name in names]
    perplexities = [lab.perplexity(name) for name in names]
    steps_down = [lab.change(*pair) for pair in zip([PIECE, *names], names)]
    whole_name = lm_name(lab.scale.large, lab.scale.large)
    against_all = lab.change(whole_name, names[-1])
    table = Table(
        "Table 3",
        ["", "paper, valid", "test", "here, valid", "test"],
        [
            ["model of all (paper: 3B)", "16.11", "15.17", *lab.on_both(whole_name)],
            [f"model of a part (paper: 100M; here {entries[0]:,})", "20.99", "19.59",
             *lab.on_both(PIECE)],
            ["model of a part + datastore of all", "14.61", "13.73",
             f"{best[-1]['perplexity']:.2f}", f"{perplexities[-1]:.2f}"],
        ],
    )  # fmt: skip
    sizes = Table(
        "Figure 2: the datastore grows",
        ["entries", "test", "change by this step", "lambda", "temperature", "k"],
        [
            [f"{size:,}", f"{perplexity:.2f}", percent(step), f"{setting['knn_lambda']:.3f}",
             f"{setting['temperature']:.3g}", str(setting["k"])]
            for size, perplexity, step, setting in zip(entries, perplexities, steps_down, best)
        ],
    )  # fmt: skip
    lambdas = [setting["knn_lambda"] for setting in best]
    return Section(
        TITLE,
        f"The model has seen {entries[0]:,} of {entries[-1]:,} tokens of "
        f"`{lab.scale.large.name}`; documents of every piece are of the whole span of the text.",
        [table, sizes],
        [
            Trend(
                "every larger datastore lowers perplexity",
                all_of(map(lowers, steps_down)),
                "By step: " + "; ".join(map(percent, steps_down)) + ".",
            ),
            Trend(
                "the best lambda grows with the datastore",
                HOLDS if lambdas == sorted(lambdas) else FAILS,
                f"From {lambdas[0]:.2f} to {lambdas[-1]:.2f}; in the paper from about 0.25 to "
                "about 0.55 (point estimates, tuned on valid).",
            ),
            Trend(
                "a model of a part with the datastore of all beats a model of all",
                lowers(against_all),
                f"Against the model of all: {percent(against_all)}; in the paper -9.5%, with "
                "30 times the model's own data in the datastore, here "
                f"{entries[-1] / entries[0]:.0f} times, and keys of a model that has learnt far "
                "less.",
            ),
        ],
        [
            Plot(
                "figure2",
                "Figure 2: perplexity of test and best lambda against the size of the datastore",
                [
                    Panel(
                        "here", "entries of the datastore", "perplexity of test",
                        {"model of a part + datastore": list(zip(entries, perplexities))},
                        {"model of a part": lab.perplexity(PIECE),
                         "model of all": lab.perplexity(whole_name)}, 2,
                    ),
                    Panel("here", "entries of the datastore", "best lambda",
                          {"tuned on valid": list(zip(entries, lambdas))}, {}, 2),
                ],
            )
        ],
    )  # fmt: skip
