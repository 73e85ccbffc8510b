#!/usr/bin/env python3
"""Training with memory: one model trained with cross-entropy and with each memory of TRIME.

    python examples/trime/run.py                              # the text of the demonstration
    python examples/trime/run.py --memories local long        # without the others
    python examples/trime/run.py --dry-run --size 7M          # commands of the paper itself

The corpus, the model and the number of updates are those of examples/sotu/demo.py; all trainings
differ in the criterion and the order of the batches alone. At the end stands a table beside the
paper's figures of its model of 7M parameters (Zhong, Lei and Chen, EMNLP 2022).
What has finished is not done again.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent

sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "sotu")]  # no packages: see sotu/demo.py
from demo import make_model, split_files  # noqa: E402
from pipeline import (  # noqa: E402
    PLUGIN,
    TOKENS_PER_SAMPLE,
    Pipeline,
    adaptive_cutoffs,
    evaluated,
    evaluation_flags,
    in_lines,
    program,
    read_json,
    training_flags,
)

MEMORIES = ("local", "long", "external")
# Segments of a batch of the demonstration, which ``long`` looks back on.
SEGMENTS = 4
# What the products are divided by at evaluation, in the paper.
TEMPERATURES = {"local": 1.17, "long": 1.22, "external": 1.25}
# Valid and test perplexity of the paper's model of 7M parameters on WikiText-103.
PAPER = {
    "cross-entropy": (82.68, 83.66), "with a tuned cache": (67.45, 68.08),
    "local": (54.78, 54.69), "long": (60.71, 60.10), "external": (41.50, 42.36),
}  # fmt: skip


class Size(NamedTuple):
    """A model of the paper and how it is trained; what the paper does not say is assumed.

    model, training (str): flags of fairseq-train.
    tokens (int): of a segment.
    segments (int): of a batch with ``long`` and ``external``.
    batches (int): of an update with ``long`` and ``external``.
    """

    model: str
    training: str
    tokens: int
    segments: int
    batches: int


_WIKI103 = (
    "--arch transformer_lm_wiki103 --optimizer nag --lr 1.0 --min-lr 0.0001 --stop-min-lr 1e-09 "
    "--clip-norm 0.1 --lr-scheduler cosine --t-mult 2 --lr-shrink 0.75 --warmup-init-lr 1e-07 "
    "--warmup-updates 16000 --lr-period-updates 270000 --max-update 286000"
)
_ADAM = "--optimizer adam --lr-scheduler inverse_sqrt --warmup-updates 4000 --max-update 200000"
SIZES = {
    "7M": Size(
        "--arch transformer_lm --decoder-layers 8 --decoder-attention-heads 4 "
        "--decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128 "
        "--decoder-ffn-embed-dim 512 --decoder-normalize-before --adaptive-input "
        "--adaptive-input-cutoff 20000,60000 --adaptive-softmax-cutoff 20000,60000 "
        "--tie-adaptive-weights --tie-adaptive-proj",
        f"{_ADAM} --lr 0.0005",
        tokens=3072, segments=8, batches=1,
    ),
    "150M": Size(
        "--arch transformer_lm --decoder-layers 16 --decoder-attention-heads 10 "
        "--decoder-embed-dim 410 --decoder-input-dim 410 --decoder-output-dim 410 "
        "--decoder-ffn-embed-dim 2100 --decoder-normalize-before --adaptive-input "
        "--adaptive-input-cutoff 20000,60000 --adaptive-softmax-cutoff 20000,60000 "
        "--tie-adaptive-weights --tie-adaptive-proj",
        f"{_ADAM} --lr 0.00025",
        tokens=150, segments=60, batches=1,
    ),
    "247M": Size(_WIKI103, "", tokens=3072, segments=4, batches=6),
}  # fmt: skip


def paper_command(name, memory):
    """The training of a model of the paper, as a command.

    Args:
        name (str): of ``SIZES``.
        memory (str): of ``MEMORIES``.
    """
    size = SIZES[name]
    return [
        *("fairseq-train", "DATA", "--user-dir", PLUGIN, "--task", "knnlm_lm"),
        *("--criterion", "trime_loss", "--trime-memory", memory, "--ddp-backend", "legacy_ddp"),
        *f"{size.model} {size.training} --fp16 --seed 1 --no-epoch-checkpoints".split(),
        *("--tokens-per-sample", size.tokens, "--max-tokens", size.tokens * size.segments),
        *("--update-freq", size.batches, "--save-dir", f"CHECKPOINTS-{name}-{memory}"),
    ]


class Recipe:
    """The steps of the demonstration, in order.

    Args:
        pipeline (Pipeline): runs them.
        args: of the command line.
    """

    def __init__(self, pipeline, args):
        self.pipeline, self.args = pipeline, args
        self.data = self.checkpoint = None

    def run(self):
        """All steps; returns valid and test perplexity of each row of the table."""
        self.data, self.checkpoint = make_model(
            self.pipeline, self.args.prepare, self.args.max_update, bpe=None
        )
        found = {
            "cross-entropy": self.perplexities("cross-entropy", self.checkpoint),
            "with a tuned cache": self.tuned_cache(),
        }
        for memory in self.args.memories:
            checkpoint = self.train(memory)
            found[f"{memory}, without memory"] = self.perplexities(f"{memory}-alone", checkpoint)
            found[memory] = self.perplexities(memory, checkpoint, self.memory_flags(memory))
        return found

    def inputs(self, split, *others):
        """Files that an evaluation reads."""
        return [self.data / "dict.txt", *split_files(self.data)[split], *others]

    def train(self, memory):
        """A model trained with a memory; gives the path of its checkpoint."""
        folder = self.pipeline.work / f"checkpoints-{memory}"
        dictionary = self.data / "dict.txt"
        flags = training_flags(adaptive_cutoffs(dictionary), self.args.max_update)
        flags = ["trime_loss" if flag == "adaptive_loss" else flag for flag in flags]
        self.pipeline.run(
            f"train-{memory}",
            f"the same model with the memory {memory} (5 minutes on 2 cores)",
            [
                *(program("fairseq-train"), self.data, "--user-dir", PLUGIN, "--cpu"),
                *("--task", "knnlm_lm", *flags, "--trime-memory", memory, "--save-dir", folder),
            ],
            inputs=[*self.inputs("train"), *split_files(self.data)["valid"]],
            outputs=[folder / "checkpoint_best.pt"],
            folder=folder,
        )
        return folder / "checkpoint_best.pt"

    def memory_flags(self, memory):
        """Flags that evaluate a model with its memory."""
        local = ("--knn-cache-size", TOKENS_PER_SAMPLE, "--knn-cache-reset", "block")
        longer = ("--knn-cache-size", SEGMENTS * TOKENS_PER_SAMPLE)
        flags = local if memory == "local" else longer
        return [*flags, "--trime-temperature", TEMPERATURES[memory], *self.datastore(memory)]

    def datastore(self, memory):
        """Flags of the datastore of a model with external memory, tuned on valid; else none."""
        if memory != "external":
            return []
        checkpoint = self.pipeline.work / "checkpoints-external" / "checkpoint_best.pt"
        datastore, tuned = (self.pipeline.work / name for name in ("datastore", "external.json"))
        self.pipeline.run(
            "build",
            "the datastore of the model trained with external memory (3 minutes)",
            [
                *(program("fairseq-knnlm-build"), self.data, "--knn-datastore", datastore),
                *("--knn-metric", "ip", *evaluation_flags("train", checkpoint)),
            ],
            inputs=self.inputs("train", checkpoint),
            outputs=[datastore / "manifest.json"],
            folder=datastore,
        )
        self.pipeline.run(
            "tune",
            "its neighbours on valid (2 minutes)",
            [
                *(program("fairseq-knnlm-tune"), self.data, "--knn-datastore", datastore),
                *(*evaluation_flags("valid", checkpoint), "--knn-output", tuned),
            ],
            inputs=self.inputs("valid", checkpoint, datastore / "manifest.json"),
            outputs=[tuned],
        )
        best = read_json(tuned)["best"]
        return [
            *("--knn-datastore", datastore, "--knn-k", best["k"]),
            *("--knn-lambda", f"{best['knn_lambda']:.4f}"),
            *("--knn-temperature", f"{best['temperature']:.6g}"),
        ]

    def tuned_cache(self):
        """Perplexities of the model of cross-entropy with a continuous cache, tuned on valid."""
        tuned = self.pipeline.work / "cache.json"
        self.pipeline.run(
            "cache",
            "a continuous cache for the model of cross-entropy, tuned on valid",
            [
                *(program("fairseq-knnlm-tune"), self.data, "--knn-cache-size", 4000),
                *(*evaluation_flags("valid", self.checkpoint), "--report-subset", "test"),
                *("--knn-output", tuned),
            ],
            inputs=[*self.inputs("valid", self.checkpoint), *split_files(self.data)["test"]],
            outputs=[tuned],
        )
        result = read_json(tuned)
        return [result[key]["cache_perplexity"] for key in ("tuned_on", "reported_on")]

    def perplexities(self, name, checkpoint, flags=()):
        """Of valid and of test."""
        plugin = ("--user-dir", PLUGIN, "--task", "knnlm_lm") if flags else ()
        logs = [
            self.pipeline.run(
                f"{name}-{split}",
                f"perplexity on {split}: {name}",
                [
                    *(program("fairseq-eval-lm"), self.data),
                    *(*evaluation_flags(split, checkpoint), *plugin, *flags),
                ],
                inputs=self.inputs(split, checkpoint),
                outputs=[],
            )
            for split in ("valid", "test")
        ]
        return [evaluated(log)[1] for log in logs]


def count_steps(memories):
    """Of a recipe with some memories: the model, its cache, and of each memory five, or seven."""
    return 3 + 3 + sum(7 if memory == "external" else 5 for memory in memories)


def table(found):
    """The lines of the table at the end.

    Args:
        found (dict): valid and test perplexity by row.
    """
    yield f"{'perplexity':<26}{'valid':>9}{'test':>9}{'paper, 7M: valid':>19}{'test':>9}"
    for name, figures in found.items():
        paper = [f"{figure:.2f}" for figure in PAPER.get(name, ())] or ["", ""]
        yield f"{name:<26}{figures[0]:>9.2f}{figures[1]:>9.2f}{paper[0]:>19}{paper[1]:>9}".rstrip()


def parse_args(argv):
    """The command line; what is not ours is prepare.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other flags (--input, --valid, --test, --min-count, --lang) are handed to "
        "sotu/prepare.py.",
    )
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", help="folder for all results (%(default)s)"
    )
    parser.add_argument("--max-update", type=int, default=2600, help="updates (%(default)s)")
    parser.add_argument(
        "--memories", nargs="+", choices=MEMORIES, default=MEMORIES, help="which (all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the paper's commands")
    parser.add_argument("--size", choices=SIZES, default="7M", help="of the paper (%(default)s)")
    args, args.prepare = parser.parse_known_args(argv)
    if args.max_update < 1:
        parser.error(f"--max-update must be at least 1, got {args.max_update}")
    return args


def main(argv=None):
    """Run the steps, or print the commands of the paper's size."""
    args = parse_args(argv)
    if args.dry_run:
        for memory in args.memories:
            words = [str(word) for word in paper_command(args.size, memory)]
            print(f"\n{args.size}, {memory}:\n{in_lines(words)}")
        return
    try:
        found = Recipe(Pipeline(args.work, count_steps(args.memories)), args).run()
    except KeyboardInterrupt:
        sys.exit("\nrun.py: interrupted; start it again to go on")
    print("", *table(found), sep="\n")


if __name__ == "__main__":
    main()
