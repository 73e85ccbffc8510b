"""What fairseq needs to run on today's PyTorch and numpy, and what its import must not change.

PyTorch >= 2.6 loads weights only. Checkpoints of older fairseq releases keep their arguments as an
``argparse.Namespace`` and a few statistics as numpy scalars. Both are plain data; naming them as
safe keeps PyTorch's protection on for all the rest. numpy 2 has dropped a name that fairseq uses.
"""

import argparse
import contextlib
import logging
import types

import numpy as np
import torch


def allow_plain_data() -> None:
    """Name the classes of plain data in fairseq's checkpoints as safe to load."""
    add_safe_globals = getattr(torch.serialization, "add_safe_globals", None)
    if add_safe_globals is None:  # PyTorch < 2.4 has no such protection
        return
    scalar = np.float64(0.0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "bool")}
    # numpy 1 and 2 pickle the same function under two names.
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    add_safe_globals([argparse.Namespace, np.dtype, *dtypes, *names])


@contextlib.contextmanager
def numpy_compat():
    """Lend numpy 2 the name ``np.compat.long``, without which fairseq fails in break mode eos."""
    if hasattr(np, "compat"):
        yield
        return
    np.compat = types.SimpleNamespace(long=np.int64)
    try:
        yield
    finally:
        del np.compat


@contextlib.contextmanager
def root_logger_kept():
    """Leave the root logger as it was: its level and its handlers.

    Importing fairseq sets it to DEBUG and lets it print (a model of fairseq's calls
    ``logging.basicConfig``), which shows the debug lines of every library that a user's own script
    imports. Where fairseq was imported before, as in its own commands, nothing is changed.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
