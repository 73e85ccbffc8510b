"""A build that kills itself, for the tests of resuming; a module, so that it can be imported."""

import os
import signal

from fairseq_knnlm import datastore_writer, index
from fairseq_knnlm.cli import build

# Small, so that a small corpus has many moments to be killed at.
CHUNK_TOKENS, PART_ROWS = 200, 1000
_STEPS = [
    (datastore_writer, "_write_all"),
    (datastore_writer, "_journal_line"),
    (datastore_writer, "write_atomically"),
    (index, "save"),
    (index, "load"),
    (index, "_blocks"),
    (os, "replace"),
    (os, "fsync"),
    (os, "remove"),
]


def use_small_parts(patch):
    """Cut the work in small parts, with *patch* a pytest MonkeyPatch or ``setattr``."""
    patch(build, "CHUNK_TOKENS", CHUNK_TOKENS)
    patch(index, "PART_ROWS", PART_ROWS)


def build_until(moment, arguments):
    """Build a datastore; SIGKILL before step number *moment* of everything that touches a file."""
    left = [moment]

    def killing(function):
        def counted(*positional, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*positional, **named)

        return counted

    use_small_parts(setattr)
    for place, name in _STEPS:
        setattr(place, name, killing(getattr(place, name)))
    build.main(arguments)
