"""What is made once a session: a corpus and models, by fairseq's own commands; keys, datastores."""

import os

# Before torch and FAISS are imported: the matrices of the tests are too small to share, and two
# pools of threads that wait for each other cost five times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from helpers.commands import (
    ARCHITECTURES,
    MODEL,
    TRAINING,
    USER_DIR,
    build,
    command,
    make_text,
    run,
)
from helpers.parts import CUTS, DIMENSION, SIZES, VOCABULARY
from helpers.small import make_datastore, quiet, random_keys, random_values, save_keys

from fairseq_knnlm.search.index_build import build_index


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


# -- a datastore, whole and in parts ---------------------------------------------------------------


@pytest.fixture(scope="session")
def rows():
    """Keys and values of the ``SIZES`` parts, one after another."""
    return random_keys(1, sum(SIZES), DIMENSION), random_values(1, sum(SIZES), VOCABULARY)


@pytest.fixture(scope="session")
def make(rows, tmp_path_factory):
    """Makes a datastore of some of the rows; gives its directory."""

    def make_part(start=0, stop=None, **settings):
        keys, values = (part[start:stop] for part in rows)
        return make_datastore(tmp_path_factory.mktemp("datastore") / "d", keys, values, **settings)

    return make_part


@pytest.fixture(scope="session")
def whole(make):
    """A datastore of all rows."""
    return make()


@pytest.fixture(scope="session")
def parts(make):
    """A datastore of each part."""
    return [make(start, stop) for start, stop in zip(CUTS, CUTS[1:])]
