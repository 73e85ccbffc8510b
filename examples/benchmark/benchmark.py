#!/usr/bin/env python3
"""What kNN evaluation costs and how good it is, beside other ways to it, in one run.

    python examples/benchmark/benchmark.py DATA --path CKPT --tokens-per-sample 256 \\
        --max-tokens 2048 --cpu --json benchmark.json --plot benchmark.png

Builds datastores of the train split and of its first quarter and sixteenth, and measures, on the
same text and in turns: stock fairseq-eval-lm, the bare forward pass and the dump; the scorer of
fairseq-eval-lm --task knnlm_lm; the straightforward method; exhaustive search, the reference of
perplexity, recall@k and mass recall; and kinds of FAISS index over the same keys. All other flags
are handed to fairseq-eval-lm and fairseq-knnlm-build.

Whole commands are fresh processes, of which everything counts. In all other measurements loading
models and indexes is not counted, and each follows one that is not counted, except in stock
fairseq-eval-lm, whose own figure is taken.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

# before fairseq configures logging: what is printed is the tables
os.environ["LOGLEVEL"] = "WARNING"

import fairseq  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from datastores import make_datastores  # noqa: E402
from evaluation import Evaluation  # noqa: E402
from floor import measure_commands, measure_floor  # noqa: E402
from generation import measure_generation  # noqa: E402
from index_types import build_straightforward_index, compare_types, default_types  # noqa: E402
from kinds import KINDS, compare_kinds  # noqa: E402
from methods import Methods  # noqa: E402
from parts import write_part  # noqa: E402
from quality import Mixture  # noqa: E402
from tables import lines, plot  # noqa: E402
from timing import LEAST_CPU  # noqa: E402

import fairseq_knnlm  # noqa: E402
from fairseq_knnlm.cli.command_line import configure_logging  # noqa: E402
from fairseq_knnlm.datastore.datastore import Datastore  # noqa: E402
from fairseq_knnlm.probability.metrics import perplexity  # noqa: E402
from fairseq_knnlm.search.faiss_import import faiss_version  # noqa: E402

STARTED = time.monotonic()


def make_parser():
    """Our own flags; all others are fairseq's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="made by fairseq-preprocess")
    add("--gen-subset", default="valid", metavar="SPLIT", help="what is evaluated (valid)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, metavar="FILE.png", help="draw them there")
    add("--work", type=Path, metavar="DIR", help="keep what is built there, for another run "
        "(default: nowhere)")  # fmt: skip
    add("--knn-datastore", type=Path, metavar="DIR", help="of all of train, there already "
        "(default: build it)")  # fmt: skip
    add("--knn-index", metavar="FACTORY", help="of the datastores that are built")
    add("--knn-nprobe", type=int, default=32)
    add("--knn-lambda", type=float, default=0.3)
    add("--knn-temperature", type=float, default=10.0)
    add("--knn-device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--k", type=int, nargs="+", default=[8, 64, 1024], help="(8 64 1024)")
    add("--cache-sizes", type=int, nargs="*", default=[500, 2000, 4000],
        help="of a continuous cache without neighbours (500 2000 4000)")  # fmt: skip
    add("--shares", type=float, nargs="+", default=[1, 1 / 4, 1 / 16],
        help="parts of train that are datastores (1 0.25 0.0625)")  # fmt: skip
    add("--tokens", type=int, default=1 << 14, help="kNN evaluation is timed on (16384)")
    add("--floor-tokens", type=int, default=300_000, help="the model alone and the dump are timed "
        "on, the text repeated if it is shorter (300000)")  # fmt: skip
    add("--queries", type=int, default=1 << 12, help="quality is measured on (4096)")
    add("--straightforward-tokens", type=int, default=1 << 11, help="(2048)")
    add("--repeats", type=int, default=3, help="measurements, of which the median counts (3)")
    add("--generated", type=int, default=48, help="tokens generated behind a prompt (48)")
    kinds = [name for name, _, _ in KINDS]
    add("--kinds", nargs="*", choices=kinds, default=kinds, metavar="KIND", help="of CPU, imitated "
        f"by this one: {', '.join(kinds)} (all)")  # fmt: skip
    add("--index-types", nargs="+", metavar="FACTORY", help="(flat and IVF of several kinds)")
    add("--index-share", type=float, help="the one of --shares whose keys are indexed in every "
        "way (the second largest)")  # fmt: skip
    add("--index-queries", type=int, default=1 << 11, help="(2048)")
    add("--skip-index-types", action="store_true")
    return parser


def parse(argv=None):
    """Our settings and fairseq's flags; exits where they cannot be."""
    parser = make_parser()
    settings, flags = parser.parse_known_args(argv)
    settings.k, settings.shares = sorted(set(settings.k)), sorted(set(settings.shares))[::-1]
    if settings.index_share is None:
        settings.index_share = settings.shares[min(1, len(settings.shares) - 1)]
    if not all(0 < share <= 1 for share in settings.shares):
        parser.error(f"--shares must be in (0, 1], got {settings.shares}")
    if settings.index_share not in settings.shares:
        parser.error(f"--index-share must be one of --shares, got {settings.index_share}")
    if settings.knn_datastore and 1 not in settings.shares:
        parser.error(f"--knn-datastore is of all of train: --shares needs 1, got {settings.shares}")
    settings.tokens = max(settings.tokens, settings.queries)
    return settings, flags


def measure(settings, flags, work):
    """All figures, in a dictionary."""
    split = settings.gen_subset
    knn_flags = [
        "--knn-lambda", settings.knn_lambda, "--knn-temperature", settings.knn_temperature,
        "--knn-nprobe", settings.knn_nprobe, "--knn-device", settings.knn_device,
    ]  # fmt: skip
    log("datastores")
    build_flags = [*flags, *(["--knn-index", settings.knn_index] if settings.knn_index else [])]
    datastores = make_datastores(
        settings.data, settings.knn_datastore, settings.shares, build_flags, work
    )
    with tempfile.TemporaryDirectory(dir=work) as folder:
        part = Path(folder) / "evaluated"
        write_part(settings.data, part, split=split, tokens=settings.tokens)
        # first, while this process is small: its children begin as copies of it
        log("whole commands")
        commands = measure_commands(
            part, split, flags, knn_flags, datastores[0]["path"], settings.k, settings.repeats
        )
        log("the model alone")
        long = Path(folder) / "long"
        write_part(settings.data, long, split=split, at_least=settings.floor_tokens)
        floor = measure_floor(long, split, flags, Path(folder), settings.repeats)
        evaluation = Evaluation(part, split, [*flags, *knn_flags])
        methods, queries = _measure_methods(evaluation, datastores, settings, work)
        log("kinds of CPU")
        searched = datastores[0]["path"], queries.keys, settings.k[-1]
        kinds = compare_kinds(settings.kinds, *searched, settings.repeats, Path(folder))
        log("generation")
        generation = measure_generation(evaluation, datastores[0], settings)
    types = []
    if not settings.skip_index_types:
        (row,) = (row for row in datastores if row["share"] == settings.index_share)
        factories = settings.index_types or default_types(
            Datastore.open(row["path"]), row["factory"]
        )
        mixture = Mixture(settings.knn_lambda, settings.knn_temperature)
        types = compare_types(factories, row, queries, mixture, settings, work, log)
    speed = {row["name"]: row["tokens_per_s"] for row in floor}
    for row in methods:
        if "tokens_per_s" in row:
            row["of_stock"] = row["tokens_per_s"] / speed["stock"]
    return {
        "settings": {**vars(settings), "flags": flags},
        "machine": machine(),
        "versions": versions(),
        "quality": {
            "tokens": len(queries.targets),
            "base_perplexity": perplexity(queries.log_p_lm.cpu()),
        },
        "floor": floor,
        "datastores": datastores,
        "commands": commands,
        "methods": methods,
        "kinds": kinds,
        "generation": generation,
        "growth": growth(methods),
        "ratios": ratios(floor, methods),
        "index_types": types,
    }


def _measure_methods(evaluation, datastores, settings, work):
    mixture = Mixture(settings.knn_lambda, settings.knn_temperature)
    rows = []
    for datastore in datastores:
        log(f"methods, {datastore['entries']:,} entries")
        path, figures = build_straightforward_index(datastore, work)
        datastore["straightforward_index"] = figures
        methods = Methods(evaluation, datastore, settings, mixture)
        rows += methods.measure(path)
    return rows, methods.queries


def growth(methods):
    """How much longer a token takes with the most entries than with the fewest."""
    by_method = {}
    for row in methods:
        if "tokens_per_s" in row and row["k"]:
            name = row["method"], row["k"], row["distances"]
            by_method.setdefault(name, []).append(row)
    return [
        {
            **dict(zip(("method", "k", "distances"), name)),
            "entries": rows[0]["entries"] / rows[-1]["entries"],
            "time": rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"],
            "knn_time": _growth_of_knn(rows),
            "held_up": any(row["held_up"] for row in rows),
        }
        for name, rows in by_method.items()
        if len(rows) > 1
    ]


def _growth_of_knn(rows):
    """The same beyond the language model alone; None where that is lost in noise."""
    longest, shortest = (rows[number]["knn_us_per_token"] for number in (0, -1))
    return longest / shortest if min(longest, shortest) > 0 else None


def ratios(floor, methods):
    """The ratios that are watched, on the largest datastore."""
    entries = max(row["entries"] for row in methods)
    timed = [row for row in methods if row["entries"] == entries and "tokens_per_s" in row]
    ours = [row for row in timed if row["method"] == "fairseq_knnlm"]
    by_name = {row["name"]: row for row in floor}
    by_name.update((row["method"], row) for row in timed)
    stock, dump = by_name["stock"], by_name["dump"]
    pairs = [
        ("dump / bare forward", dump, by_name["bare forward"]),
        ("dump / stock fairseq-eval-lm", dump, stock),
    ]
    for row in ours:
        name = f"k={row['k']}, {row['distances']} distances"
        pairs.append((f"{name} / stock fairseq-eval-lm", row, stock))
        if row["k"] == max(row["k"] for row in ours) and row["distances"] == "exact":
            for method in ("straightforward", "exhaustive"):
                pairs.append((f"{name} / {method}", row, by_name[method]))
    return [
        {
            "name": name,
            "value": first["tokens_per_s"] / second["tokens_per_s"],
            "held_up": first.get("held_up", False) or second.get("held_up", False),
        }
        for name, first, second in pairs
    ]


def machine():
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }


def _cpu_model():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def versions():
    """Of everything that computes."""
    return {
        "fairseq_knnlm": fairseq_knnlm.__version__,
        "fairseq": fairseq.__version__,
        "torch": torch.__version__,
        "faiss": faiss_version(),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def log(line):
    """Tell on standard error what is being done."""
    print(f"[{time.monotonic() - STARTED:6.0f} s] {line}", file=sys.stderr, flush=True)


def main(argv=None):
    settings, flags = parse(argv)
    configure_logging()
    warnings.simplefilter("ignore")  # hydra and torch warn of how fairseq uses them
    with tempfile.TemporaryDirectory() as folder:
        work = settings.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        results = measure(settings, flags, work)
    results["seconds"] = time.monotonic() - STARTED
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=1, default=str) + "\n")
    if settings.plot:
        plot(results, settings.plot)
    print("\n".join(lines(results)))
    quality = results["quality"]
    print(
        f"\nperplexity of the language model alone {quality['base_perplexity']:.3f}; quality on "
        f"{quality['tokens']:,} tokens, against exhaustive search; {results['seconds']:.0f} s"
    )
    names = ("floor", "methods", "generation", "index_types")
    rows = [row for name in names for row in results[name]]
    held_up = sum(row.get("held_up", False) for row in rows)
    if held_up:
        print(
            f"{held_up} of {len(rows)} rows (*) got less than {LEAST_CPU} of a core: the machine "
            "was busy, or read from disk. Their times, and ratios to them, say nothing"
        )


if __name__ == "__main__":
    main()
