"""Running fairseq's commands and ours, and what they are run on."""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

from helpers import oracle

REPOSITORY = Path(__file__).resolve().parents[2]
USER_DIR = REPOSITORY / "fairseq_knnlm"

ARCHITECTURES = {
    "adaptive": (
        "--adaptive-input --adaptive-input-cutoff 20,60 --adaptive-softmax-cutoff 20,60 "
        "--tie-adaptive-weights --tie-adaptive-proj --criterion adaptive_loss"
    ),
    "plain": (
        "--share-decoder-input-output-embed --decoder-normalize-before --decoder-learned-pos "
        "--criterion cross_entropy"
    ),
}
MODEL = (
    "--arch transformer_lm --decoder-layers 2 --decoder-embed-dim 32 --decoder-input-dim 32 "
    "--decoder-output-dim 32 --decoder-ffn-embed-dim 48 --dropout 0.1 "
    "--decoder-attention-heads 2"
)
# fairseq-train may abort at its end while a thread still loads data
NO_THREADS = ("--num-workers", "0", "--data-buffer-size", "0")
TRAINING = (
    "--optimizer adam --lr 0.01 --max-update 60 --tokens-per-sample 32 --max-tokens 256 --seed 7 "
    "--ddp-backend legacy_ddp --cpu --disable-validation --no-epoch-checkpoints --log-format none "
    + " ".join(NO_THREADS)
)


def command(name):
    """A console script of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def run(*arguments, check=True, **options):
    """Run a command line as a user would; its output is in ``stdout``."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # fairseq's loader with workers sets this in the process that runs the tests, and a user's
    # choice of warnings is respected.
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(
        [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )
    assert done.returncode == 0 or not check, done.stdout[-3000:]
    return done


def knnlm(name, *arguments, **options):
    """Run one of our commands from the source tree, installed or not."""
    module = name.replace("fairseq-knnlm-", "fairseq_knnlm.cli.")
    code = f"import sys; from {module} import main; main(sys.argv[1:])"
    return run(sys.executable, "-c", code, *arguments, **options)


@contextlib.contextmanager
def user_errors():
    """Give back the ``UserError`` that a command of ours, run in this process, ended with."""
    from fairseq_knnlm.errors import UserError

    try:
        yield
    except SystemExit as end:
        if isinstance(end.__cause__, UserError):
            raise end.__cause__ from None
        raise


def call(main, *arguments):
    """Run one of our commands in this process; bad input arrives as a ``UserError``."""
    with user_errors():
        main([str(argument) for argument in arguments])


def make_text(seed, documents):
    """Documents of sentences with a grammar that a small model learns a part of."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(120)]
    lines = []
    for _ in range(documents):
        topic = rng.randrange(10)
        for _ in range(rng.randint(3, 9)):
            word, sentence = rng.randrange(120), []
            for _ in range(rng.randint(2, 14)):
                sentence.append(words[word])
                word = (word * 7 + topic + rng.choice([0, 0, 0, 1, 5])) % 120
            lines.append(" ".join(sentence))
        lines.append("")
    return "\n".join(lines) + "\n"


def build(data, checkpoint, directory, *flags, cpu=True):
    """Run ``fairseq-knnlm-build`` in this process."""
    from fairseq_knnlm.cli.build import main

    call(
        main, data, "--path", checkpoint, "--knn-datastore", directory, "--tokens-per-sample", 32,
        "--log-format", "none", "--num-workers", 0, *["--cpu"] * cpu, *flags,
    )  # fmt: skip


def evaluate(data, checkpoint, *flags, task="knnlm_lm", cpu=True):
    """Run ``fairseq-eval-lm`` in this process.

    Returns:
        float: perplexity, not rounded.
    """
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli import eval_lm

    arguments = [str(word) for word in (
        data, "--path", checkpoint, "--task", task, "--user-dir", USER_DIR,
        "--log-format", "none", "--num-workers", 0, *["--cpu"] * cpu, *flags,
    )]  # fmt: skip
    if "--tokens-per-sample" not in arguments:
        arguments += ["--tokens-per-sample", "32"]
    parsed = options.parse_args_and_arch(options.get_eval_lm_parser(), input_args=arguments)
    config = convert_namespace_to_omegaconf(parsed)
    with oracle.numpy_compat() if task == "language_modeling" else contextlib.nullcontext():
        return float(eval_lm.main(config)["perplexity"])


def flags_of(data, checkpoint, directory, *flags):
    """What most command lines begin with."""
    return [
        data, "--path", checkpoint, "--knn-datastore", directory, "--tokens-per-sample", 32,
        "--cpu", "--log-format", "simple", *flags,
    ]  # fmt: skip


def contents(directory):
    """The bytes of every file, by name."""
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


def in_two_processes(start, tmp_path):
    """Run a command line in two processes that talk through gloo; the output of the first."""
    flags = "--distributed-world-size 2 --distributed-no-spawn --distributed-backend gloo".split()
    flags += ["--distributed-init-method", f"file://{tmp_path}/rendezvous"]
    processes = [
        subprocess.Popen(
            [str(word) for word in [*start, *flags, "--distributed-rank", rank]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0]
