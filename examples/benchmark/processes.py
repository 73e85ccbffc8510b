"""Commands in processes of their own, with what they took: seconds and peak memory.

Run as a program it is fairseq-knnlm-build that ends with a line of JSON: the seconds of its parts.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from unittest import mock

import fairseq_knnlm.building.build as building
from fairseq_knnlm.cli import build
from fairseq_knnlm.plugin.task import KNNLMTask

# Last of a command line: what a benchmark prints is its table.
QUIET = ["--log-format", "none"]


def run(command, loglevel="WARNING", environment=()):
    """Run a command to its end.

    Args:
        command (list): its words.
        loglevel (str): of fairseq.
        environment (dict): what else is in its environment.

    Returns:
        tuple: its output and the peak of its resident memory in bytes, in which pages of mapped
        files count.
    """
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "LOGLEVEL": loglevel, **dict(environment)},
    )
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{output[-3000:]}\nbenchmark.py: failed: {' '.join(map(str, command))}")
    return output, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def eval_lm(data, flags):
    """Run the console script ``fairseq-eval-lm``.

    Its tokens a second are those that it prints: of scoring, in which what a first search loads
    counts. The seconds of the whole command are those from its start to its end.
    """
    script = Path(sysconfig.get_path("scripts")) / "fairseq-eval-lm"
    start = time.perf_counter()
    output, peak_bytes = run([script, data, *flags, *QUIET], loglevel="INFO")
    whole_s = time.perf_counter() - start
    tokens, tokens_per_s = re.search(
        r"Evaluated ([\d,]+) tokens in [\d.]+s \(([\d.]+) tokens/s\)", output
    ).groups()
    return {
        "tokens": int(tokens.replace(",", "")),
        "tokens_per_s": float(tokens_per_s),
        "whole_s": whole_s,
        "perplexity": float(re.search(r"Perplexity: ([\d.]+)", output).group(1)),
        "peak_bytes": peak_bytes,
    }


def build_apart(data, datastore, flags):
    """``timed_build`` in a process of its own, with its peak of resident memory."""
    words = [data, "--knn-datastore", datastore, *flags, *QUIET]
    output, peak_bytes = run([sys.executable, Path(__file__).resolve(), *words])
    return {**json.loads(output.splitlines()[-1]), "peak_bytes": peak_bytes}


def timed_build(words):
    """Run fairseq-knnlm-build in this process.

    The dump lasts from the task being asked for the text to the index being begun: loading data,
    forward passes, and writing keys and values included, loading the model not.

    Args:
        words (list of str): its command line.

    Returns:
        dict: ``dump_s`` and ``index_s``, seconds.
    """
    times = {}

    def noting(name, function):
        def noted(*arguments, **named):
            times[f"{name} begun"] = time.perf_counter()
            result = function(*arguments, **named)
            times[f"{name} ended"] = time.perf_counter()
            return result

        return noted

    with contextlib.ExitStack() as stack:
        for owner, name in ((KNNLMTask, "chunk_iterator"), (building, "build_index")):
            noted = noting(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, noted))
        build.main([str(word) for word in words])
    return {
        "dump_s": times["build_index begun"] - times["chunk_iterator begun"],
        "index_s": times["build_index ended"] - times["build_index begun"],
    }


if __name__ == "__main__":
    print(json.dumps(timed_build(sys.argv[1:])))
