"""``fairseq-knnlm-info``: what is in a datastore; ``--verify`` reads it all and checks it."""

import argparse
import sys
from collections.abc import Iterator

from ..datastore.datastore import Datastore
from ..datastore.manifest import INDEX, refuse_part
from ..datastore.tuned import in_words, read_gate, read_tuned
from ..errors import UserError
from ..files import refuse_unwritable
from ..gating.store import from_bytes
from ..plugin.results import description, write_results
from ..scoring.tuned_settings import settings_of_tuned
from ..units import in_bytes
from .command_line import USER_DIR, ending_with_text


def make_parser():
    """The parser of this command; it takes none of fairseq's flags."""
    parser = argparse.ArgumentParser(
        description="Print what a datastore holds and what it was built with."
    )
    parser.add_argument("datastore", metavar="DIR", nargs="?", help="datastore directory")
    parser.add_argument(
        "--verify", action="store_true", help="read every byte and compare it with its checksum"
    )
    parser.add_argument(
        "--knn-output", metavar="FILE", help="write what it holds there as well, as JSON"
    )
    parser.add_argument(
        "--user-dir",
        action="store_true",
        help="print only where this plugin is installed: what fairseq's own commands take as "
        "--user-dir",
    )
    return parser


def main(argv=None):
    """Entry point of ``fairseq-knnlm-info``."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.user_dir:
        print(USER_DIR)
        return
    if args.datastore is None:
        parser.error("DIR is missing: which datastore?")
    with ending_with_text():
        run(args)


def run(args):
    """Print what the datastore holds, and with ``--verify`` what of it is damaged.

    Raises:
        UserError: if it is no whole datastore, or damaged, or what was tuned with it cannot be
            used; after all that can be said of it is printed.
    """
    if args.knn_output is not None:
        refuse_unwritable("--knn-output", args.knn_output)
        refuse_part("--knn-output", args.knn_output)
    datastore = Datastore.open(args.datastore)
    print("\n".join(describe(datastore)))
    faults = []
    try:
        print("".join(f"{line}\n" for line in describe_tuned(datastore)), end="")
    except UserError as error:
        print("tuned        what is stored cannot be used")
        faults.append(str(error))
    if args.verify:
        print("reading every byte ...", flush=True)
        damage = list(damages(datastore))
        for line in damage:
            print(f"{args.datastore}/{line}", file=sys.stderr)
        if damage:
            faults.append(f"{args.datastore} is damaged; build it again")
        else:
            print("verified: every byte is as the manifest says, and so is the kind of the index")
    if faults:
        raise UserError("; ".join(faults))
    if args.knn_output is not None:
        write_results(args.knn_output, _results(datastore, args.verify))


def _results(datastore: Datastore, verified: bool) -> dict:
    """What ``--knn-output`` of every command has, of a datastore."""
    described = description(datastore)
    return {
        "program": "fairseq-knnlm-info",
        "tokens": described["entries"],
        **{name: described[name] for name in ("model", "data", "context", "versions")},
        "datastores": [described],
        "tuned": read_tuned(datastore.path),
        "verified": verified,
    }


def damages(datastore: Datastore) -> Iterator[str]:
    """Read everything; yield one line for each part that is not as the manifest says."""
    damaged = False
    for damaged in datastore.verify():
        yield damaged
    if not damaged:  # FAISS reads no damaged file
        # Imported here, because all else needs no FAISS.
        from ..search.index_build import load
        from ..search.index_check import index_faults

        for fault in index_faults(load(datastore.index_path), datastore.manifest):
            yield f"{INDEX}: {fault}"


def describe(datastore: Datastore) -> Iterator[str]:
    """Lines that a person understands; none for what the builder left out of the manifest."""
    manifest = datastore.manifest
    index, size = manifest["index"], sum(each["size_bytes"] for each in manifest["files"].values())
    yield f"datastore    {datastore.path}"
    yield f"entries      {len(datastore):,} of {datastore.dimension} dimensions"
    yield f"size         {in_bytes(size)}, {size / max(len(datastore), 1):,.0f} bytes an entry"
    if "key" in manifest:
        key = manifest["key"]
        yield f"key          {key['type']} of layer {key['layer']}, metric {index['metric']}"
    yield f"index        {index['factory']} (FAISS {index['faiss_version']})"
    yield from _describe_text(manifest)
    if "temperature" in manifest:
        yield f"temperature  {manifest['temperature']['value']:g} to start with"
    if "dictionary" in manifest:
        yield f"dictionary   {manifest['dictionary']['types']:,} types"
    if "model" in manifest:
        model = manifest["model"]
        yield f"model        {model['parameters']:,} parameters, sha256 {model['sha256'][:12]}"
    if "versions" in manifest:
        yield "versions     " + ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())


def _describe_text(manifest: dict) -> Iterator[str]:
    parts = []
    data, context = manifest.get("data", {}), manifest.get("context", {})
    if "split" in data:
        parts.append(f"split {data['split']}")
    if {"tokens_per_sample", "context_window", "sample_break_mode"} <= set(context):
        parts.append(
            f"blocks of {context['tokens_per_sample'] - context['context_window']} tokens with "
            f"{context['context_window']} of context, break mode {context['sample_break_mode']}"
        )
    if parts:
        yield "text         " + ", ".join(parts)


def describe_tuned(datastore: Datastore) -> Iterator[str]:
    """A line on what ``fairseq-knnlm-tune`` stored; none where nothing is.

    Raises:
        UserError: if it cannot be used.
    """
    tuned = read_tuned(datastore.path)
    if tuned is None:
        return
    if datastore.manifest["checksum"] not in tuned["datastores"]:
        yield "tuned        no: what is stored was tuned before the datastore was built again"
        return
    # Both refuse what cannot be used.
    settings_of_tuned(tuned, datastore.path)
    gate = read_gate(datastore.path, tuned)
    if gate is not None:
        from_bytes(gate)
    others = len(tuned["datastores"]) - 1
    yield f"tuned        {in_words(tuned)}" + (
        f", with {others} other datastores" if others else ""
    )
