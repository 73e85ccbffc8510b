#!/usr/bin/env python3
"""Log probabilities of every token of a split, as an .npz: what perplexities are compared from.

Takes the flags of fairseq-eval-lm; with --tuned, k, lambda, temperature and the settings of the
cache are what fairseq-knnlm-tune chose. The file has ``log_p`` (N, float32, natural log) and
``targets`` (N, token ids), in the order of the text.
"""

import json

import numpy as np
import torch

from fairseq_knnlm.cli.command_line import make_eval_parser, run_command, with_progress
from fairseq_knnlm.cli.loading import evaluation_samples, load_split, load_task_and_model
from fairseq_knnlm.encoding.samples import to_device
from fairseq_knnlm.files import refuse_unwritable

# What fairseq-knnlm-tune calls the settings of each method; the later ones hold.
METHODS = {"knn": ["best"], "cache": ["best_cache"], "knn-cache": ["best", "best_knn_cache"]}


def make_parser():
    parser = make_eval_parser(__doc__.split("\n", 1)[0], gen_subset="test")
    parser.add_argument("--tuned", metavar="FILE", help="--knn-output of fairseq-knnlm-tune")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="knn",
        help="which of the settings of --tuned (%(default)s)",
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="the .npz")
    return parser


def run(cfg, args):
    """Score the split and write the file."""
    refuse_unwritable("--output", args.output)
    if args.tuned:
        use_tuned(cfg.task, args.tuned, args.method)
    task, model, _ = load_task_and_model(cfg)
    dataset = load_split(task, cfg.dataset.gen_subset)
    samples = evaluation_samples(cfg, task, model, dataset)
    scorer = task.make_scorer(cfg.eval_lm.softmax_batch)
    device = next(model.parameters()).device
    log_p, targets = [], []
    for sample in with_progress(cfg, samples, prefix="score"):
        sample = to_device(sample, device)
        targets.append(sample["target"].cpu())
        for (hypothesis,) in scorer.generate([model], sample):
            log_p.append(hypothesis["positional_scores"].float().cpu())
    log_p, targets = torch.cat(log_p), torch.cat(targets)
    np.savez(args.output, log_p=log_p.numpy(), targets=targets.numpy())
    print(f"Perplexity: {(-log_p.double().mean()).exp():.2f} over {len(log_p):,} tokens")


def use_tuned(task_cfg, path, method):
    """Put what fairseq-knnlm-tune chose for a method in place of the flags."""
    with open(path, encoding="utf-8") as file:
        tuned = json.load(file)
    setting = {name: value for part in METHODS[method] for name, value in tuned[part].items()}
    del setting["perplexity"]
    if method == "cache":
        del setting["knn_lambda"]
    for name, value in setting.items():
        field = name if name.startswith("knn_") else f"knn_{name}"
        setattr(task_cfg, field, str(value) if name == "temperature" else value)


if __name__ == "__main__":
    run_command(make_parser(), run)
