"""What a kNN language model is measured against: the model alone.

Stock ``fairseq-eval-lm``, the forward pass of the model, and the dump of keys and values, of the
same text; and whole commands, as users start them.
"""

import functools
import shutil

import torch
from evaluation import Evaluation
from processes import QUIET, eval_lm, timed_build
from timing import Stopwatch, interleaved, median, was_held_up

from fairseq_knnlm.cli.command_line import make_eval_parser


def measure_floor(data, split, flags, work, repeats):
    """Stock ``fairseq-eval-lm``, the bare forward pass and the dump, of one split.

    Returns:
        list of dict: a row for each.
    """
    evaluation = Evaluation(data, split, flags)
    samples = evaluation.samples()
    tokens = sum(sample["ntokens"] for sample in samples)
    _forward(evaluation, evaluation.batches(1))

    def stock():
        printed = eval_lm(data, [*flags, "--gen-subset", split])
        return {"seconds": printed["tokens"] / printed["tokens_per_s"], **printed}

    def bare():
        return _forward(evaluation, samples)

    def dump():
        folder = work / "dumped"
        words = [data, *flags, "--gen-subset", split, "--knn-index", "Flat", *QUIET]
        times = timed_build([*words, "--knn-datastore", folder, "--overwrite"])
        shutil.rmtree(folder)
        return {"seconds": times["dump_s"]}

    runs = interleaved({"stock": stock, "bare forward": bare, "dump": dump}, repeats)
    rows = {
        name: {
            "name": name,
            "tokens": tokens,
            "tokens_per_s": tokens / median(of_name, "seconds"),
            "runs_s": [run["seconds"] for run in of_name],
        }
        for name, of_name in runs.items()
    }
    rows["bare forward"]["held_up"] = was_held_up(runs["bare forward"])
    rows["stock"]["perplexity"] = runs["stock"][0]["perplexity"]
    assert all(run["tokens"] == tokens for run in runs["stock"])
    for row in rows.values():
        row["of_stock"] = row["tokens_per_s"] / rows["stock"]["tokens_per_s"]
        row["of_bare_forward"] = row["tokens_per_s"] / rows["bare forward"]["tokens_per_s"]
    return list(rows.values())


@torch.no_grad()
def _forward(evaluation, samples):
    """Times of the forward pass without the softmax."""
    stopwatch = Stopwatch(evaluation.clock)
    for sample in samples:
        for batch in sample["batches"]:
            evaluation.model(
                batch["src_tokens"], src_lengths=batch["src_lengths"], features_only=True
            )
    return stopwatch.read()


def measure_commands(data, split, flags, knn_flags, datastore, ks, repeats):
    """Run ``fairseq-eval-lm`` as a user does: a fresh process each time, its loading included.

    Args:
        ks (list of int): numbers of neighbours, ascending; distances of the index are measured for
            the last.
        repeats (int): commands of each kind, in turns, of which the medians count.

    Returns:
        list of dict: a row for stock and for every number of neighbours and kind of distances.
    """
    flags = [*flags, "--gen-subset", split]
    ours = make_eval_parser("", gen_subset=split).get_default("user_dir")
    words = ["--user-dir", ours, "--task", "knnlm_lm", "--knn-datastore", datastore, *knn_flags]
    measurements = {"stock": functools.partial(_command, data, flags)}
    for k, distances in [*((k, "exact") for k in ks), (ks[-1], "index")]:
        of_search = [*flags, *words, "--knn-k", k, "--knn-distances", distances]
        measurements[f"k={k}, {distances}"] = functools.partial(_command, data, of_search)
    rows = []
    for name, runs in interleaved(measurements, repeats).items():
        medians = {each: median(runs, each) for each in ("tokens_per_s", "seconds", "peak_bytes")}
        rows.append({**runs[0], "name": name, **medians})
        rows[-1]["of_stock"] = rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"]
        rows[-1]["runs_tokens_per_s"] = [run["tokens_per_s"] for run in runs]
    return rows


def _command(data, flags):
    printed = eval_lm(data, flags)
    return {**printed, "seconds": printed["whole_s"]}
