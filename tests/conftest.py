"""A small corpus and small models, made once a session with fairseq's own commands."""

import contextlib
import os

# Before torch and FAISS are imported: the matrices of the tests are too small to share, and two
# pools of threads that wait for each other cost five times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from helpers import quiet, random_keys, save_keys

from fairseq_knnlm.index import build_index

REPOSITORY = Path(__file__).resolve().parent.parent
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


def make_text(seed, documents):
    """Documents of sentences with a grammar that a small model learns a part of."""
    chance = random.Random(seed)
    words = [f"w{i}" for i in range(120)]
    lines = []
    for _ in range(documents):
        topic = chance.randrange(10)
        for _ in range(chance.randint(3, 9)):
            word, sentence = chance.randrange(120), []
            for _ in range(chance.randint(2, 14)):
                sentence.append(words[word])
                word = (word * 7 + topic + chance.choice([0, 0, 0, 1, 5])) % 120
            lines.append(" ".join(sentence))
        lines.append("")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A binarised corpus: about 4,000 / 600 / 600 tokens, documents separated by empty lines."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, documents) in enumerate({"train": 80, "valid": 12, "test": 12}.items()):
        (folder / f"{split}.txt").write_text(make_text(seed, documents))
    prefixes = [f"--{split}pref" for split in ("train", "valid", "test")]
    texts = [folder / f"{split}.txt" for split in ("train", "valid", "test")]
    run(
        command("fairseq-preprocess"),
        "--only-source",
        *(word for pair in zip(prefixes, texts) for word in pair),
        "--destdir",
        folder / "bin",
    )
    return folder / "bin"


@pytest.fixture(scope="session")
def checkpoints(data, tmp_path_factory):
    """Paths of small trained checkpoints, one an architecture."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, architecture in ARCHITECTURES.items():
        run(
            command("fairseq-train"), data,
            "--user-dir", USER_DIR, "--task", "knnlm_lm", "--save-dir", folder / name,
            *MODEL.split(), *architecture.split(), *TRAINING.split(),
        )  # fmt: skip
    return {name: folder / name / "checkpoint_last.pt" for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def datastores(data, checkpoints, tmp_path_factory):
    """Finished datastores of the train split with an exhaustive index, one a checkpoint."""
    folder = tmp_path_factory.mktemp("datastores")
    for name, checkpoint in checkpoints.items():
        build(data, checkpoint, folder / name, "--knn-index", "Flat")
    return {name: folder / name for name in checkpoints}


def build(data, checkpoint, directory, *flags, cpu=True):
    """Run ``fairseq-knnlm-build`` in this process."""
    from fairseq_knnlm.cli.build import main

    main([str(word) for word in (
        data, "--path", checkpoint, "--knn-datastore", directory, "--tokens-per-sample", 32,
        "--log-format", "none", "--num-workers", 0, *["--cpu"] * cpu, *flags,
    )])  # fmt: skip


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


# -- keys and indexes of them ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """1,500 keys of 16 dimensions, as a datastore has them."""
    return save_keys(tmp_path_factory.mktemp("keys"), random_keys(1, 1500, 16))


@pytest.fixture(scope="session")
def queries():
    return random_keys(2, 60, 16).astype(np.float32)


@pytest.fixture(scope="session")
def index_path(keys, tmp_path_factory):
    """Builds an index of the keys once for each factory string and metric; gives the file."""
    folder, paths = tmp_path_factory.mktemp("indexes"), {}

    def path(factory, metric="l2"):
        if (factory, metric) not in paths:
            file = str(folder / f"{len(paths)}.faiss")
            build_index(keys, factory, metric, file, f"{file}.building", quiet)
            paths[factory, metric] = file
        return paths[factory, metric]

    return path
