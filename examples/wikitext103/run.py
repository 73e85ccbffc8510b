#!/usr/bin/env python3
"""WikiText-103 at the size of the paper: each command, printed and run in turn.

    python examples/wikitext103/run.py --dry-run                  # only print them
    python examples/wikitext103/run.py --work DIR                 # 8 GPUs, 230 GB of disk, days
    python examples/wikitext103/run.py --work DIR --checkpoint model.pt        # do not train
    python examples/wikitext103/run.py --work DIR --rehearsal TEXT             # a CPU, minutes

Memory and disk are estimated first, and nothing is begun that the disk cannot hold. Started again,
it goes on with the first step that has not finished; training and building go on within a step.
A rehearsal runs every step on the small files wiki.{train,valid,test}.tokens of the folder TEXT,
with a tiny model, without the checks of the corpus: it shows that the commands work, no more.

Training is the recipe of fairseq's examples/language_model/README.adaptive_inputs.md, which the
paper used (Khandelwal et al., 2020, section 3); the contexts of keys and evaluation are those of
github.com/urvashik/knnlm.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE.parent))  # no package: --user-dir would shadow fairseq's own examples
from pipeline import (  # noqa: E402
    ONE_PROCESS,
    PLUGIN,
    Pipeline,
    display,
    evaluated,
    in_lines,
    program,
    read_json,
)

SPLITS = ("train", "valid", "test")
# The batch of the recipe: 8 GPUs, 3 batches each.
BATCHES = 24
# Table 1 of the paper: valid, test.
PAPER = {"base": (17.96, 18.65), "paper": (16.06, 16.12), "tuned": (15.81, 15.79)}
# What training has in common at any size.
RECIPE = """
    --task language_modeling --criterion adaptive_loss --sample-break-mode none --seed 1
    --optimizer nag --lr 1.0 --min-lr 0.0001 --stop-min-lr 1e-09 --clip-norm 0.1
    --lr-scheduler cosine --t-mult 2 --lr-shrink 0.75 --warmup-init-lr 1e-07
    --skip-invalid-size-inputs-valid-test --ddp-backend legacy_ddp --no-epoch-checkpoints
"""


class Scale(NamedTuple):
    """What differs between the paper's size and a rehearsal.

    entries, dimension (int): of the datastore, for the estimate.
    tokens (int): of a block, left context included.
    key_context, context (int): tokens of left context, for the keys and for evaluation.
    model, schedule (str): flags of fairseq-train.
    device (str): flags of all commands that run the model.
    """

    entries: int
    dimension: int
    tokens: int
    key_context: int
    context: int
    model: str
    schedule: str
    device: str


FULL = Scale(
    entries=103_227_021,
    dimension=1024,
    tokens=3072,
    key_context=1536,
    context=2560,
    model="--arch transformer_lm_wiki103",
    schedule="--max-update 286000 --lr-period-updates 270000 --warmup-updates 16000",
    device="--fp16",
)
REHEARSAL = Scale(
    entries=20_000,
    dimension=32,
    tokens=96,
    key_context=48,
    context=80,
    model="--arch transformer_lm_wiki103 --decoder-layers 2 --decoder-embed-dim 32 "
    "--decoder-input-dim 32 --decoder-output-dim 32 --decoder-ffn-embed-dim 64 "
    "--decoder-attention-heads 2 --adaptive-input-cutoff 20,60 --adaptive-softmax-cutoff 20,60",
    schedule="--max-update 30 --lr-period-updates 26 --warmup-updates 4",
    device="--cpu --num-workers 0 --data-buffer-size 0",
)


class Step(NamedTuple):
    """A step that was asked for: see ``Pipeline.run``."""

    name: str
    what: str
    command: list


def listed(args):
    """The steps that *args* ask for; none is run."""
    steps = []

    def keep(name, what, command, inputs, outputs, **options):
        steps.append(Step(name, what, [display(argument) for argument in command]))

    Recipe(keep, args).steps()
    return steps


class Recipe:
    """The steps, in order, run by a ``Pipeline`` or listed.

    Args:
        run (callable): see ``Pipeline.run``.
        args: of the command line.
    """

    def __init__(self, run, args):
        self.run, self.args = run, args
        self.scale = REHEARSAL if args.rehearsal else FULL
        self.text = args.rehearsal or args.work / "text"
        self.data, self.datastore = args.work / "data", args.work / "datastore"
        self.checkpoint = args.checkpoint or args.work / "checkpoints" / "checkpoint_best.pt"
        self.texts = [self.text / f"wiki.{split}.tokens" for split in SPLITS]
        kinds = ("bin", "idx")
        self.binaries = [self.data / f"{split}.{kind}" for split in SPLITS for kind in kinds]
        self.tuned = args.work / "tune.json"

    def steps(self):
        """All of them; returns the logs of the evaluations, by name."""
        self.estimate()
        if not self.args.rehearsal:
            self.download()
        self.preprocess()
        if not self.args.rehearsal:
            self.check()
        if not self.args.checkpoint:
            self.train()
        logs = {f"base-{split}": self.evaluate("base", split) for split in ("valid", "test")}
        self.build()
        self.tune()
        paper = ("--knn-k", 1024, "--knn-lambda", 0.25, "--knn-temperature", 1)
        for split in ("valid", "test"):
            logs[f"paper-{split}"] = self.evaluate("paper", split, paper)
        logs["tuned-test"] = self.evaluate("tuned", "test", ("--knn-tuned",))
        return logs

    def estimate(self):
        scale = self.scale
        sizes = ("--entries", scale.entries, "--dimension", scale.dimension)
        self.run(
            "estimate",
            "disk and memory of the datastore, before anything is begun",
            [
                *(program("fairseq-knnlm-build"), self.data, "--knn-datastore", self.datastore),
                *("--estimate", *sizes, "--distributed-world-size", 1),
            ],
            inputs=[],
            outputs=[],
            show=r"^ |^disk|^memory|entries",
        )

    def download(self):
        archive = ("--archive", self.args.archive) if self.args.archive else ()
        self.run(
            "download",
            "the text, and whether it is what it should be (190 MB)",
            [Path(sys.executable), HERE / "corpus.py", "text", self.text, *archive],
            inputs=[],
            outputs=self.texts,
            show=".",
        )

    def preprocess(self):
        prefixes = zip((f"--{split}pref" for split in SPLITS), self.texts)
        known = ("--srcdict", self.args.dictionary) if self.args.dictionary else ()
        self.run(
            "preprocess",
            "words to numbers",
            [
                *(program("fairseq-preprocess"), "--only-source", "--destdir", self.data),
                *(word for prefix in prefixes for word in prefix),
                *("--workers", os.cpu_count(), *known),
            ],
            inputs=self.texts,
            outputs=[self.data / "dict.txt", *self.binaries],
            folder=self.data,
            show="fairseq_cli.preprocess.*sents",
        )

    def check(self):
        self.run(
            "check",
            "numbers of types, lines and tokens",
            [Path(sys.executable), HERE / "corpus.py", "data", self.data],
            inputs=[self.data / "dict.txt", *self.binaries],
            outputs=[],
            show=".",
        )

    def train(self):
        # no folder to be emptied: fairseq-train goes on from checkpoint_last.pt
        scale, gpus = self.scale, self.args.gpus
        self.run(
            "train",
            "the language model (days on 8 GPUs)",
            [
                *(program("fairseq-train"), self.data, "--save-dir", self.checkpoint.parent),
                *(*scale.model.split(), *scale.schedule.split(), *RECIPE.split()),
                *("--tokens-per-sample", scale.tokens, "--max-tokens", scale.tokens),
                *("--update-freq", BATCHES // gpus, "--distributed-world-size", gpus),
                *(*scale.device.split(), "--log-format", "simple", "--log-interval", 100),
            ],
            inputs=[self.data / "dict.txt", *self.binaries[:4]],
            outputs=[self.checkpoint],
        )

    def model_flags(self, split, context, break_mode, processes=1):
        """Flags of every command that runs the trained model over a split."""
        tokens = self.scale.tokens
        return [
            *("--path", self.checkpoint, "--gen-subset", split, "--sample-break-mode", break_mode),
            *("--tokens-per-sample", tokens, "--context-window", context, "--max-tokens", tokens),
            *(*self.scale.device.split(), "--distributed-world-size", processes),
            *("--log-format", "simple", "--log-interval", 100),
        ]

    def build(self):
        # no folder to be emptied: fairseq-knnlm-build goes on where it stopped
        scale = self.scale
        self.run(
            "build",
            "a key and a value for every token of train, and the index",
            [
                *(program("fairseq-knnlm-build"), self.data, "--knn-datastore", self.datastore),
                *self.model_flags("train", scale.key_context, "none", self.args.gpus),
            ],
            inputs=[self.data / "dict.txt", *self.binaries[:2], self.checkpoint],
            outputs=[self.datastore / "manifest.json"],
        )

    def tune(self):
        self.run(
            "tune",
            "neighbours and a continuous cache on valid",
            [
                *(program("fairseq-knnlm-tune"), self.data, "--knn-datastore", self.datastore),
                *self.model_flags("valid", self.scale.context, "complete"),
                *("--knn-cache-size", 4000, "--knn-output", self.tuned),
            ],
            inputs=[*self.binaries[2:4], self.checkpoint, self.datastore / "manifest.json"],
            outputs=[self.tuned, self.datastore / "tuned.json"],
        )

    def evaluate(self, name, split, settings=()):
        memory = ("--user-dir", PLUGIN, "--task", "knnlm_lm", "--knn-datastore", self.datastore)
        begin = SPLITS.index(split) * 2
        return self.run(
            f"{name}-{split}",
            f"perplexity on {split}, {'with neighbours' if settings else 'of the model alone'}",
            [
                *(program("fairseq-eval-lm"), self.data),
                *self.model_flags(split, self.scale.context, "complete"),
                *("--softmax-batch", 1024),
                *((*memory, *settings) if settings else ()),
            ],
            inputs=[
                *(*self.binaries[begin : begin + 2], self.checkpoint),
                *([self.datastore / "manifest.json"] if settings else []),
                *([self.tuned] if "--knn-tuned" in settings else []),
            ],
            outputs=[],
        )


def report(logs, tuned, paper):
    """What came out, beside the figures of *paper*."""
    print(f"\n{'perplexity':<12}{'split':<8}{'here':>8}{'paper':>8}{'tokens':>10}")
    for name, log in logs.items():
        kind, split = name.split("-")
        tokens, perplexity = evaluated(log)
        figure = paper[kind][split == "test"] if kind in paper else ""
        print(f"{kind:<12}{split:<8}{perplexity:>8.2f}{figure:>8}{tokens:>10,}")
    best = read_json(tuned)["best"]
    print(
        "base: the model alone; paper: k 1024, lambda 0.25, temperature 1; tuned: with a "
        f"continuous cache; without it k {best['k']}, temperature {best['temperature']:.3g}"
    )


def parse_args(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", help="folder for all results (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument("--archive", type=Path, help="wikitext-103-v1.zip, if it is here already")
    parser.add_argument("--checkpoint", type=Path, help="a trained model, in place of training")
    parser.add_argument("--dictionary", type=Path, help="its dict.txt, if it brought one")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of this machine (%(default)s)")
    parser.add_argument("--rehearsal", type=Path, metavar="TEXT", help="folder of small files")
    args = parser.parse_args(argv)
    if args.gpus < 1 or BATCHES % args.gpus:
        parser.error(f"--gpus must divide {BATCHES}, the batches of an update; got {args.gpus}")
    if args.rehearsal:
        args.gpus = 1
    return args


def main(argv=None):
    """Run the steps, or print them."""
    args = parse_args(argv)
    steps = listed(args)
    if args.dry_run:
        for number, step in enumerate(steps, 1):
            print(f"\n[{number}/{len(steps)}] {step.name}: {step.what}\n{in_lines(step.command)}")
        return
    environment = ONE_PROCESS if args.rehearsal else {}
    recipe = Recipe(Pipeline(args.work, len(steps), environment).run, args)
    try:
        logs = recipe.steps()
    except KeyboardInterrupt:
        sys.exit("\nrun.py: interrupted; start it again to go on")
    report(logs, recipe.tuned, {} if args.rehearsal else PAPER)


if __name__ == "__main__":
    main()
