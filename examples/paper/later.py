"""After 2020: weights that depend on the token, and searches that are not made.

He et al. (EMNLP 2021) weigh neighbours by a network that looks before the search, and leave out
half of the searches at equal perplexity. Drozdov et al. (2022) take a weight for each of some
ranges of the distance of the nearest neighbour, Li et al. (2024) a rule of two numbers.

Every gate is fitted on valid and compared on test with the constant lambda of the same neighbours,
also where a model is adapted to another domain (section 4.3).
"""

from pipeline import program, read_json
from recipe import LOGGING, knn_name, lm_name
from report import FAILS, HOLDS, OPEN, Panel, Plot, Section, Table, Trend, lowers, percent

from fairseq_knnlm.probability.bootstrap import Interval

TITLE = "After 2020: a weight for every token"
# The one that keeps most of a retrieval is first: the others read what it kept.
KINDS = ("learned", "buckets", "nest")
# Test perplexity on WikiText-103 with a constant lambda and with the gate.
PAPER = {
    "learned": "16.65 -> 16.35 (He et al.)",
    "buckets": "16.12 -> 15.50 (Drozdov et al.)",
    "nest": "(Li et al.)",
}
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
PAPER_SKIPPED = {0.1: "", 0.3: "16.47", 0.5: "16.67", 0.7: "16.99", 0.9: "17.59"}


def steps(lab):
    """Every gate beside the model's own training text; the learned one for each adaptation."""
    main = lab.scale.main
    own = lab.model(main)
    for kind in KINDS:
        _tune(lab, main, main, kind, lab.datastore(own, lab.data(main)))
    for source, target in lab.scale.domains:
        reader = lab.model(source)
        _tune(lab, source, target, "learned", lab.datastore(reader, lab.data(target)))


def _name(source, target, kind):
    return f"{knn_name(source, target)}-{kind}"


def _tune(lab, source, target, kind, datastore):
    model, data = lab.model(source), lab.data(target)
    name = _name(source, target, kind)
    output, kept = lab.tuned_path(name), lab.work / "tuned" / f"{knn_name(source, target)}.npz"
    lab.step(
        f"gate-{name}",
        f"a gate of the kind {kind}, fitted on valid and reported on test",
        [
            *(program("fairseq-knnlm-tune"), data, "--path", model.checkpoint),
            *("--gen-subset", "valid", "--report-subset", "test", "--knn-gate", kind),
            *("--knn-datastore", datastore, "--knn-distances", source.distances),
            *("--knn-neighbors", kept, "--knn-output", output, *model.corpus.reading, *LOGGING),
        ],
        inputs=[
            *(data / "valid.bin", data / "test.bin", model.checkpoint),
            *(datastore / "manifest.json",),
        ],
        outputs=[output],
    )


def results(lab):
    """Each gate against the constant lambda, and what it costs to skip."""
    main = lab.scale.main
    reports = {kind: _report(lab, main, main, kind) for kind in KINDS}
    adapted = {
        lm_name(source, target): _report(lab, source, target, "learned")
        for source, target in lab.scale.domains
    }
    curve = reports["learned"]["skip_curve"]
    against = {kind: _change(report) for kind, report in reports.items()}
    of_domains = [_change(report) for report in adapted.values()]
    half = next(point["perplexity"] for point in curve if point["skip"] == 0.5)
    cost = half / reports["learned"]["gate_perplexity"] - 1
    return Section(
        TITLE,
        "The paper's figures are of WikiText-103, most with quantised distances.",
        [_gate_table(reports), _domain_table(adapted), _skip_table(curve)],
        [
            Trend(
                "a learned gate is better than a constant lambda",
                lowers(against["learned"]),
                f"{percent(against['learned'])}; in the paper -1.8%.",
            ),
            Trend(
                "buckets of retrieval quality are better than a constant lambda",
                lowers(against["buckets"]),
                f"{percent(against['buckets'])}; in the paper -3.8%.",
            ),
            Trend(
                "half of the searches can be left out at little cost",
                HOLDS if half < reports["learned"]["knn_perplexity"] else FAILS,
                f"{cost:+.1%} against all searches with the same gate, {half:.2f} against "
                f"{reports['learned']['knn_perplexity']:.2f} with constant lambda and all "
                "searches; in the paper +2.0%, 16.67 against 16.65 (point estimates).",
            ),
            Trend(
                "the gate is not worse where a model is adapted to another domain",
                _not_worse(of_domains),
                "; ".join(map(percent, of_domains)) + ".",
            ),
        ],
        [_plot(curve, reports["learned"]["knn_perplexity"])],
    )


def _report(lab, source, target, kind):
    return read_json(lab.tuned_path(_name(source, target, kind)))["reported_on"]


def _change(report):
    return Interval(**report["gate_change_from_constant"])


def _not_worse(changes):
    if any(change.high is None for change in changes):
        return OPEN
    return HOLDS if all(change.high <= 0 for change in changes) else OPEN


def _gate_table(reports):
    rows = [
        [kind, PAPER[kind], f"{report['knn_perplexity']:.2f}", f"{report['gate_perplexity']:.2f}",
         percent(_change(report))]
        for kind, report in reports.items()
    ]  # fmt: skip
    head = ["gate", "paper, test", "constant lambda, test", "gate, test", "change"]
    return Table("Gates against a constant lambda", head, rows)


def _domain_table(adapted):
    rows = [
        [name, f"{report['base_perplexity']:.2f}", f"{report['knn_perplexity']:.2f}",
         f"{report['gate_perplexity']:.2f}", percent(_change(report))]
        for name, report in adapted.items()
    ]  # fmt: skip
    head = ["model and text", "model alone, test", "constant lambda", "learned gate", "change"]
    return Table("The learned gate in domain adaptation", head, rows)


def _skip_table(curve):
    points = {point["skip"]: point for point in curve}
    rows = [
        [f"{share:.0%}", PAPER_SKIPPED[share], f"{points[share]['skipped']:.0%}",
         f"{points[share]['perplexity']:.2f}"]
        for share in SHARES
    ]  # fmt: skip
    head = ["--knn-skip", "He et al., test", "skipped of test", "here, test"]
    return Table("Searches that are not made", head, rows)


def _plot(curve, constant):
    points = [(100 * point["skipped"], point["perplexity"]) for point in curve]
    panel = Panel(
        "What it costs not to search",
        "searches that are not made, %",
        "perplexity of test",
        {"learned gate": points},
        {"constant lambda, all searches": constant},
    )
    return Plot("skipping", "The learned gate, by the share of searches left out", [panel])
