"""Measurements that take turns, so that what slows the machine down slows all of them down."""

import math
import statistics
import time

# CPU seconds a second of one that computes and reads what is in memory already: 1 or more. With
# less the machine was busy with something else, or waited for a disk.
LEAST_CPU = 0.8


class Stopwatch:
    """Measures from when it is made.

    Args:
        clock (callable): gives seconds.
    """

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._start, self._start_cpu = clock(), time.process_time()

    def read(self):
        """Seconds on the clock, and of all cores."""
        seconds = self._clock() - self._start
        return {"seconds": seconds, "cpu_s": time.process_time() - self._start_cpu}


def was_held_up(runs):
    """Whether, by the median, the measured process got less of a core than it could use."""
    return median(runs, "cpu_s") < LEAST_CPU * median(runs, "seconds")


def interleaved(measurements, repeats, long_s=math.inf):
    """Take every measurement in turn, *repeats* times.

    Args:
        measurements (dict): functions by name; each gives a dict of numbers with ``seconds``.
        repeats (int): turns.
        long_s (float): a measurement that took longer is not repeated.

    Returns:
        dict: lists of what the functions gave, by name.
    """
    runs = {name: [] for name in measurements}
    for _ in range(repeats):
        for name, measure in measurements.items():
            if not runs[name] or runs[name][-1]["seconds"] <= long_s:
                runs[name].append(measure())
    return runs


def median(runs, name):
    """The median of one number of several runs."""
    return statistics.median(run[name] for run in runs)
