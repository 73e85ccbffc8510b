"""Short spins for OpenMP threads that wait, in commands whose environment does not ask for them.

GNU's OpenMP lets a thread that waits for the others spin 300,000 times before it sleeps. Where
another program has one of the cores, it spins in the place of the thread that it waits for. How
often is read from the environment (``GOMP_SPINCOUNT``) when the library is loaded, and in fairseq's
own commands torch has loaded it before this package comes in. But it is no more than 100 times,
says libgomp's manual, while there are more OpenMP threads than cores. So there will be: some that
never do anything.
"""

import ctypes
import os
import threading

import torch

_COUNT, _POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
# For copies of the library that are loaded later, such as FAISS's, and for other processes.
_SPINS = "10000"


def spin_little() -> None:
    """Let OpenMP threads that wait go to sleep early; leaves what the environment asks for."""
    if _COUNT in os.environ or _POLICY in os.environ:
        return
    os.environ[_COUNT] = _SPINS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    if 1 < threads <= cores:
        for library in _loaded():
            _keep_idle(library, cores + 2 - threads)


def _loaded() -> list[ctypes.CDLL]:
    """GNU's OpenMP libraries in this process; none where there is no /proc to tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            paths = {line.split(maxsplit=5)[-1].rstrip("\n") for line in maps if "libgomp" in line}
        libraries = [ctypes.CDLL(path) for path in sorted(paths)]
    except OSError:
        return []
    return [library for library in libraries if hasattr(library, "GOMP_parallel")]  # no plug-ins


def _keep_idle(library: ctypes.CDLL, count: int) -> None:
    """Start a team of *count* threads, which have nothing to do and stay as long as the process.

    libgomp keeps the threads of a team as long as the thread that has started it lives.
    """
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of NULL
    started = threading.Event()

    def stay():
        try:
            library.GOMP_parallel(nothing, None, count, 0)
        finally:
            started.set()
        threading.Event().wait()

    threading.Thread(target=stay, name="idle OpenMP threads", daemon=True).start()
    started.wait()
