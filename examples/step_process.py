"""How a step of an example runs: one process at a time, ended with us, in a folder of its own.

A step has a process group, so that the processes that it starts end with it. It holds the lock of
the folder as well: one that outlives us, because we were killed, keeps others out.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import time

# How long a process has to end by itself before it is killed.
PATIENCE_S = 10
# What ends a program from outside; Ctrl-C is a KeyboardInterrupt already.
ENDING = (signal.SIGTERM, signal.SIGHUP)


class FolderLock:
    """Keeps a folder to one run, until this process and the steps that it started have ended.

    Args:
        folder (Path): there already.
        owner (str): who takes it, for the message to another one.

    Raises:
        BlockingIOError: if another process has it; the text says which.
    """

    def __init__(self, folder, owner):
        self._file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (kept open)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise BlockingIOError(self._file.read().strip() or "another process") from None
        self._owner = f"{owner} (process {os.getpid()})"
        self._write(self._owner)

    def name_step(self, program, process_id):
        """Say which step is at work, for the message to another run."""
        self._write(f"{self._owner} or its step {program} (process {process_id})")

    def _write(self, text):
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()

    def fileno(self):
        """The lock for a process that is to hold it too."""
        return self._file.fileno()


@contextlib.contextmanager
def running(command, environment, lock):
    """A command in a process group of its own, which is ended if this context is left by an error.

    Args:
        command (list of str): program and arguments.
        environment (dict): of the process.
        lock (FolderLock): the process holds it as well.

    Yields:
        Popen: output and errors are text in ``stdout``.
    """
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=[lock.fileno()],
    ) as process:
        lock.name_step(os.path.basename(command[0]), process.pid)
        try:
            with _interrupted_by(ENDING):
                yield process
        except BaseException:
            _end_group(process)
            raise


@contextlib.contextmanager
def _interrupted_by(signals):
    """Within this context these signals do what Ctrl-C does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(process):
    """End a process and all that it started; kill what has not ended after some seconds."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while _is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    except ProcessLookupError:
        return
    finally:  # also where we are interrupted once more
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_alive(process):
    """Whether anything is left of its group."""
    process.poll()  # one that has ended and was not waited for would count
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
