"""What a kNN language model is measured against: the model alone.

Stock ``fairseq-eval-lm``, the forward pass of the model, and the dump of keys and values, of the
same text; and whole commands, for the memory that they take.
"""

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


def measure_commands(data, split, flags, knn_flags, datastore, k):
    """Run ``fairseq-eval-lm`` as a user does, for its peak memory.

    Returns:
        list of dict: a row for stock and for both kinds of distances.
    """
    flags = [*flags, "--gen-subset", split]
    rows = [{"name": "stock", **eval_lm(data, flags)}]
    ours = make_eval_parser("", gen_subset=split).get_default("user_dir")
    for distances in ("index", "exact"):
        words = ["--user-dir", ours, "--task", "knnlm_lm", "--knn-datastore", datastore]
        words += ["--knn-k", k, "--knn-distances", distances, *knn_flags]
        rows.append({"name": f"k={k}, {distances}", **eval_lm(data, [*flags, *words])})
    return rows
