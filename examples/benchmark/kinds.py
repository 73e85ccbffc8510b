#!/usr/bin/env python3
"""Exact search on kinds of CPU, which this one imitates by leaving out instructions.

    python examples/benchmark/kinds.py DATASTORE QUERIES.npy --k 1024

is one kind, in a process of its own: what the environment leaves out is read when libraries are
loaded. ``compare_kinds`` starts one for each.
"""

import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from processes import run
from timing import Stopwatch, interleaved, median

from fairseq_knnlm.datastore.datastore import Datastore
from fairseq_knnlm.search import product_type
from fairseq_knnlm.search.exact_search import KEYS_PER_QUERY
from fairseq_knnlm.search.product_type import FORCED, TYPES, usable_types
from fairseq_knnlm.search.retriever import Retriever

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "FAISS_OPT_LEVEL": "avx2"}
# Name, flag of /proc/cpuinfo, and what leaves out all that later kinds have.
KINDS = (
    ("AVX2", "avx2", {**AVX2, "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    ("AVX-512", "avx512f", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    ("with VNNI", "avx512_vnni", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
    ("with bfloat16", "avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    ("with AMX", "amx_tile", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}),
    ("as it is", None, {}),
)


def compare_kinds(names, datastore, queries, k, repeats, work):
    """Search with every type of products on kinds of CPU.

    Args:
        names (list of str): of the kinds; those that this CPU cannot imitate are left out.
        datastore (str): its directory.
        queries (Tensor): shape (N, D).
        k (int): neighbours.
        repeats (int): searches, of which the median counts.
        work (Path): a folder.

    Returns:
        list of dict: a row for each kind.
    """
    file = work / "queries.npy"
    np.save(file, queries.float().cpu().numpy())
    words = [sys.executable, Path(__file__).resolve(), datastore, file]
    words += ["--k", k, "--repeats", repeats]
    rows = []
    for name, flag, masks in KINDS:
        if name in names and (flag is None or flag in _cpu_flags()):
            output, _ = run(words, environment=masks)
            rows.append({"kind": name, "k": k, **json.loads(output.splitlines()[-1])})
    return rows


def _cpu_flags():
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(text.partition("flags")[2].partition("\n")[0].split())


def measure(datastore, queries, k, repeats):
    """What a search takes with each type of products, and which is chosen where none is forced.

    Seconds are those of the processor, of all cores together: other programs lengthen them little.
    """
    # So many queries that lists are visited.
    copies = -(-len(Datastore.open(datastore)) // (KEYS_PER_QUERY * len(queries)))
    queries = torch.from_numpy(queries).repeat(copies, 1)
    searches = {name: _search(datastore, queries, k, name) for name in usable_types()}
    runs = interleaved(searches, repeats)
    seconds = {name: median(of_name, "cpu_s") for name, of_name in runs.items()}
    chosen = _chosen(datastore, queries, k)
    return {
        "queries": len(queries),
        "chosen": chosen,
        **{f"{name}_cpu_s": seconds.get(name) for name in TYPES},
        "of_best": None if chosen is None else min(seconds.values()) / seconds[chosen],
    }


def _search(datastore, queries, k, name):
    """A measurement of a search with products of one type, which has been made once before."""
    retriever = Retriever.open([datastore], k=k)

    def search():
        stopwatch = Stopwatch()
        for _ in retriever.batches(queries):
            pass
        return stopwatch.read()

    os.environ[FORCED] = name
    search()
    del os.environ[FORCED]
    return search


def _chosen(datastore, queries, k):
    """The type that a search says it has chosen; None where its index has no lists."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    product_type.logger.addHandler(handler)
    product_type.logger.setLevel(logging.INFO)
    next(iter(Retriever.open([datastore], k=k).batches(queries)))
    return re.match(r"products in (\w+):", said[0])[1] if said else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datastore", metavar="DATASTORE")
    parser.add_argument("queries", metavar="QUERIES.npy")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(args.datastore, np.load(args.queries), args.k, args.repeats)))


if __name__ == "__main__":
    main()
