#!/usr/bin/env python3
"""From Python, without a command: dump, build, search, mix and tune.

    python examples/python_api.py DATA CHECKPOINT DATASTORE [--tokens-per-sample 256] [--k 64]

DATA is made by fairseq-preprocess and has the splits train, valid and test. CHECKPOINT is a model
of any transformer_lm. DATASTORE is a directory that is written: the same as fairseq-knnlm-build
writes. The settings are tuned on valid and reported on test.
"""

import argparse
import os

import fairseq
import torch

from fairseq_knnlm.building import build_datastore, key_of, manifest_settings
from fairseq_knnlm.datastore import Datastore, file_fingerprint
from fairseq_knnlm.encoding import encode, extractor_of, make_samples, plan_chunks
from fairseq_knnlm.hub import from_pretrained
from fairseq_knnlm.probability import knn_log_probs, mix, perplexity
from fairseq_knnlm.search import Retriever
from fairseq_knnlm.tuning import best, collect, sweep

MAX_TOKENS = 2048  # of a batch of the model
SEARCHED_TOKENS = 1 << 14  # of a search


def load_blocks(task, split):
    """The blocks of a split, in the order of its text."""
    task.load_dataset(split)
    return task.blocks(task.dataset(split), context_window=0)


def samples_of(blocks):
    """The samples of a whole split."""
    return make_samples(blocks, plan_chunks(blocks.sizes, SEARCHED_TOKENS), MAX_TOKENS)


def build(task, model, data, path, tokens_per_sample):
    """Dump a key and a value for every token of train, and build the index over them."""
    blocks = load_blocks(task, "train")
    files = [os.path.join(data, f"train.{kind}") for kind in ("idx", "bin")]
    settings = manifest_settings(
        model,
        task.target_dictionary,
        key=key_of(model, "ffn-input"),
        metric="l2",
        data={"split": "train", "sha256": file_fingerprint(*files)},
        context={
            "tokens_per_sample": tokens_per_sample,
            "context_window": 0,
            "sample_break_mode": "none",
        },
        versions={"fairseq": fairseq.__version__},
    )

    def make(chunks):
        return make_samples(blocks, chunks.values(), MAX_TOKENS)

    build_datastore(path, model, blocks, make, settings)


def tune(task, model, retriever):
    """k, temperature and lambda with the lowest perplexity of valid, from one pass over it."""
    blocks = load_blocks(task, "valid")
    count, eos = int(blocks.sizes.sum()), task.target_dictionary.eos()
    data = collect(model, samples_of(blocks), count, eos, retriever)
    ks = [k for k in (1, 8, 64, 1024) if k < retriever.k] + [retriever.k]
    return best(sweep(data, ks))


def evaluate(task, model, retriever, k, temperature, knn_lambda):
    """log p of every token of test, by the model alone and by the mixture."""
    alone, mixed = [], []
    with extractor_of(model, retriever.key) as extractor:
        for sample in samples_of(load_blocks(task, "test")):
            encoded = encode(model, sample, extractor)
            for rows, neighbors in retriever.batches(encoded.keys, k):
                log_p_knn = knn_log_probs(
                    neighbors.distances, neighbors.values, sample["target"][rows], temperature
                )
                mixed.append(mix(encoded.log_p_lm[rows], log_p_knn, knn_lambda=knn_lambda))
            alone.append(encoded.log_p_lm)
    return torch.cat(alone), torch.cat(mixed)


def main(argv=None):
    """Build, tune on valid, report on test."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("data", "checkpoint", "datastore"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("--tokens-per-sample", type=int, default=256)
    parser.add_argument("--k", type=int, default=64, help="neighbours per query, at most (64)")
    args = parser.parse_args(argv)

    folder, name = os.path.split(args.checkpoint)
    lm = from_pretrained(folder, name, args.data, tokens_per_sample=args.tokens_per_sample).eval()
    task, model = lm.task, lm.models[0]
    build(task, model, args.data, args.datastore, args.tokens_per_sample)

    retriever = Retriever([Datastore.open(args.datastore)], k=args.k)
    chosen = tune(task, model, retriever)
    print(
        f"valid: k {chosen.k}, temperature {chosen.temperature:g}, lambda {chosen.knn_lambda:g}: "
        f"perplexity {chosen.perplexity:.2f}"
    )
    alone, mixed = evaluate(task, model, retriever, chosen.k, chosen.temperature, chosen.knn_lambda)
    print(f"test: perplexity {perplexity(alone):.2f}, with neighbours {perplexity(mixed):.2f}")


if __name__ == "__main__":
    main()
