"""What a build costs, before it is begun: ``fairseq-knnlm-build --estimate``.

Bytes of keys and values are exact, those of the index within half a percent. Memory is rougher:
that of the process once the model has run, and what the index adds to it at most. Of 0.7M and 2M
entries with batches of 2,048 tokens it was 6% more than the build took; with batches of 36,000
tokens, whose memory goes on growing after the trial, 13% less.
"""

import os
import resource
from typing import NamedTuple, Optional

from ..datastore.journal import INDEX_WORK
from ..datastore.layout import INDEX, array_layout, npy_bytes
from ..search.index_cost import estimate_cost
from ..units import in_bytes, in_time


class Trial(NamedTuple):
    """The first chunks of a dump, measured.

    tokens (int): how many were run.
    tokens_per_s (float): of the last chunk; the first one warms up.
    device_bytes (int): peak memory of the GPU; 0 without one.
    """

    tokens: int
    tokens_per_s: float
    device_bytes: int


class Estimate(NamedTuple):
    """What a datastore takes, in bytes.

    disk: of each file while it is built.
    training, building (int): memory of the index, beside that of the process.
    loaded (int): memory of the index when it is searched.
    """

    disk: dict
    training: int
    building: int
    loaded: int

    @property
    def disk_bytes(self) -> int:
        """Most that is on the disk at a time."""
        return sum(self.disk.values())


def estimate_build(index_factory: str, count: int, dimension: int, metric: str, dtype) -> Estimate:
    """What a datastore takes.

    Args:
        index_factory (str): FAISS factory string.
        count (int): entries, N.
        dimension (int): numbers of a key, D.
        metric (str): ``l2`` or ``ip``.
        dtype (numpy.dtype): of the values.

    Raises:
        UserError: if FAISS does not know the factory string, or there is no such metric.
    """
    layout = array_layout(count, dimension, dtype)
    sizes = {name: npy_bytes(*array) for name, array in layout.items()}
    cost = estimate_cost(index_factory, count, dimension, metric)
    disk = {**sizes, INDEX: cost.file, INDEX_WORK: cost.parts}
    return Estimate(disk, cost.training, cost.building, cost.loaded)


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Memory that this process takes now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Most memory that this process ever took."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(
    costs: Estimate, count: int, free: int, neighbors_bytes: int, trial: Optional[Trial]
) -> str:
    """An estimate as text.

    Args:
        costs (Estimate): from ``estimate_build``.
        count (int): entries.
        free (int): bytes that the disk has for it.
        neighbors_bytes (int): most that the neighbours of an evaluation take at a time.
        trial (Trial): what this process has run; None: it has loaded no model.
    """
    process, dump = resident_bytes(), peak_bytes()
    index = process + max(costs.training, costs.building)
    measured = f"measured on {trial.tokens:,} tokens" if trial else "without a model"
    rows = [("disk", "", "")]
    rows += [(f"  {name}", size, "") for name, size in costs.disk.items()]
    rows += [("  together", costs.disk_bytes, f"{in_bytes(free)} can be had")]
    rows += [("memory", "", "")]
    rows += [("  dump", dump, measured)]
    rows += [("  training the index", process + costs.training, "")]
    rows += [("  building the index", process + costs.building, "")]
    rows += [("  together, about", max(dump, index), f"of {in_bytes(machine_bytes())}")]
    evaluation = process + costs.loaded + neighbors_bytes
    rows += [("  evaluation, k 1024", evaluation, "exact: keys.npy, mapped, on top if it fits")]
    if trial:
        seconds = count / trial.tokens_per_s
        speed = f"{trial.tokens_per_s:,.0f} tokens/s on one process, {measured}"
        rows += [("time of the dump", in_time(seconds), speed)]
        if trial.device_bytes:
            rows += [("memory of the GPU", trial.device_bytes, measured)]
    return "\n".join(map(_line, rows))


def _line(row) -> str:
    name, value, note = row
    value = in_bytes(value) if isinstance(value, int) else value
    return f"{name:<22}{value:>12}  {note}".rstrip()
