"""A build that kills itself, for the tests of resuming; a module, so that it can be imported."""

import os
import signal

from fairseq_knnlm.building import build
from fairseq_knnlm.cli.build import main
from fairseq_knnlm.datastore import arrays, journal, writer
from fairseq_knnlm.search import index_build

# Small, so that a small corpus has many moments to be killed at.
JOURNAL_TOKENS, PART_ROWS = 200, 1000
# Everything that touches a file, where it is called from.
_STEPS = [
    (arrays, "write_all"),
    (journal, "write_all"),
    (journal, "journal_line"),
    (journal, "write_atomically"),
    (writer, "write_atomically"),
    (index_build, "save"),
    (index_build, "load"),
    (index_build, "_blocks"),
    (os, "replace"),
    (os, "fsync"),
    (os, "remove"),
]


def use_small_parts(patch):
    """Cut the work in small parts, with *patch* a pytest MonkeyPatch or ``setattr``."""
    patch(build, "JOURNAL_TOKENS", JOURNAL_TOKENS)
    patch(index_build, "PART_ROWS", PART_ROWS)


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
    main(arguments)
