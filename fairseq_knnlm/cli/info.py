"""``fairseq-knnlm-info``: what is in a datastore; ``--verify`` reads it all and checks it."""

import argparse
import sys

from ..datastore.datastore import Datastore
from ..datastore.tuned import in_words, read_tuned
from ..errors import UserError
from ..files import refuse_unwritable
from ..plugin.results import description, write_results
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
        UserError: if it is no whole datastore, or damaged.
    """
    if args.knn_output is not None:
        refuse_unwritable("--knn-output", args.knn_output)
    datastore = Datastore.open(args.datastore)
    print("\n".join(describe(datastore)))
    if args.verify:
        print("reading every byte ...", flush=True)
        faults = list(datastore.verify())
        for fault in faults:
            print(f"{args.datastore}/{fault}", file=sys.stderr)
        if faults:
            raise UserError(f"{args.datastore} is damaged; build it again")
        print("verified: every byte is as it was written")
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


def describe(datastore: Datastore):
    """Lines that a person understands."""
    manifest = datastore.manifest
    context, index, key = manifest["context"], manifest["index"], manifest["key"]
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    yield f"datastore    {datastore.path}"
    yield f"entries      {len(datastore):,} of {datastore.dimension} dimensions"
    yield f"size         {in_bytes(size)}, {size / len(datastore):,.0f} bytes an entry"
    yield f"key          {key['type']} of layer {key['layer']}, metric {manifest['metric']}"
    yield f"index        {index['factory']} (FAISS {index['faiss_version']})"
    yield (
        f"text         split {manifest['data']['split']}, blocks of "
        f"{context['tokens_per_sample'] - context['context_window']} tokens with "
        f"{context['context_window']} of context, break mode {context['sample_break_mode']}"
    )
    if "temperature" in manifest:
        yield f"temperature  {manifest['temperature']['value']:g} to start with"
    tuned = read_tuned(datastore.path)
    if tuned is not None:
        yield _describe_tuned(tuned, manifest)
    yield f"dictionary   {manifest['dictionary']['types']:,} types"
    yield (
        f"model        {manifest['model']['parameters']:,} parameters, sha256 "
        f"{manifest['model']['sha256'][:12]}"
    )
    yield "versions     " + ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())


def _describe_tuned(tuned: dict, manifest: dict) -> str:
    if manifest["checksum"] not in tuned["datastores"]:
        return "tuned        no: what is stored was tuned before the datastore was built again"
    others = len(tuned["datastores"]) - 1
    return f"tuned        {in_words(tuned)}" + (
        f", with {others} other datastores" if others else ""
    )
