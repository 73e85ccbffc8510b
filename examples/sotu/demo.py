#!/usr/bin/env python3
"""From raw text to a kNN language model: each command of the pipeline, printed and run in turn.

    python examples/sotu/demo.py                                        # 249 presidential messages
    python examples/sotu/demo.py --work DIR --input my-texts/           # your own text

Everything is written to the folder --work: text, data, checkpoint, datastore, the full output of
every command (logs/), and at the end results.json and perplexity.png. Started again, it goes on
with the first step that has not finished, or whose command, inputs or outputs have changed since.

The sizes are those of a demonstration: two CPU cores, ten minutes.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from report import write_report

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parents[1] / "fairseq_knnlm"

TOKENS_PER_SAMPLE = 256
DIMENSION = 256
CORES = os.cpu_count()

# fairseq starts one process for every GPU that it sees, even with --cpu.
ONE_PROCESS = {"CUDA_VISIBLE_DEVICES": ""}
# OpenMP threads wait for each other by spinning. Where another program has one of the cores, that
# makes training ten times slower; with short spins it is as slow as the share of the cores tells.
BUSY_MACHINE = {"GOMP_SPINCOUNT": "10000"}

# Lines of fairseq's output that tell how far a command is; logs/ has all of them.
PROGRESS = (
    r"num_updates=|'valid' subset|fairseq_knnlm\.\w+( \||:)(?! {)|dump:|retrieve |Evaluated"
    r"|Perplexity"
)
LOG_PREFIX = re.compile(r"^([\d-]+ [\d:]+ \| )?INFO( \| |:)[\w.]+( \| |:)")
LINE_WIDTH = 110


class Pipeline:
    """Runs steps, each a command, and skips those whose results are there already."""

    def __init__(self, work, steps):
        self.work, self.steps = work, steps
        self.seconds = {}
        for folder in ("logs", "steps"):
            (work / folder).mkdir(parents=True, exist_ok=True)

    def run(self, name, what, command, inputs, outputs, folder=None, show=PROGRESS):
        """Run *command* unless it is done, and return the path of its log.

        A step is done if its record was written, which is the last thing that happens, and neither
        the command nor any input, output or log is another than then.

        Args:
            name (str): of the step, its log and its record.
            what (str): what it does, for people.
            command (list): program and arguments; paths are shown relative to the current folder.
            inputs (list): files that it reads.
            outputs (list): files that it writes, and that must be there afterwards.
            folder (Path): emptied first, as an interrupted command may have left half of it.
            show (str): regular expression of the output lines to print.
        """
        command = [display(argument) for argument in command]
        log, record = self.work / "logs" / f"{name}.log", self.work / "steps" / f"{name}.json"
        title = f"[{len(self.seconds) + 1}/{self.steps}] {name}: {what}"
        done = read_json(record)
        facts = {"command": command, "files": fingerprint([*inputs, *outputs, log])}
        if done and {key: done[key] for key in facts} == facts:
            print(f"{title}: done already, in {done['seconds']:.0f} s")
        else:
            record.unlink(missing_ok=True)
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            print(f"\n{title}\n{in_lines(command)}", flush=True)
            seconds = run_command(command, log, show)
            missing = [str(path) for path in outputs if not path.exists()]
            if missing:
                sys.exit(f"demo.py: step {name} did not write {', '.join(missing)}; see {log}")
            print(f"    {seconds:.0f} s", flush=True)
            facts["files"] = fingerprint([*inputs, *outputs, log])
            done = {**facts, "seconds": seconds}
            write_json(record, done)
        self.seconds[name] = done["seconds"]
        return log


def run_command(command, log, show):
    """Run a command with its output in *log*, print the lines that match *show*, return seconds."""
    start = time.monotonic()
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env={**BUSY_MACHINE, **os.environ, **ONE_PROCESS, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                if re.search(show, line):
                    line = LOG_PREFIX.sub("", line.rstrip())
                    shown = line if len(line) < LINE_WIDTH else line[: LINE_WIDTH - 3] + "..."
                    print(f"    {shown}", flush=True)
        except BaseException:
            process.terminate()  # also where the interrupt reached this process only
            raise
    if process.returncode != 0:
        last = log.read_text(encoding="utf-8").splitlines()[-15:]
        print("\n".join(last), file=sys.stderr)
        sys.exit(f"demo.py: {command[0]} failed with status {process.returncode}; see {log}")
    return time.monotonic() - start


def fingerprint(paths):
    """Size and time of last change of every file, None for one that is not there."""
    found = {}
    for path in map(Path, paths):
        stat = path.stat() if path.exists() else None
        found[str(path)] = stat and [stat.st_size, stat.st_mtime_ns]
    return found


def read_json(path):
    """What is in a JSON file, None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path, value):
    """Write a JSON file in whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def display(argument):
    """An argument of a command; a path relative to the current folder if it is below it."""
    if isinstance(argument, Path):
        relative = os.path.relpath(argument)
        return str(argument) if relative.startswith(os.pardir) else relative
    return str(argument)


def in_lines(command):
    """A command as one would type it, with line breaks before flags."""
    lines = ["$"]
    for word in re.split(r" (?=--)", shlex.join(command)):
        if len(lines[-1]) + len(word) < LINE_WIDTH - 3:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return " \\\n".join(lines)


def program(name):
    """A console script of the environment that runs this file, activated or not."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        sys.exit(f"demo.py: {path} is missing: install the package first (make install)")
    return path


def text_files(arguments):
    """The files among the arguments of prepare.py, folders opened."""
    for path in map(Path, arguments):
        if path.is_dir():
            yield from path.glob("*.txt")
        elif path.is_file():
            yield path


def adaptive_cutoffs(dictionary):
    """Borders of the frequency bands of adaptive input and softmax; fairseq wants them < types."""
    with open(dictionary, encoding="utf-8") as file:
        words = sum(1 for _ in file)
    return ",".join(str(border) for border in (1000, 5000) if border < words) or str(words // 2)


def training_flags(cutoffs, max_update):
    """A recipe for 15 minutes in all: little text is seen twice, so there is no dropout."""
    model = f"""
        --arch transformer_lm --decoder-layers 2 --decoder-attention-heads 4
        --decoder-embed-dim {DIMENSION} --decoder-input-dim {DIMENSION}
        --decoder-output-dim {DIMENSION} --decoder-ffn-embed-dim {4 * DIMENSION}
        --decoder-normalize-before --dropout 0
        --adaptive-input --adaptive-input-cutoff {cutoffs}
        --criterion adaptive_loss --adaptive-softmax-cutoff {cutoffs}
        --tie-adaptive-weights --tie-adaptive-proj
    """
    optimisation = f"""
        --optimizer adam --adam-betas (0.9,0.98) --clip-norm 1.0
        --lr 0.003 --lr-scheduler cosine --warmup-updates {min(200, max_update // 10)}
        --max-update {max_update} --tokens-per-sample {TOKENS_PER_SAMPLE}
        --max-tokens {4 * TOKENS_PER_SAMPLE} --seed 1 --ddp-backend legacy_ddp
    """
    # For short texts: by default fairseq drops a last batch that is no multiple of 8, which may be
    # all there is of valid; and many epochs learn by heart.
    optimisation += "--required-batch-size-multiple 1 --patience 5"
    saving = "--no-epoch-checkpoints --no-last-checkpoints --log-format simple --log-interval 100"
    return f"{model} {optimisation} {saving}".split()


def evaluation_flags(subset, checkpoint):
    """Flags of every command that runs the trained model over one split."""
    return [
        *("--path", checkpoint, "--gen-subset", subset, "--cpu"),
        *("--tokens-per-sample", TOKENS_PER_SAMPLE, "--max-tokens", 8 * TOKENS_PER_SAMPLE),
        *("--log-format", "simple", "--log-interval", 25),
    ]


def evaluated(log):
    """Number of tokens and perplexity that a log of fairseq-eval-lm ends with."""
    text = log.read_text(encoding="utf-8")
    tokens = re.search(r"Evaluated ([\d,]+) tokens", text).group(1)
    perplexity = re.search(r"Perplexity: (\S+)", text).group(1)
    return int(tokens.replace(",", "")), float(perplexity)


def run_pipeline(work, prepare_arguments, max_update):
    """All steps, from text to the two perplexities of the test split."""
    text, data, checkpoints, datastore = (
        work / name for name in ("text", "data", "checkpoints", "datastore")
    )
    splits = {split: text / f"{split}.txt" for split in ("train", "valid", "test")}
    dictionary = data / "dict.txt"
    binaries = {split: [data / f"{split}.bin", data / f"{split}.idx"] for split in splits}
    checkpoint = checkpoints / "checkpoint_best.pt"
    tuned = work / "tune.json"
    pipeline = Pipeline(work, steps=7)

    pipeline.run(
        "prepare",
        "tokenise the text and split it",
        [Path(sys.executable), HERE / "prepare.py", text, *prepare_arguments],
        inputs=[*text_files(prepare_arguments)],
        outputs=[*splits.values()],
        folder=text,
        show=".",
    )
    pipeline.run(
        "preprocess",
        "words to numbers",
        [
            *(program("fairseq-preprocess"), "--only-source", "--destdir", data),
            *(part for split in splits for part in (f"--{split}pref", splits[split])),
            *("--workers", CORES),
        ],
        inputs=[*splits.values()],
        outputs=[dictionary, *binaries["train"], *binaries["valid"], *binaries["test"]],
        folder=data,
        show="fairseq_cli.preprocess.*sents",
    )
    pipeline.run(
        "train",
        "a small transformer language model (4 minutes on 2 cores)",
        [
            *(program("fairseq-train"), data, "--user-dir", PLUGIN, "--task", "knnlm_lm", "--cpu"),
            *training_flags(adaptive_cutoffs(dictionary), max_update),
            *("--save-dir", checkpoints),
        ],
        inputs=[dictionary, *binaries["train"], *binaries["valid"]],
        outputs=[checkpoint],
        folder=checkpoints,
    )
    pipeline.run(
        "build",
        "one key and value for every training token, and the index (2 minutes)",
        [
            *(program("fairseq-knnlm-build"), data, "--knn-datastore", datastore),
            *evaluation_flags("train", checkpoint),
        ],
        inputs=[dictionary, *binaries["train"], checkpoint],
        outputs=[
            datastore / name for name in ("manifest.json", "keys.npy", "values.npy", "index.faiss")
        ],
        folder=datastore,
    )
    evaluation_inputs = [dictionary, *binaries["test"], checkpoint]
    base_log = pipeline.run(
        "base",
        "perplexity of the language model alone on test",
        [program("fairseq-eval-lm"), data, *evaluation_flags("test", checkpoint)],
        inputs=evaluation_inputs,
        outputs=[],
    )
    pipeline.run(
        "tune",
        "k, lambda and temperature on valid (a minute)",
        [
            *(program("fairseq-knnlm-tune"), data, "--knn-datastore", datastore),
            *evaluation_flags("valid", checkpoint),
            *("--knn-output", tuned),
        ],
        inputs=[dictionary, *binaries["valid"], checkpoint, datastore / "manifest.json"],
        outputs=[tuned],
    )
    best = read_json(tuned)["best"]
    knn_log = pipeline.run(
        "knn",
        "perplexity with neighbours on test, as tuned on valid (a minute)",
        [
            *(program("fairseq-eval-lm"), data, "--user-dir", PLUGIN, "--task", "knnlm_lm"),
            *("--knn-datastore", datastore, "--knn-k", best["k"]),
            *("--knn-lambda", f"{best['knn_lambda']:.4f}"),
            *("--knn-temperature", f"{best['temperature']:.6g}"),
            *evaluation_flags("test", checkpoint),
        ],
        inputs=[*evaluation_inputs, datastore / "manifest.json", tuned],
        outputs=[],
    )
    return read_json(tuned), evaluated(base_log), evaluated(knn_log), pipeline.seconds


def parse_args():
    """The command line: --work and --max-update are ours, the rest is prepare.py's."""
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
    args, prepare_arguments = parser.parse_known_args()
    if args.max_update < 1:
        parser.error(f"--max-update must be at least 1, got {args.max_update}")
    return args, prepare_arguments


def main():
    args, prepare_arguments = parse_args()
    try:
        tuned, base, knn, seconds = run_pipeline(args.work, prepare_arguments, args.max_update)
    except KeyboardInterrupt:
        sys.exit("\ndemo.py: interrupted; start it again to go on")
    write_report(args.work, tuned, base, knn, seconds)


if __name__ == "__main__":
    main()
