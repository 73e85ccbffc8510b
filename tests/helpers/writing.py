"""One small datastore, written in six chunks: whole, in part, or again."""

import multiprocessing

import numpy as np

from fairseq_knnlm.datastore import DatastoreWriter
from helpers.small import finish, random_keys, random_values, settings, write_chunks

SIZES = [40, 1, 25, 60, 14, 33]
COUNT, DIMENSION = sum(SIZES), 8
VOCABULARY = 200
JOURNAL = "building-1-of-1.journal"

fork = multiprocessing.get_context("fork")


def make_rows():
    return random_keys(1, COUNT, DIMENSION), random_values(1, COUNT, VOCABULARY)


def open_writer(path, chunk_sizes=SIZES, dtype=np.uint8, options=None, **changed):
    return DatastoreWriter(
        str(path), settings(**changed), chunk_sizes, DIMENSION, dtype, **(options or {})
    )


def resume_and_finish(path, expected_done, **options):
    """Go on with a datastore; only what is not done is written again."""
    with open_writer(path, options=options) as writer:
        assert sorted(writer.done) == expected_done
        write_chunks(writer, *make_rows(), SIZES)
        finish(writer)


def begin(path, chunks):
    """Leave a datastore of which only *chunks* are written."""
    with open_writer(path) as writer:
        write_chunks(writer, *make_rows(), SIZES, only=chunks)
