"""``fairseq-knnlm-inspect``: which memories spoke, for each token of a passage."""

import json
import logging
import os
import re
import sys

from fairseq.tokenizer import tokenize_line

from .. import inspection_html, inspection_text
from ..context import only_rows
from ..datastore import write_atomically
from ..errors import UserError
from ..inspection import Inspection, Inspector
from ..scorer import encode_and_search
from . import common
from .passage import SomeBlocks, loaded_text, read_lines

logger = logging.getLogger("fairseq_knnlm.inspect")


def make_parser():
    """The parser of this command."""
    parser = common.make_parser(
        "Print for each token of a passage (--input, or --positions of --gen-subset) its "
        "probability by the language model, by the neighbours and by both, and its nearest "
        "neighbours with the text around them. Their documents are what empty lines separate.",
        gen_subset="valid",
    )
    parser.add_argument(
        "--input",
        dest="passage",  # fairseq has a setting named input, of fairseq-interactive
        metavar="FILE",
        help="text to look at, UTF-8; '-' is standard input. Tokenised as the training text was; "
        "raw text needs the --tokenizer and --bpe of the training text",
    )
    parser.add_argument(
        "--positions",
        metavar="START:STOP",
        help="tokens of --gen-subset to look at, counted from 0 in corpus order, </s> included; "
        "STOP is not among them",
    )
    parser.add_argument(
        "--knn-show-neighbors",
        metavar="N",
        type=int,
        default=3,
        help="nearest neighbours to show of the --knn-k that are found, >= 1 (default: 3); beside "
        "them the nearest that has the token itself",
    )
    parser.add_argument(
        "--window",
        metavar="N",
        type=int,
        default=8,
        help="tokens to show on either side of a neighbour, >= 0 (default: 8)",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write one page to read in a browser; it needs no network"
    )
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")
    return parser


def main(argv=None):
    """Entry point of ``fairseq-knnlm-inspect``."""
    common.run(make_parser(), run, argv)


def run(cfg, args):
    """Look at a passage; write and print what is found."""
    span = _check(cfg, args)
    lines = read_lines(args.passage) if args.passage else None
    task, model = common.load_task_and_model(cfg)
    if task.settings.cache_size:
        raise UserError(
            "fairseq_knnlm: fairseq-knnlm-inspect shows neighbours, no continuous cache: give k, "
            "lambda and temperature as flags, without --knn-cache-size and --knn-tuned"
        )
    if lines is None:
        dataset = common.load_split(task, cfg, cfg.dataset.gen_subset)
        _refuse_beyond(span, int(dataset.sizes.sum()), cfg.dataset.gen_subset)
        source = f"{cfg.dataset.gen_subset} {args.positions}"
        inspection = _inspect(cfg, args, task, model, source, dataset, span)
    else:
        name = "standard input" if args.passage == "-" else args.passage
        with loaded_text(task, lines, name, _word_splitter(cfg, task)) as (dataset, words):
            span = (0, len(words))
            inspection = _inspect(cfg, args, task, model, name, dataset, span, words)
    if args.html:
        write_atomically(args.html, inspection_html.render(inspection).encode())
    if args.json:
        write_atomically(args.json, json.dumps(inspection.to_dict(), indent=1).encode())
    _print(inspection_text.render(inspection, _wants_color(sys.stdout, os.environ)))


# -- what was asked for ------------------------------------------------------------------------


def _check(cfg, args):
    """Refuse what can be known to be wrong before any work.

    Returns:
        tuple of int: first token and the one after the last; None for a text.
    """
    if cfg.distributed_training.distributed_world_size > 1:
        raise UserError("fairseq_knnlm: fairseq-knnlm-inspect runs in one process")
    common.require_datastore(cfg)
    if (args.passage is None) == (args.positions is None):
        raise UserError(
            "fairseq_knnlm: which text? Expected either --input FILE or --positions START:STOP (of "
            f"--gen-subset), got {'both' if args.passage else 'neither'}"
        )
    if args.passage is not None and cfg.task.shorten_method != "none":
        raise UserError(
            f"fairseq_knnlm: --shorten-method {cfg.task.shorten_method} would cut the text of "
            "--input: drop it"
        )
    for flag, value, least in (
        ("--knn-show-neighbors", args.knn_show_neighbors, 1),
        ("--window", args.window, 0),
    ):
        if value < least:
            raise UserError(f"fairseq_knnlm: {flag} must be >= {least}, got {value}")
    for flag, path in (("--html", args.html), ("--json", args.json)):
        if path is not None:
            common.refuse_unwritable(flag, path)
    return None if args.positions is None else _parse_positions(args.positions)


def _parse_positions(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    start, stop = map(int, found.groups()) if found else (0, 0)
    if start >= stop:
        raise UserError(
            "fairseq_knnlm: --positions must be START:STOP, two numbers with 0 <= START < STOP, "
            f"got {text!r}"
        )
    return start, stop


def _refuse_beyond(span, size: int, split: str) -> None:
    if span[1] > size:
        raise UserError(
            f"fairseq_knnlm: --positions {span[0]}:{span[1]} reaches beyond the end of the split "
            f"{split!r}, which has {size} target tokens"
        )


def _word_splitter(cfg, task):
    tokenizer, bpe = task.build_tokenizer(cfg.tokenizer), task.build_bpe(cfg.bpe)

    def split_words(line):
        for step in (tokenizer, bpe):
            line = step.encode(line) if step is not None else line
        return tokenize_line(line)

    return split_words


# -- looking -----------------------------------------------------------------------------------


def _inspect(cfg, args, task, model, source, dataset, span, words=None) -> Inspection:
    scorer, retriever = task.make_scorer(), task.retriever
    inspector = Inspector(
        retriever.datastores,
        task.target_dictionary,
        scorer.knn_lambda,
        scorer.temperature,
        args.knn_show_neighbors,
        args.window,
    )
    tokens = []
    for first, sample in _samples(cfg, task, model, dataset, *span):
        encoded, found = encode_and_search(model, sample, retriever, cfg.eval_lm.softmax_batch)
        written = words[first : first + sample["ntokens"]] if words else None
        tokens += inspector.tokens(first, sample["target"], encoded.log_p_lm, found, written)
    settings = {
        "checkpoint": cfg.common_eval.path,
        "datastore": cfg.task.knn_datastore,
        "k": retriever.k,
        "lambda": scorer.knn_lambda,
        "temperature": scorer.temperature,
        "metric": retriever.datastores[0].manifest["metric"],
    }
    return Inspection(source, settings, tokens)


def _samples(cfg, task, model, dataset, start: int, stop: int):
    """The target tokens from *start* to *stop*, with the position of the first of each sample."""
    blocks = SomeBlocks(dataset, start, stop, cfg.eval_lm.context_window)
    samples = common.evaluation_samples(cfg, task, model, blocks)
    device = next(model.parameters()).device
    after = blocks.first
    for sample in common.with_progress(cfg, samples, prefix="inspect"):
        before, after = after, after + sample["ntokens"]
        first, last = max(start, before), min(stop, after)
        if first < last:
            wanted = only_rows(sample, first - before, last - before)
            yield first, common.to_device(wanted, device)


# -- telling -----------------------------------------------------------------------------------


def _wants_color(stream, environment) -> bool:
    """Whether a terminal reads it that wants colours (https://no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def _print(lines) -> None:
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # a pager that was left; Python would complain again at its own end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
