#!/usr/bin/env python3
"""From raw text to a kNN language model: each command of the pipeline, printed and run in turn.

    python examples/sotu/demo.py                                        # 249 presidential messages
    python examples/sotu/demo.py --work DIR --input my-texts/           # your own text
    python examples/sotu/demo.py --work DIR --bpe 8000                  # words cut into pieces

Everything is written to the folder --work: text, data, checkpoint, datastore, the full output of
every command (logs/), two pages to open in a browser, and at the end results.json and
perplexity.png. Started again, it goes on with the first step that has not finished, or whose
command, inputs or outputs have changed since.

The sizes are those of a demonstration: two CPU cores, 13 minutes.
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORES = os.cpu_count()
# Positions that the largest of the continuous caches looks back on.
CACHE_SIZE = 4000
# Of the passage whose memories are shown.
PASSAGE_TOKENS = 400

sys.path.insert(0, str(HERE.parent))  # no package: --user-dir would shadow fairseq's own examples
from pipeline import (  # noqa: E402
    PLUGIN,
    Pipeline,
    adaptive_cutoffs,
    evaluated,
    evaluation_flags,
    program,
    read_json,
    training_flags,
)
from report import write_report  # noqa: E402


def text_files(arguments):
    """The files among the arguments of prepare.py, folders opened."""
    for path in map(Path, arguments):
        if path.is_dir():
            yield from filter(Path.is_file, path.iterdir())
        elif path.is_file():
            yield path


def run_pipeline(work, prepare_arguments, max_update, bpe=None):
    """All steps, from text to the perplexities of the test split.

    Args:
        work (Path): folder of all results.
        prepare_arguments (list of str): for prepare.py.
        max_update (int): training steps.
        bpe (int): about so many pieces that words are cut into; None: words stay whole.

    Returns:
        tuple: what ``fairseq-knnlm-tune`` wrote; tokens and perplexity of each evaluation; seconds
        of each step; pages to look at.
    """
    pipeline = Pipeline(work, steps=9)
    model = make_model(pipeline, prepare_arguments, max_update, bpe)
    # Perplexity is of words then, as without pieces; the stock command knows none of sentencepiece.
    words = ["--remove-bpe", "sentencepiece"] if bpe else []
    datastore = build_datastore(pipeline, *model)
    tuned, report = tune(pipeline, *model, datastore, words)
    found = evaluate(pipeline, *model, datastore, tuned, words)
    passage = inspect(pipeline, *model, datastore, tuned, words)
    pages = {"report": report, "a passage and its memories": passage}
    return read_json(tuned), found, pipeline.seconds, pages


def build_datastore(pipeline, data, checkpoint):
    """The datastore of train; gives its path."""
    datastore = pipeline.work / "datastore"
    pipeline.run(
        "build",
        "one key and value for every training token, and the index (2 minutes)",
        [
            *(program("fairseq-knnlm-build"), data, "--knn-datastore", datastore),
            *evaluation_flags("train", checkpoint),
        ],
        inputs=[data / "dict.txt", *split_files(data)["train"], checkpoint],
        outputs=[
            datastore / name for name in ("manifest.json", "keys.npy", "values.npy", "index.faiss")
        ],
        folder=datastore,
    )
    return datastore


def tune(pipeline, data, checkpoint, datastore, words):
    """What is best on valid and its report on test; gives the paths of both."""
    tuned, report = pipeline.work / "tune.json", pipeline.work / "report" / "report.html"
    binaries = split_files(data)
    pipeline.run(
        "tune",
        "neighbours and a continuous cache on valid, reported on test (2 minutes)",
        [
            *(program("fairseq-knnlm-tune"), data, "--knn-datastore", datastore),
            *(*evaluation_flags("valid", checkpoint), *words),
            *("--knn-cache-size", CACHE_SIZE, "--report-subset", "test", "--knn-output", tuned),
            *("--report", report.parent),
        ],
        inputs=[
            *(data / "dict.txt", *binaries["valid"], *binaries["test"]),
            *(checkpoint, datastore / "manifest.json"),
        ],
        outputs=[tuned, report],
    )
    return tuned, report


def tuned_neighbors(tuned):
    """Flags of the best setting of neighbours alone."""
    best = read_json(tuned)["best"]
    return [
        *("--knn-k", best["k"], "--knn-lambda", f"{best['knn_lambda']:.4f}"),
        *("--knn-temperature", f"{best['temperature']:.6g}"),
    ]


def evaluate(pipeline, data, checkpoint, datastore, tuned, words):
    """Perplexity on test; gives tokens and perplexity of each method."""
    plugin = ["--user-dir", PLUGIN, "--task", "knnlm_lm", "--knn-datastore", datastore, *words]
    neighbors = [*plugin, *tuned_neighbors(tuned)]
    found = {}
    for name, what, flags in (
        ("base", "the language model alone", []),
        ("knn", "with neighbours, as tuned on valid (a minute)", neighbors),
        ("knn_cache", "with neighbours and a cache, as tuned (a minute)", [*plugin, "--knn-tuned"]),
    ):
        log = pipeline.run(
            name,
            f"perplexity on test: {what}",
            [program("fairseq-eval-lm"), data, *evaluation_flags("test", checkpoint), *flags],
            inputs=[
                *(data / "dict.txt", *split_files(data)["test"], checkpoint),
                *([datastore / "manifest.json", tuned] if flags else []),
            ],
            outputs=[],
        )
        found[name] = evaluated(log)
    return found


def inspect(pipeline, data, checkpoint, datastore, tuned, words):
    """The memories behind the first tokens of test; gives the path of the page."""
    passage = pipeline.work / "passage.html"
    tokens = min(PASSAGE_TOKENS, read_json(tuned)["reported_on"]["tokens"])
    pipeline.run(
        "inspect",
        "which memories spoke, for each token of a passage of test",
        [
            *(program("fairseq-knnlm-inspect"), data, "--knn-datastore", datastore),
            *(*evaluation_flags("test", checkpoint), "--knn-tuned", *words),
            *("--positions", f"0:{tokens}", "--html", passage),
        ],
        inputs=[
            *(data / "dict.txt", *split_files(data)["test"], checkpoint),
            *(datastore / "manifest.json", tuned),
        ],
        outputs=[passage],
    )
    return passage


def split_files(data):
    """What fairseq-preprocess writes for each split."""
    splits = ("train", "valid", "test")
    return {split: [data / f"{split}.bin", data / f"{split}.idx"] for split in splits}


def make_model(pipeline, prepare_arguments, max_update, bpe):
    """Steps from text to a trained language model; gives the folder of its data and its path."""
    text, data, checkpoints = (pipeline.work / name for name in ("text", "data", "checkpoints"))
    splits = {split: text / f"{split}.txt" for split in ("train", "valid", "test")}
    dictionary = data / "dict.txt"
    binaries = split_files(data)
    checkpoint = checkpoints / "checkpoint_best.pt"
    pieces = [text / "dict.txt"] if bpe else []

    pipeline.run(
        "prepare",
        "tokenise the text and split it" + ", cut words into pieces" * bool(bpe),
        [
            *(Path(sys.executable), HERE / "prepare.py", text, *prepare_arguments),
            *(["--bpe", bpe] if bpe else []),
        ],
        inputs=[*text_files(prepare_arguments)],
        outputs=[*splits.values(), *pieces],
        folder=text,
        show=".",
    )
    pipeline.run(
        "preprocess",
        "words to numbers",
        [
            *(program("fairseq-preprocess"), "--only-source", "--destdir", data),
            *(part for split in splits for part in (f"--{split}pref", splits[split])),
            *("--workers", CORES, *(word for path in pieces for word in ("--srcdict", path))),
        ],
        inputs=[*splits.values(), *pieces],
        outputs=[dictionary, *binaries["train"], *binaries["valid"], *binaries["test"]],
        folder=data,
        show="fairseq_cli.preprocess.*sents",
    )
    pipeline.run(
        "train",
        "a small transformer language model (4 to 7 minutes on 2 cores)",
        [
            *(program("fairseq-train"), data, "--user-dir", PLUGIN, "--task", "knnlm_lm", "--cpu"),
            *training_flags(adaptive_cutoffs(dictionary), max_update),
            *("--save-dir", checkpoints),
        ],
        inputs=[dictionary, *binaries["train"], *binaries["valid"]],
        outputs=[checkpoint],
        folder=checkpoints,
    )
    return data, checkpoint


def parse_args():
    """The command line: --work, --max-update and --bpe are ours, the rest is prepare.py's."""
    parser = argparse.ArgumentParser(
        description="From raw text to a kNN language model.",
        epilog="All other flags (--input, --valid, --test, --min-count, --lang) are handed to "
        "prepare.py; see prepare.py --help.",
    )
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", help="folder for all results (%(default)s)"
    )
    parser.add_argument(
        "--max-update",
        type=int,
        default=2600,
        help="training steps of 1,024 tokens (%(default)s)",
    )
    parser.add_argument(
        "--bpe",
        type=int,
        metavar="SIZE",
        help="cut words into about so many different pieces (sentencepiece), none is <unk>; "
        "perplexity is of words all the same",
    )
    args, prepare_arguments = parser.parse_known_args()
    for flag, value in (("--max-update", args.max_update), ("--bpe", args.bpe)):
        if value is not None and value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
    return args, prepare_arguments


def main():
    args, prepare_arguments = parse_args()
    try:
        results = run_pipeline(args.work, prepare_arguments, args.max_update, args.bpe)
    except KeyboardInterrupt:
        sys.exit("\ndemo.py: interrupted; start it again to go on")
    write_report(args.work, *results)


if __name__ == "__main__":
    main()
