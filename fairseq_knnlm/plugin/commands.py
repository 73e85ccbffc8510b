"""fairseq's own commands, seen from inside: which of them runs, and how it ends.

``fairseq-eval-lm`` and the others know nothing of this package but its task. What has to reach into
a running command asks here for the command's names. Only this file looks at ``sys.modules``.
"""

import builtins
import itertools
import os
import sys
import traceback
from types import CodeType, ModuleType
from typing import Optional

import fairseq_cli
from fairseq import checkpoint_utils, distributed_utils
from torch.multiprocessing import ProcessRaisedException

from ..errors import UserError

_USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}"
_TRACEBACK = "Traceback (most recent call last):\n"
# Where fairseq loads a checkpoint, and where it looks for the GPUs that are asked for.
_LOADS = checkpoint_utils.load_model_ensemble_and_task.__code__
_STARTS = distributed_utils.infer_init_method.__code__


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
    if is_command() and not isinstance(sys.excepthook, _TextHook):
        sys.excepthook = _TextHook(sys.excepthook)


def closing_text(error: BaseException) -> Optional[str]:
    """What a command prints in place of a traceback.

    fairseq starts one process for each GPU. An exception in one of them reaches the first process
    as torch's ``ProcessRaisedException``, which holds the traceback as text.

    fairseq has no hook around the loading of a checkpoint, and no exceptions of its own for what
    can be wrong with one: a damaged file ends in one of torch, pickle or the operating system. So
    it is the place of an exception that says so; and so it is where fairseq counts the GPUs.

    Returns:
        str: of a ``UserError``, raised in this process or in one that it started; of an error of
        the operating system, such as a full disk or a file that must not be read; of whatever ended
        the loading of a checkpoint, or the start of more processes; of flags that a command of
        fairseq refuses, or input that it cannot read. None for all other exceptions, which are to
        keep their traceback.
    """
    if isinstance(error, UserError):
        return f"fairseq_knnlm: {error}"
    if not isinstance(error, Exception):  # it was interrupted
        return None
    loading, starting = _variables(error, _LOADS), _variables(error, _STARTS)
    if loading is not None:
        paths = os.pathsep.join(map(str, loading["filenames"]))
        return _checkpoint_text(paths, type(error).__name__, str(error))
    if starting is not None:
        asked = starting["cfg"].distributed_world_size
        return (
            "fairseq_knnlm: fairseq starts a process for each GPU, and cannot start those of "
            f"--distributed-world-size {asked} (without GPUs see --distributed-no-spawn): {error}"
        )
    if isinstance(error, OSError) or _is_of_flags(error):
        return f"fairseq_knnlm: {error}"
    if isinstance(error, UnicodeDecodeError) and runs("interactive"):
        return f"fairseq_knnlm: the input is no UTF-8 text: {error}"
    if isinstance(error, ProcessRaisedException):
        called = _variables(error, distributed_utils.call_main.__code__)
        path = None if called is None else called["cfg"].common_eval.path
        return _text_of_another_process(str(error), path)
    return None


def _text_of_another_process(trace: str, path: Optional[str]) -> Optional[str]:
    """``closing_text`` of the exception in another process, of whose traceback there is the text.

    Args:
        trace (str): it.
        path (str): ``--path`` of the command.
    """
    # An exception that led to another one has a traceback of its own before.
    lines = trace.rpartition(_TRACEBACK)[2].splitlines(keepends=True)
    frames = list(itertools.takewhile(lambda line: line.startswith("  "), lines))
    name, _, message = "".join(lines[len(frames) :]).rstrip().partition(": ")
    if name == _USER_ERROR:
        return f"fairseq_knnlm: {message}"
    if any(line.endswith(f", in {_LOADS.co_name}\n") for line in frames):
        return _checkpoint_text(path, name, message)
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, OSError):
        return f"fairseq_knnlm: {message}"
    return None


def _checkpoint_text(paths: Optional[str], kind: str, reason: str) -> str:
    hint = "\nwas it trained with the dict.txt of this DATA?" if "size mismatch" in reason else ""
    return (
        f"fairseq_knnlm: --path {paths} cannot be loaded as a checkpoint: {kind}: "
        f"{reason or 'no reason given'}{hint}"
    )


def _is_of_flags(error: Exception) -> bool:
    """Whether a command of fairseq has itself refused flags: it does so by asserts with a text."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not isinstance(error, AssertionError) or not str(error) or not frames:
        return False
    return os.path.dirname(os.path.realpath(frames[-1].f_code.co_filename)) == _folder()


def _variables(error: Exception, code: CodeType) -> Optional[dict]:
    """Those of the function that an exception passed through; None where it did not."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is code:
            return frame.f_locals
    return None


class _TextHook:
    """Prints the closing text of an exception, and hands all others to the hook before it."""

    def __init__(self, previous):
        self._previous = previous

    def __call__(self, kind, error, trace):
        text = closing_text(error)
        if text is None:
            self._previous(kind, error, trace)
        else:
            print(text, file=sys.stderr)


def runs(command: str) -> bool:
    """Whether this process is a certain command of fairseq.

    Args:
        command (str): as ``running_names`` takes it.
    """
    return _command_of_fairseq() == command


def is_command() -> bool:
    """Whether this process is a command of fairseq, and not a script that imports this package."""
    return _command_of_fairseq() is not None


def _command_of_fairseq() -> Optional[str]:
    """The command that this process is: a console script, or a file of fairseq_cli; else None."""
    main = sys.modules["__main__"]
    entry = getattr(getattr(main, "cli_main", None), "__module__", None) or ""
    if entry.startswith(f"{fairseq_cli.__name__}."):
        return entry.rpartition(".")[2]
    folder, name = os.path.split(_file(main))
    return os.path.splitext(name)[0] if folder == _folder() else None


def _file(module: ModuleType) -> str:
    """The file of a module; that of an interactive session is ''."""
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if file else ""


def _folder() -> str:
    return os.path.realpath(fairseq_cli.__path__[0])
