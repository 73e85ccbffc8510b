#!/usr/bin/env python3
"""Peak memory and time of fairseq-knnlm-build against the size of the text.

    python examples/benchmark/memory.py DATA --path CKPT --tokens-per-sample 256 --cpu

Builds a datastore of the first quarter of the train split and one of all of it, each in a process
of its own, and prints entries, seconds, the peak of the resident memory and the size of the index,
which is held in memory while it is built. All other flags are handed to fairseq-knnlm-build.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
from parts import write_part


def measure(data, datastore, flags):
    """Seconds and peak resident bytes of one build."""
    command = [Path(sysconfig.get_path("scripts")) / "fairseq-knnlm-build", data, *flags]
    start = time.monotonic()
    process = subprocess.Popen([*command, "--knn-datastore", datastore], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"memory.py: {command[0].name} failed on {data}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="made by fairseq-preprocess")
    args, flags = parser.parse_known_args()
    print(f"{'entries':>12}{'seconds':>10}{'peak MiB':>10}{'index MiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for share in (0.25, 1.0):
            data, datastore = Path(folder) / f"data-{share}", Path(folder) / f"datastore-{share}"
            write_part(args.data, data, share=share)
            seconds, peak = measure(data, datastore, flags)
            index = (datastore / "index.faiss").stat().st_size
            entries = len(np.load(datastore / "values.npy", mmap_mode="r"))
            print(f"{entries:>12,}{seconds:>10.0f}{peak >> 20:>10,}{index >> 20:>11,}", flush=True)


if __name__ == "__main__":
    main()
