"""The recipes of examples/paper: their commands, and what they compute themselves."""

import itertools
import json
import math
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import commands

EXAMPLES = commands.REPOSITORY / "examples"


@pytest.fixture(scope="module")
def paper():
    """The modules of the recipes, which are no package."""
    folders = [str(EXAMPLES / "paper"), str(EXAMPLES)]
    sys.path[:0] = folders
    import log_probs
    import ngram
    import report
    import run
    import texts

    yield SimpleNamespace(log_probs=log_probs, ngram=ngram, report=report, run=run, texts=texts)
    for folder in folders:
        sys.path.remove(folder)


# -- commands --------------------------------------------------------------------------------------


def parsers(paper):
    """Who reads the arguments of each program."""
    from fairseq import options

    from fairseq_knnlm.cli import build, inspect, tune

    def fairseq(make):
        return lambda words: options.parse_args_and_arch(make(), input_args=words)

    return {
        "fairseq-preprocess": options.get_preprocessing_parser().parse_args,
        "fairseq-train": fairseq(options.get_training_parser),
        "fairseq-eval-lm": fairseq(options.get_eval_lm_parser),
        "fairseq-knnlm-build": fairseq(build.make_parser),
        "fairseq-knnlm-tune": fairseq(tune.make_parser),
        "fairseq-knnlm-inspect": fairseq(inspect.make_parser),
        "log_probs.py": fairseq(paper.log_probs.make_parser),
        "ngram.py": lambda words: paper.ngram.make_parser().parse_args(words),
        "texts.py": lambda words: paper.texts.make_parser().parse_args(words),
        "prepare.py": lambda words: None,
    }


@pytest.fixture(scope="module")
def all_steps(paper):
    """Every step of all sections, by scale."""
    sections = list(paper.run.SECTIONS.values())
    return {
        name: paper.run.listed(Path("work"), scale, sections)
        for name, scale in paper.run.SCALES.items()
    }


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_command_is_one_that_its_program_takes(paper, all_steps, scale):
    take = parsers(paper)
    for step in all_steps[scale]:
        words = step.command
        if Path(words[0]).name.startswith("python"):
            words = words[1:]
        take[Path(words[0]).name](words[1:])


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_step_reads_what_is_there_by_then(all_steps, scale):
    made, names = set(), set()
    for step in all_steps[scale]:
        given = {path for path in map(Path, step.inputs) if path.parts[0] == "work"}
        missing = {path for path in given - made if path.suffix != ".txt" or scale == "small"}
        assert not missing, step.name
        assert step.name not in names
        names.add(step.name)
        made |= set(map(Path, step.outputs))


@pytest.mark.parametrize("name", ["4.1", "4.2", "4.3", "5", "6", "later"])
def test_each_section_alone_has_all_it_reads(paper, name):
    made = set()
    for step in paper.run.listed(Path("work"), paper.run.SCALES["small"], [
        paper.run.SECTIONS[name]
    ]):  # fmt: skip
        given = {path for path in map(Path, step.inputs) if path.parts[0] == "work"}
        assert given <= made, step.name
        made |= set(map(Path, step.outputs))


def test_the_dry_run_shows_every_command_and_runs_none(all_steps, tmp_path):
    done = commands.run(
        sys.executable, EXAMPLES / "paper" / "run.py", "--dry-run", "--work", tmp_path / "work"
    )
    assert done.stdout.count("\n$ ") == len(all_steps["small"])
    assert not (tmp_path / "work").exists()


# -- what is compared ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(data, checkpoints, datastores, tmp_path_factory):
    """What is chosen for neighbours, a cache and both on valid, and what that gives on test."""
    from fairseq_knnlm.cli.tune import main

    path = tmp_path_factory.mktemp("tuned") / "tuned.json"
    main([
        *reading(data, checkpoints), "--gen-subset", "valid", "--report-subset", "test",
        "--knn-datastore", str(datastores["adaptive"]), "--knn-k", "16",
        "--knn-cache-size", "64", "--knn-output", str(path),
    ])  # fmt: skip
    return path


def reading(data, checkpoints):
    return [
        str(data), "--path", str(checkpoints["adaptive"]), "--cpu", "--log-format", "none",
        "--tokens-per-sample", "32", "--num-workers", "0",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["base", "knn", "cache", "knn-cache"])
def test_scores_are_those_that_tuning_reports(
    paper, data, checkpoints, datastores, tuned, method, tmp_path
):
    flags = ["--output", str(tmp_path / "scores.npz")]
    if method != "base":
        flags += ["--tuned", str(tuned), "--method", method]
    if "knn" in method:
        flags += ["--knn-datastore", str(datastores["adaptive"])]
    paper.log_probs.run_command(
        paper.log_probs.make_parser(), paper.log_probs.run, [*reading(data, checkpoints), *flags]
    )
    log_p = np.load(tmp_path / "scores.npz")["log_p"]
    reported = json.loads(tuned.read_text())["reported_on"]
    expected = reported[f"{method.replace('-', '_')}_perplexity"]
    assert math.exp(-log_p.mean(dtype=np.float64)) == pytest.approx(expected, rel=1e-4)


def test_a_trend_holds_only_where_all_of_its_interval_does(paper):
    from fairseq_knnlm.probability.bootstrap import Interval

    report = paper.report
    below, above, across = (
        Interval(0.0, low, high, 20, "documents")
        for low, high in ((-0.2, -0.1), (0.1, 0.2), (-0.1, 0.1))
    )
    verdicts = [report.lowers(each) for each in (below, above, across)]
    assert verdicts == [report.HOLDS, report.FAILS, report.OPEN]
    assert report.all_of(verdicts) == report.FAILS
    assert report.all_of(verdicts[::2]) == report.OPEN
    assert report.all_of(verdicts[:1]) == report.HOLDS


# -- text ------------------------------------------------------------------------------------------


def test_pieces_are_whole_documents_of_all_of_the_text(paper, tmp_path):
    chance = random.Random(3)
    documents = [
        "".join([f"= title {i} =\n\n", "= = section = =\n"]
                + [f"line {i}.{j}\n" for j in range(chance.randint(1, 9))])
        for i in range(400)
    ]  # fmt: skip
    text = tmp_path / "train.txt"
    text.write_text("".join(documents))
    shares = [0.125, 0.125, 0.25, 0.5]
    paper.texts.write_pieces(text, tmp_path / "pieces", shares)
    left = list(documents)
    for number, share in enumerate(shares, start=1):
        piece = (tmp_path / "pieces" / f"{number}.txt").read_text()
        mine = [document for document in left if document in piece]
        assert piece == "".join(mine)
        assert len(mine) / len(documents) == pytest.approx(share, abs=0.01)
        # from all of the text: no piece leaves a tenth of it out
        places = [documents.index(document) * 10 // len(documents) for document in mine]
        assert set(places) == set(range(10))
        left = [document for document in left if document not in mine]
    assert not left


def test_shares_that_are_not_all_of_the_text_are_refused(paper, tmp_path):
    with pytest.raises(ValueError, match="sum to 1, got 0.75"):
        paper.texts.write_pieces(tmp_path / "train.txt", tmp_path / "pieces", [0.25, 0.5])


# -- n-grams ---------------------------------------------------------------------------------------


TYPES, ORDER = 60, 3


def make_stream(count=1500):
    """A stream whose words depend on the two before, of many rare words and few frequent ones."""
    chance = random.Random(5)
    words = list(range(TYPES))
    while len(words) < count:
        likely = (words[-1] * 5 + words[-2]) % 7
        words.append(likely if chance.random() < 0.5 else int(chance.paretovariate(0.7)) % TYPES)
    return np.array(words)


class KneserNey:
    """The textbook's recursion over dictionaries: Chen and Goodman (1999), section 5."""

    def __init__(self, words, types, order):
        self.types, self.order = types, order
        around = [*words[len(words) - order + 1 :], *words]
        everything = [tuple(around[i : i + order]) for i in range(len(words))]
        self.counts = {order: Counter(everything)}
        for n in range(order - 1, 0, -1):
            before = defaultdict(set)
            for gram in {gram[-n - 1 :] for gram in everything}:
                before[gram[1:]].add(gram[0])
            self.counts[n] = {gram: len(different) for gram, different in before.items()}
        self.seen = {n: Counter(counts.values()) for n, counts in self.counts.items()}

    def discount(self, n, count):
        if count == 0:
            return 0.0
        seen = self.seen[n]
        y = seen[1] / (seen[1] + 2 * seen[2])
        i = min(count, 3)
        return i - (i + 1) * y * seen[i + 1] / seen[i]

    def probability(self, context, word):
        n = len(context) + 1
        followers = {w: self.counts[n].get((*context, w), 0) for w in range(self.types)}
        total = sum(followers.values())
        lower = self.probability(context[1:], word) if context else 1 / self.types
        if not total:
            return lower
        freed = sum(self.discount(n, count) for count in followers.values())
        count = followers[word]
        return (count - self.discount(n, count) + freed * lower) / total


def read_arpa(path):
    """log10 probability and back-off weight of every n-gram of an ARPA file."""
    entries = {}
    for line in path.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) > 1:
            backoff = float(fields[2]) if len(fields) > 2 else 0.0
            entries[tuple(fields[1].split())] = float(fields[0]), backoff
    return entries


def arpa_log10_p(entries, context, word):
    """What the format says: the longest n-gram there is, less the weights of what is not."""
    if (*context, word) in entries:
        return entries[(*context, word)][0]
    return entries.get(context, (0, 0.0))[1] + arpa_log10_p(entries, context[1:], word)


@pytest.fixture(scope="module")
def arpa(paper, tmp_path_factory):
    """A model of a stream, as a file."""
    path = tmp_path_factory.mktemp("ngrams") / "model.arpa"
    orders = paper.ngram.estimate(make_stream(), TYPES, ORDER)
    paper.ngram.write_arpa(path, orders, [f"w{i}" for i in range(TYPES)])
    return path


def test_ngram_probabilities_are_the_textbooks(arpa):
    entries, oracle = read_arpa(arpa), KneserNey(make_stream().tolist(), TYPES, ORDER)
    for length in range(ORDER):
        contexts = list(itertools.product(range(TYPES), repeat=length))
        for context in random.Random(0).sample(contexts, min(20, len(contexts))):
            names = tuple(f"w{i}" for i in context)
            found = [10 ** arpa_log10_p(entries, names, f"w{i}") for i in range(TYPES)]
            expected = [oracle.probability(context, word) for word in range(TYPES)]
            assert found == pytest.approx(expected, rel=1e-4)
            assert sum(found) == pytest.approx(1, abs=1e-5)


def test_kenlm_reads_what_was_estimated(paper, arpa):
    kenlm = pytest.importorskip("kenlm")
    entries = read_arpa(arpa)
    words = [f"w{i}" for i in make_stream(300)]
    expected = [
        arpa_log10_p(entries, tuple(words[max(0, i + 1 - ORDER) : i]), word)
        for i, word in enumerate(words)
    ]
    found = paper.ngram.score(words, kenlm.Model(str(arpa))) / math.log(10)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_text_too_small_for_discounts_is_refused(paper):
    with pytest.raises(ValueError, match="too small for modified Kneser-Ney: of the 1-grams"):
        paper.ngram.estimate(np.array([0, 1, 2, 0, 1, 2]), 3, 2)


def test_ends_of_lines_are_words_of_the_stream(paper, tmp_path):
    (tmp_path / "text").write_text("a <unk> b\n\nc\n")
    assert paper.ngram.read_stream(tmp_path / "text") == [
        "a", "<rare>", "b", "<eol>", "<eol>", "c", "<eol>"
    ]  # fmt: skip
