"""Section 6: why it works (Figures 6, 7, 8).

The paper: neighbours help with names, facts and phrases that recur; an n-gram model in place of the
neighbours gains only 0.2, a transformer that has learnt the training set by heart only 0.1 of the
1.9 that neighbours gain.
"""

import numpy as np
import section4_1
import section4_2
import torch
from pipeline import display, evaluated, program, read_json
from recipe import HERE, LOGGING, PYTHON, interval
from report import Section, Table, Trend, all_of, lowers, percent

from fairseq_knnlm.probability.metrics import perplexity
from fairseq_knnlm.probability.mixture import mix
from fairseq_knnlm.probability.weights import best_weights

TITLE = "Section 6: analysis"
MEMORISING = "memorising-lm"
EXAMPLES = 8
CONTEXT = 12


def steps(lab):
    """A page of neighbours; n-gram models; a model without dropout that learns by heart."""
    section4_1.steps(lab)
    _inspect(lab)
    _ngrams(lab)
    _memorise(lab)


def _inspect(lab):
    model = lab.model(lab.scale.main)
    datastore = lab.datastore(model, model.data)
    page = lab.work / "neighbours.html"
    lab.step(
        "inspect",
        "which memories spoke",
        [
            *(program("fairseq-knnlm-inspect"), model.data, "--path", model.checkpoint),
            *("--knn-datastore", datastore, "--knn-temperature", "auto", "--gen-subset", "test"),
            *("--positions", lab.scale.passage, "--html", page),
            *("--json", lab.work / "neighbours.json", *model.corpus.reading, *LOGGING),
        ],
        inputs=[datastore / "manifest.json", model.data / "test.bin"],
        outputs=[page, lab.work / "neighbours.json"],
        show="fairseq_knnlm.inspect",
    )


def _ngram_name(order):
    return f"{order}-gram"


def _ngrams(lab):
    script, texts = HERE / "ngram.py", lab.text(lab.scale.main)
    for order in lab.scale.ngram_orders:
        name = _ngram_name(order)
        arpa = lab.work / "ngrams" / f"{name}.arpa"
        lab.step(
            f"estimate-{name}",
            "an n-gram model, modified Kneser-Ney",
            [PYTHON, script, "estimate", texts["train"], arpa, "--order", order],
            inputs=[texts["train"], script],
            outputs=[arpa],
            show="tokens",
        )
        for split in ("valid", "test"):
            output = lab.scores_path(name, split)
            lab.step(
                f"score-{name}-{split}",
                f"its log probabilities of {split}",
                [PYTHON, script, "score", texts[split], arpa, output],
                inputs=[texts[split], arpa],
                outputs=[output],
            )


def _memorised(lab):
    """The model that is helped, the kNN result to compare with, the text learnt by heart."""
    if lab.scale.memory == "main":
        return lab.model(lab.scale.main), lab.lm, lab.knn
    return lab.piece_model(), section4_2.PIECE, section4_2.name_of(1)


def _memorise(lab):
    model, base, knn = _memorised(lab)
    for split in ("valid", "test"):
        lab.score(base, model, model.data, split)
    lab.evaluate(knn, model, model.data, [lab.datastore(model, model.data)])
    memory = lab.trained(
        f"memorising-{model.name}", model.corpus, model.data, lab.scale.memorising, last=True
    )
    for split in ("valid", "test"):
        lab.score(MEMORISING, memory, model.data, split)
    lab.step(
        "learnt",
        "how well it knows its training text",
        [
            *(program("fairseq-eval-lm"), model.data, "--path", memory.checkpoint),
            *("--gen-subset", "train", *model.corpus.reading, *LOGGING),
        ],
        inputs=[model.data / "train.bin", memory.checkpoint],
        outputs=[],
    )
    lab.step(
        "known",
        "how well the other knows it",
        [
            *(program("fairseq-eval-lm"), model.data, "--path", model.checkpoint),
            *("--gen-subset", "train", *model.corpus.reading, *LOGGING),
        ],
        inputs=[model.data / "train.bin", model.checkpoint],
        outputs=[],
    )


def results(lab):
    """Figures 6, 7 and 8 with ours beside the paper's."""
    ngrams, ngram_trend = _ngram_results(lab)
    memory, memory_trend = _memory_results(lab)
    return Section(
        TITLE,
        "Whatever is interpolated has its own lambda, tuned on valid.",
        [_examples(lab), ngrams, memory],
        [ngram_trend, memory_trend],
        text=f"More neighbours: [{display(lab.work / 'neighbours.html')}](neighbours.html).",
    )


def mixed(lab, base, other):
    """A model interpolated with another, lambda tuned on valid.

    Returns:
        tuple: lambda, log probabilities of valid and of test, arrays.
    """
    valid, test = (
        [torch.from_numpy(lab.log_p(name, split)) for name in (base, other)]
        for split in ("valid", "test")
    )
    knn_lambda = float(best_weights(valid)[1])
    return knn_lambda, *(mix(*pair, knn_lambda=knn_lambda).numpy() for pair in (valid, test))


def _row(lab, words, paper, base, other):
    """A row of a table and the log probabilities of test."""
    knn_lambda, valid, test = mixed(lab, base, other)
    change = interval(lab.log_p(base), test, _targets(lab, base))
    return [words, paper, f"{lab.perplexity(other):.2f}", f"{perplexity(valid):.2f}",
            f"{perplexity(test):.2f}", percent(change), f"{knn_lambda:.3f}"], test  # fmt: skip


def _knn_row(lab, paper, base, knn):
    best = lab.tuned(knn)["best"]
    return ["+ kNN", paper, "", f"{best['perplexity']:.2f}", f"{lab.perplexity(knn):.2f}",
            percent(lab.change(base, knn)), f"{best['knn_lambda']:.3f}"]  # fmt: skip


def _base_row(lab, paper, base):
    return ["language model", paper, "", f"{lab.perplexity(base, 'valid'):.2f}",
            f"{lab.perplexity(base):.2f}", "", ""]  # fmt: skip


def _targets(lab, name):
    return np.load(lab.scores_path(name, "test"))["targets"]


HEAD = ["", "paper, valid", "alone, test", "here, valid", "test", "change of test", "lambda"]


def _ngram_results(lab):
    rows, knn_against = [_base_row(lab, "17.96", lab.lm)], []
    for order in lab.scale.ngram_orders:
        row, test = _row(lab, f"+ {order}-gram", "", lab.lm, _ngram_name(order))
        rows.append(row)
        knn_against.append(interval(test, lab.log_p(lab.knn), _targets(lab, lab.lm)))
    rows[-1][1] = "gain 0.2"
    rows.append(_knn_row(lab, "16.06 (gain 1.9)", lab.lm, lab.knn))
    alone = min(lab.perplexity(_ngram_name(order)) for order in lab.scale.ngram_orders)
    trend = Trend(
        "neighbours gain more than an n-gram model",
        all_of(map(lowers, knn_against)),
        f"kNN against the mixtures with n-grams: {'; '.join(map(percent, knn_against))}. The best "
        f"n-gram model alone has perplexity {alone:.2f}, the transformer "
        f"{lab.perplexity(lab.lm):.2f}: what n-grams add depends on how far the transformer is "
        "ahead of them (the paper's, at 17.96, far).",
    )
    return Table("Figure 7: an n-gram model in place of the neighbours", HEAD, rows), trend


def _memory_results(lab):
    model, base, knn = _memorised(lab)
    row, test = _row(lab, "+ memorising model", "gain 0.1", base, MEMORISING)
    against = interval(test, lab.log_p(knn), _targets(lab, base))
    learnt, known = (
        evaluated(lab.work / "logs" / f"{name}.log")[1] for name in ("learnt", "known")
    )
    rows = [_base_row(lab, "17.96", base), row, _knn_row(lab, "16.06 (gain 1.9)", base, knn)]
    trend = Trend(
        "neighbours gain more than a model that has learnt the training set by heart",
        lowers(against),
        f"kNN against the mixture with the memorising model: {percent(against)}. Perplexity of "
        f"its training text ({model.data.name}): {learnt:.2f}, with the regularised model "
        f"{known:.2f}; in the paper the memorising model reaches a loss of 0 and a perplexity of "
        "28.59 on valid at best.",
    )
    return Table("Figure 8: a model that memorises in place of the datastore", HEAD, rows), trend


def _examples(lab):
    """The tokens of the passage that neighbours helped most, as in Figure 6."""
    inspection = read_json(lab.work / "neighbours.json")
    tokens = inspection["tokens"]
    helped = sorted(
        (place for place, token in enumerate(tokens) if not token["unknown"]),
        key=lambda place: -tokens[place]["log_ratio"],
    )
    rows, seen = [], set()
    for place in helped:
        token = tokens[place]
        if token["text"] in seen or len(rows) == EXAMPLES:
            continue
        seen.add(token["text"])
        before = " ".join(each["text"] for each in tokens[max(0, place - CONTEXT) : place])
        nearest = next(each for each in token["neighbors"] if each["matches"])
        memory = " ".join([*nearest["before"][-CONTEXT:], f"[{nearest['token']}]"])
        rows.append(
            [_cell(before), _cell(token["text"]), f"{token['p_lm']:.2g}",
             f"{token['p_knn']:.2g}", _cell(memory)]
        )  # fmt: skip
    return Table(
        "Figure 6: the tokens of one passage of test that neighbours help most (paper: "
        "'development', p_knn 0.998, p_lm 0.124)",
        ["context", "token", "p_lm", "p_knn", "nearest neighbour that has it"],
        rows,
    )


def _cell(text):
    """Words that a table of Markdown shows as they are."""
    return text.replace("|", "\\|").replace("<", "&lt;")
