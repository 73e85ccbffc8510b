"""What the examples share: steps that are commands, printed, run once, and kept in a folder.

Also the small language model of the examples, its flags, and what stock commands print.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

from step_process import FolderLock, running

PLUGIN = Path(__file__).resolve().parents[1] / "fairseq_knnlm"

# Alone: importing the package takes seconds and the memory of PyTorch.
_spec = importlib.util.spec_from_file_location("units", PLUGIN / "units.py")
units = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(units)
in_time = units.in_time

SCRIPT = Path(sys.argv[0]).name

TOKENS_PER_SAMPLE = 256
DIMENSION = 256

# fairseq starts one process for every GPU that it sees, even with --cpu.
ONE_PROCESS = {"CUDA_VISIBLE_DEVICES": ""}
# OpenMP threads wait for each other by spinning. Where another program has one of the cores, that
# makes training ten times slower; with short spins it is as slow as the share of the cores tells.
BUSY_MACHINE = {"GOMP_SPINCOUNT": "10000"}

# Lines of fairseq's output that tell how far a command is; logs/ has all of them.
PROGRESS = (
    r"num_updates=|'valid' subset|fairseq_knnlm\.\w+( \||:)(?! {)|dump:|retrieve |Evaluated"
    r"|Perplexity|perplexity is of"
)
LOG_PREFIX = re.compile(r"^([\d-]+ [\d:]+ \| )?INFO( \| |:)[\w.]+( \| |:)")
# Figures of a line of training that tell nobody how far it is.
UNTOLD = re.compile(r"(?:,| \|) (?:wpb|bsz|lr|gnorm|clip|train_wall|gb_free|ups)[ =][^\s,]+")
# What stands before a command in the output of fairseq-knnlm-tune.
EVALUATE = "evaluate with: "
LINE_WIDTH = 110
INDENT = " " * 4


class Pipeline:
    """Runs steps, each a command, and skips those whose results are there already."""

    def __init__(self, work, steps, environment=ONE_PROCESS):
        self.work, self.steps, self.environment = work, steps, environment
        self.seconds = {}
        for folder in ("logs", "steps"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        try:
            self._lock = FolderLock(work, SCRIPT)
        except BlockingIOError as error:
            sys.exit(
                f"{SCRIPT}: {error} is at work in {display(work)}: wait for it, end it, or name "
                "another folder with --work"
            )

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
            print(f"{title}: done already, in {in_time(done['seconds'])}")
        else:
            record.unlink(missing_ok=True)
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            print(f"\n{title}\n{in_lines(command)}", flush=True)
            seconds = run_command(command, log, show, self.environment, self._lock)
            missing = [str(path) for path in outputs if not path.exists()]
            if missing:
                sys.exit(f"{SCRIPT}: step {name} did not write {', '.join(missing)}; see {log}")
            print(f"    {in_time(seconds)}", flush=True)
            facts["files"] = fingerprint([*inputs, *outputs, log])
            done = {**facts, "seconds": seconds}
            write_json(record, done)
        self.seconds[name] = done["seconds"]
        return log


def run_command(command, log, show, environment, lock):
    """Run a command with its output in *log*, print the lines that match *show*, return seconds."""
    start = time.monotonic()
    environment = {**BUSY_MACHINE, **os.environ, **environment, "PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as file, running(command, environment, lock) as process:
        for line in process.stdout:
            file.write(line)
            if re.search(show, line):
                print(shown(line), flush=True)
    if process.returncode != 0:
        last = log.read_text(encoding="utf-8").splitlines()[-15:]
        print("\n".join(last), file=sys.stderr)
        sys.exit(f"{SCRIPT}: {command[0]} failed with status {process.returncode}; see {log}")
    return time.monotonic() - start


def shown(line):
    """A line of a command's output as it is printed: nothing is cut, long lines are wrapped."""
    line = UNTOLD.sub("", LOG_PREFIX.sub("", line.rstrip()))
    what, is_command, command = line.partition(EVALUATE)
    if is_command:  # to be copied
        return textwrap.indent(
            f"{what}{EVALUATE.rstrip()}\n{in_lines(shlex.split(command))}", INDENT
        )
    return textwrap.fill(
        line,
        LINE_WIDTH,
        initial_indent=INDENT,
        subsequent_indent=2 * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


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
        if lines == ["$"] or len(lines[-1]) + len(word) < LINE_WIDTH - 3:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return " \\\n".join(lines)


def program(name):
    """A console script of the environment that runs this file, activated or not."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        sys.exit(f"{SCRIPT}: {path} is missing: install the package first (make install)")
    return path


def adaptive_cutoffs(dictionary):
    """Borders of the frequency bands of adaptive input and softmax; fairseq wants them < types."""
    with open(dictionary, encoding="utf-8") as file:
        words = sum(1 for _ in file)
    return ",".join(str(border) for border in (1000, 5000) if border < words) or str(words // 2)


def training_flags(cutoffs, max_update):
    """A recipe for a few minutes: little text is seen twice, so there is no dropout."""
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
