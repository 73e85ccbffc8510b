"""fairseq's own commands, seen from inside: which of them runs, and how it ends.

``fairseq-eval-lm`` and the others know nothing of this package but its task. What has to reach into
a running command asks here for the command's names. Only this file looks at ``sys.modules``.
"""

import os
import sys
from types import ModuleType
from typing import Optional

import fairseq_cli
from torch.multiprocessing import ProcessRaisedException

from ..errors import UserError

_USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "
_CHAINED_TRACEBACK = "\nTraceback (most recent call last):"


def running_names(command: str) -> Optional[dict]:
    """The global names that a command of fairseq looks up in this process, to replace some.

    Under ``python -m fairseq_cli.eval_lm`` they are those of ``__main__``, and in a process that
    such a command has started those of a module that nothing else refers to. The command is not
    imported here: one that this process has not loaded cannot be running, and importing it
    configures logging.

    Args:
        command (str): name of a module of ``fairseq_cli``, such as ``eval_lm``.

    Returns:
        dict: the globals of the command's functions; None where it is not loaded.
    """
    module = sys.modules["__main__"]
    if _file(module) != os.path.join(_folder(), f"{command}.py"):
        module = sys.modules.get(f"{fairseq_cli.__name__}.{command}")
    return None if module is None else module.main.__globals__


def end_with_text() -> None:
    """Let the command of fairseq that this process runs end with the text of a ``UserError``.

    Python's hook for uncaught exceptions then prints the text in place of a traceback; the exit
    status stays 1. In every other program, such as a script that imports this package, the hook is
    left alone. Calling this again changes nothing.
    """
    if _runs_fairseqs_command() and not isinstance(sys.excepthook, _TextHook):
        sys.excepthook = _TextHook(sys.excepthook)


def closing_text(error: BaseException) -> Optional[str]:
    """What a command prints in place of a traceback.

    fairseq starts one process for each GPU. An exception in one of them reaches the first process
    as torch's ``ProcessRaisedException``, which holds the traceback as text.

    Returns:
        str: of a ``UserError``, raised in this process or in one that it started; None for all
        other exceptions, which are to keep their traceback.
    """
    if isinstance(error, UserError):
        return f"fairseq_knnlm: {error}"
    if isinstance(error, ProcessRaisedException):
        _, marker, text = str(error).rpartition(f"\n{_USER_ERROR}")
        # A UserError that led to another exception stands in the middle of the text.
        if marker and _CHAINED_TRACEBACK not in text:
            return f"fairseq_knnlm: {text.rstrip()}"
    return None


class _TextHook:
    """Prints the closing text of an exception, and hands all others to the hook before it."""

    def __init__(self, previous):
        self._previous = previous

    def __call__(self, kind, error, traceback):
        text = closing_text(error)
        if text is None:
            self._previous(kind, error, traceback)
        else:
            print(text, file=sys.stderr)


def _runs_fairseqs_command() -> bool:
    """Whether this process is one of fairseq's console scripts, or runs a file of fairseq_cli."""
    main = sys.modules["__main__"]
    entry = getattr(getattr(main, "cli_main", None), "__module__", None) or ""
    is_console_script = entry.startswith(f"{fairseq_cli.__name__}.")
    return is_console_script or os.path.dirname(_file(main)) == _folder()


def _file(module: ModuleType) -> str:
    """The file of a module; that of an interactive session is ''."""
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if file else ""


def _folder() -> str:
    return os.path.realpath(fairseq_cli.__path__[0])
