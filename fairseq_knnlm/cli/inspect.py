"""``fairseq-knnlm-inspect``: which memories spoke, for each token of a passage."""

import os
import re
import sys
from collections.abc import Iterator
from typing import Optional

import torch
from fairseq.tokenizer import tokenize_line

from ..encoding.encode import encode, refuse_not_finite
from ..encoding.key_extractor import extractor_of
from ..encoding.samples import only_rows, to_device
from ..errors import UserError
from ..files import refuse_unwritable_outputs, write_atomically, write_json
from ..gating.gated_search import looked, looks_before
from ..inspection import as_html, as_text
from ..inspection.tokens import GUESSES, Inspector, Passage, Token
from ..plugin.results import circumstances, write_results
from ..scoring.cache_reader import make_cache_reader
from ..scoring.settings import Settings
from ..scoring.words import Words, refuse_other_forms
from .command_line import (
    Outputs,
    context_settings,
    make_eval_parser,
    require_datastore,
    run_command,
    with_progress,
)
from .loading import evaluation_samples, load_split, load_task_and_model
from .passage import BlockRange, loaded_text, read_lines


def make_parser():
    """The parser of this command."""
    parser = make_eval_parser(
        "Print for each token of a passage (--input, or --positions of --gen-subset) its "
        "probability by the language model, by the neighbours, by a continuous cache where there "
        "is one and by all of them, and its nearest neighbours with the text around them. Their "
        "documents are what empty lines separate. Written to files (--html, --json), only a "
        "summary of it is printed.",
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
        "--html",
        metavar="FILE",
        help="write one page to read in a browser; it needs no network",
    )
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")
    return parser


def main(argv=None):
    """Entry point of ``fairseq-knnlm-inspect``."""
    run_command(make_parser(), run, argv)


def run(cfg, args):
    """Look at a passage; print and write what is known of it.

    Args:
        cfg: fairseq's configuration.
        args: the parsed flags.

    Raises:
        UserError: before any work, for what cannot be; or at the end, for what cannot be written.
    """
    span = _check(cfg, args)
    lines = read_lines(args.passage) if args.passage else None
    task, model, _ = load_task_and_model(cfg)
    task.log_settings(task.in_effect)
    settings = task.settings
    if lines is None:
        dataset = load_split(task, cfg.dataset.gen_subset)
        _refuse_beyond(span, int(dataset.sizes.sum()), cfg.dataset.gen_subset)
        source = f"{cfg.dataset.gen_subset} {args.positions}"
        tokens = _look(cfg, args, task, model, settings, dataset, span)
    else:
        source = "standard input" if args.passage == "-" else args.passage
        with loaded_text(task, lines, source, _word_splitter(cfg, task)) as (dataset, words):
            tokens = _look(cfg, args, task, model, settings, dataset, (0, len(words)), words)
    passage = Passage(
        source, _described(cfg, task, settings), tokens, len(task.retriever.datastores),
        with_cache=settings.cache_size > 0, words=_words(cfg, task, tokens),
        gated=task.gate is not None,
    )  # fmt: skip
    outputs = Outputs()
    with outputs.writing("to standard output"):
        _print(_lines(passage, [path for path in (args.html, args.json) if path]))
    if args.html:
        with outputs.writing(f"--html {args.html}"):
            write_atomically(args.html, as_html.render(passage).encode())
    if args.json:
        with outputs.writing(f"--json {args.json}"):
            write_json(args.json, passage.to_dict())
    if cfg.task.knn_output is not None:
        split = None if args.passage else cfg.dataset.gen_subset
        found_with = circumstances(task, task.in_effect, context_settings(cfg), split)
        with outputs.writing(f"--knn-output {cfg.task.knn_output}"):
            write_results(cfg.task.knn_output, {**_results(passage), **found_with})
    outputs.refuse_unwritten()


# -- what was asked for ------------------------------------------------------------------------


def _check(cfg, args) -> Optional[tuple[int, int]]:
    """Refuse what can be known to be wrong before any work.

    Returns:
        tuple of int: first token and the one after the last; None for a text.
    """
    if cfg.distributed_training.distributed_world_size > 1:
        raise UserError("fairseq-knnlm-inspect runs in one process")
    require_datastore(cfg)
    if cfg.common_eval.post_process is not None:
        refuse_other_forms(cfg.common_eval.post_process)
    if (args.passage is None) == (args.positions is None):
        raise UserError(
            "which text? Expected either --input FILE or --positions START:STOP (of "
            f"--gen-subset), got {'both' if args.passage else 'neither'}"
        )
    if cfg.task.trime_temperature is not None:
        raise UserError("--trime-temperature: fairseq-knnlm-inspect knows no such memory: drop it")
    if cfg.task.knn_skip:
        raise UserError(
            f"--knn-skip {cfg.task.knn_skip}: fairseq-knnlm-inspect shows the neighbours of every "
            "token: drop it"
        )
    if args.passage is not None and cfg.task.shorten_method != "none":
        raise UserError(
            f"--shorten-method {cfg.task.shorten_method} would cut the text of --input: drop it"
        )
    for flag, value, least in (
        ("--knn-show-neighbors", args.knn_show_neighbors, 1),
        ("--window", args.window, 0),
    ):
        if value < least:
            raise UserError(f"{flag} must be >= {least}, got {value}")
    refuse_unwritable_outputs(
        {"--html": args.html, "--json": args.json, "--knn-output": cfg.task.knn_output}
    )
    return None if args.positions is None else _parse_positions(args.positions)


def _parse_positions(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    start, stop = map(int, match.groups()) if match else (0, 0)
    if start >= stop:
        raise UserError(
            f"--positions must be START:STOP, two numbers with 0 <= START < STOP, got {text!r}"
        )
    return start, stop


def _refuse_beyond(span, size: int, split: str) -> None:
    if span[1] > size:
        raise UserError(
            f"--positions {span[0]}:{span[1]} reaches beyond the end of the split "
            f"{split!r}, which has {size:,} target tokens"
        )


def _word_splitter(cfg, task):
    tokenizer, bpe = task.build_tokenizer(cfg.tokenizer), task.build_bpe(cfg.bpe)

    def split_words(line):
        for step in (tokenizer, bpe):
            line = step.encode(line) if step is not None else line
        return tokenize_line(line)

    return split_words


# -- looking -----------------------------------------------------------------------------------


def _look(
    cfg, args, task, model, settings: Settings, dataset, span, words: Optional[list] = None
) -> list[Token]:
    """What is known of the target tokens of a span; *words*: all of the split, as written."""
    retriever, gate = task.retriever, task.gate
    cache = make_cache_reader(settings, task.target_dictionary.eos())
    inspector = Inspector(
        retriever.datastores,
        task.target_dictionary,
        settings.knn_lambda,
        settings.temperature,
        args.knn_show_neighbors,
        args.window,
        settings.cache_lambda,
        gate,
    )
    tokens = []
    with extractor_of(model, retriever.key) as extractor:
        for first, sample in _samples(cfg, task, model, dataset, *span, settings.cache_size):
            if sample["history"]:
                cache.log_probs(encode(model, sample, extractor, log_probs=False).keys, sample)
                continue
            encoded = encode(
                model,
                sample,
                extractor,
                softmax_batch=cfg.eval_lm.softmax_batch,
                top=GUESSES,
                confidence=looks_before(gate),
            )
            refuse_not_finite(encoded)
            neighbors = retriever.search(encoded.keys)
            before = None if gate is None else looked(gate, encoded, sample)
            log_p_cache = cache_top = None
            if cache is not None:
                log_p_cache, *cache_top = cache.log_probs_and_top(encoded.keys, sample, GUESSES)
            written = words[first : first + sample["ntokens"]] if words else None
            tokens += inspector.tokens(
                first, sample["target"], encoded.log_p_lm, neighbors, written,
                (encoded.top_log_p_lm, encoded.top_ids), log_p_cache, cache_top, before,
            )  # fmt: skip
    return tokens


def _samples(
    cfg, task, model, dataset, start: int, stop: int, history: int
) -> Iterator[tuple[int, dict]]:
    """The target tokens from *start* to *stop*, with the position of the first of each sample.

    So many tokens before them as *history* says come first, in samples that are marked as such.
    """
    reached = max(0, start - history)
    blocks = BlockRange(dataset, reached, stop, cfg.eval_lm.context_window)
    samples = evaluation_samples(cfg, task, model, blocks)
    device = next(model.parameters()).device
    after = blocks.first
    for sample in with_progress(cfg, samples, prefix="inspect"):
        before, after = after, after + sample["ntokens"]
        for low, high, is_history in ((reached, start, True), (start, stop, False)):
            first, last = max(low, before), min(high, after)
            if first < last:
                wanted = {**only_rows(sample, first - before, last - before), "history": is_history}
                yield first, to_device(wanted, device)


def _words(cfg, task, tokens: list[Token]) -> Optional[int]:
    """How many words of ``--remove-bpe`` the tokens are; None without it."""
    form, dictionary = cfg.common_eval.post_process, task.target_dictionary
    if form is None:
        return None
    ids = [dictionary.unk() if token.unknown else dictionary.index(token.text) for token in tokens]
    return len(Words(dictionary, form).starts(torch.tensor(ids), [len(ids)]))


def _described(cfg, task, settings: Settings) -> dict:
    """What the neighbours were found and mixed with, by the names that are shown."""
    names = [name for name in task.in_effect.names() if name.startswith("cache_")]
    return {
        "checkpoint": cfg.common_eval.path,
        "datastore": cfg.task.knn_datastore,
        "k": task.retriever.k,
        "lambda": settings.knn_lambda if task.gate is None else "of each token",
        "temperature": settings.temperature,
        "metric": task.retriever.metric,
        **{name.replace("_", " "): task.in_effect.value_in_words(name) for name in names},
    }


def _results(passage: Passage) -> dict:
    """What ``--knn-output`` of every command has, and the passage."""
    perplexities = passage.perplexities()
    return {
        "program": "fairseq-knnlm-inspect",
        "source": passage.source,
        "tokens": len(passage.tokens),
        "counted": passage.counted,
        "perplexity": perplexities["mixture"],
        "base_perplexity": perplexities["lm"],
        "passage": passage.to_dict(),
    }


# -- printing ----------------------------------------------------------------------------------


def _lines(passage: Passage, files: list[str]) -> Iterator[str]:
    """What is printed: everything, or where it can be read."""
    if not files:
        yield from as_text.render(passage, _wants_color(sys.stdout, os.environ))
        return
    yield from as_text.head(passage)
    for path in files:
        yield f"written to {path}"


def _wants_color(stream, environment) -> bool:
    """Whether a terminal shows what is printed, and takes colours (https://no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def _print(lines) -> None:
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:
        # Python would complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # that is a pager that was left
            raise
