"""Kinds of FAISS index over the same keys: what they cost and what they find."""

import os
import shutil
import time

from datastores import once
from quality import Judge, exhaustive_neighbors, exhaustive_search
from straightforward import straightforward_factory, sub_quantizers
from timing import Stopwatch, interleaved, median, was_held_up

from fairseq_knnlm.datastore.datastore import Datastore
from fairseq_knnlm.search.exact_search import ExactSearch
from fairseq_knnlm.search.index_build import build_index, load
from fairseq_knnlm.search.index_search import IndexSearch

# A search that takes longer is not repeated.
LONG_S = 10.0


def default_types(datastore, factory):
    """The kinds to compare: exhaustive, IVF with codes of several kinds, and *factory*."""
    nlist = datastore.manifest["index"]["nlist"] or max(1, round(len(datastore) ** 0.5))
    m = sub_quantizers(datastore.dimension, 64)
    fast = sub_quantizers(datastore.dimension, 128)
    types = [
        "Flat",
        f"IVF{nlist},Flat",
        f"IVF{nlist},SQfp16",
        f"IVF{nlist},SQ8",
        f"IVF{nlist},PQ{m}",
        f"OPQ{m},IVF{nlist},PQ{m}",
        f"IVF{nlist},PQ{fast}x4fs",
        f"IVF{nlist},RaBitQ",
        f"IVF{nlist},RaBitQfs",
    ]
    return list(dict.fromkeys([*types, factory]))


def compare_types(types, row, queries, mixture, settings, work, log):
    """Search the keys of one datastore through an index of each type.

    Returns:
        list of dict: a row for each type, k and kind of distances.
    """
    datastore, ks = Datastore.open(row["path"]), sorted({min(settings.k), max(settings.k)})
    queries = queries.first(settings.index_queries)
    ids = exhaustive_search(datastore, queries.keys.device).search(queries.keys, max(ks)).ids
    reference = exhaustive_neighbors(queries.keys, ids, datastore)
    judge = Judge(queries, datastore, mixture, reference)
    rows = []
    for factory in types:
        log(f"index {factory}")
        folder = work / f"types-{row['share']:g}"
        figures = make_type(datastore, factory, folder)
        path = index_path(folder, factory)
        found = _compare(
            datastore, path, queries.keys, ks, settings.knn_nprobe, settings.repeats, judge
        )
        rows += [{**figures, **part, "entries": len(datastore)} for part in found]
    return rows


def build_straightforward_index(row, work):
    """The index of the straightforward method, of the datastore of a row.

    Returns:
        tuple: its path, and its figures.
    """
    datastore = Datastore.open(row["path"])
    folder = work / f"types-{row['share']:g}"
    factory = straightforward_factory(datastore)
    return str(index_path(folder, factory)), make_type(datastore, factory, folder)


def make_type(datastore, factory, folder):
    """Build an index in *folder* unless it is there; gives its figures."""
    folder.mkdir(exist_ok=True)
    path = index_path(folder, factory)
    return once(
        path.with_suffix(".json"),
        lambda: {"factory": factory, **_build(datastore, factory, folder)},
    )


def index_path(folder, factory):
    """Where an index of this kind lies, or will lie."""
    return folder / f"{factory.replace(',', '_')}.faiss"


def _build(datastore, factory, folder):
    """Build an index of the keys of *datastore* in *folder*, a Path.

    Returns:
        dict: ``build_s`` and ``bytes_per_entry``.
    """
    path = index_path(folder, factory)
    work_path = path.with_suffix(".work")
    start = time.perf_counter()
    build_index(
        datastore.keys,
        factory,
        datastore.manifest["metric"],
        str(path),
        str(work_path),
        report=lambda line: None,
    )
    seconds = time.perf_counter() - start
    shutil.rmtree(work_path)
    return {
        "build_s": seconds,
        "bytes_per_entry": os.path.getsize(path) / len(datastore),
    }


def _compare(datastore, path, queries, ks, nprobe, repeats, judge):
    """Search one index for 8, 1024, ... neighbours, with its own and with exact distances.

    Args:
        queries (Tensor): shape (N, D).
        ks (list of int): neighbours per query.
        judge (Judge): of these queries.

    Returns:
        list of dict: a row for each k and kind of distances.
    """
    keys, values, metric = datastore.keys, datastore.values, datastore.manifest["metric"]
    searched = {"index": load(str(path)), "nprobe": nprobe}
    indexes = {
        "index": IndexSearch(None, values, metric, **searched),
        "exact": ExactSearch(keys, values, metric, **searched),
    }
    settings = [(k, distances) for k in ks for distances in indexes]
    rows, searches = [], {}
    for k, distances in settings:
        figures = judge(indexes[distances].search(queries, k))  # warms up as well
        rows.append({"k": k, "distances": distances, **figures})
        searches[k, distances] = _search(indexes[distances], queries, k)
    runs = interleaved(searches, repeats, long_s=LONG_S)
    for row, setting in zip(rows, settings):
        seconds = median(runs[setting], "seconds")
        row.update(queries_per_s=len(queries) / seconds, runs=len(runs[setting]))
        row["held_up"] = was_held_up(runs[setting])
    return rows


def _search(index, queries, k):
    def search():
        stopwatch = Stopwatch()
        index.search(queries, k)
        return stopwatch.read()

    return search
