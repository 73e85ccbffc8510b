"""Puts our scorer into the running ``fairseq-eval-lm``.

fairseq asks the task for everything but the scorer: ``fairseq_cli.eval_lm.eval_lm`` builds
fairseq's own from its module's globals. Besides ``print_patch`` this is the one place that patches
fairseq at run time. For one call it puts a function of ours in the place of ``eval_lm``; that call
puts our scorer in the place of the class, runs fairseq's function and puts everything back.
"""

import logging
import math
from typing import Callable, Optional

import torch
import torch.distributed as dist

from ..errors import UserError
from ..progress import shown_by
from ..scoring.text_bytes import TextBytes
from ..scoring.words import SENTENCEPIECE, Words
from .bars import bars_like, in_bars
from .commands import running_names

logger = logging.getLogger(__name__)

# fairseq-eval-lm leaves infinite scores out of sum and count, which would flatter perplexity. This
# finite number stands for minus infinity; ``_CountingScorer.total`` makes the result infinite.
_IMPOSSIBLE = -1e30


def use_scorer(make_scorer: Callable, on_end: Optional[Callable[[int], None]] = None) -> None:
    """Make the ``fairseq-eval-lm`` that runs in this process score with our scorer, once.

    Args:
        make_scorer (callable): takes ``softmax_batch``, gives a ``KNNScorer``.
        on_end (callable): called when all is scored, with the number of units that were counted in
            this process: targets, or the words of ``--remove-bpe``.
    """
    names = running_names("eval_lm")
    if names is None:  # the task is used by another program
        return
    stock = getattr(names["eval_lm"], "stock", names["eval_lm"])

    def with_our_scorer(**arguments):
        names["eval_lm"], stock_scorer = stock, names["SequenceScorer"]
        scorer = _CountingScorer(
            make_scorer(arguments.get("softmax_batch") or 0),
            arguments["source_dictionary"],
            arguments.get("post_process"),
        )
        names["SequenceScorer"] = lambda dictionary, softmax_batch: scorer
        try:
            with shown_by(in_bars(bars_like(arguments["batch_iterator"]))):
                total = scorer.total(stock(**_known_to_stock(arguments)))
        finally:
            names["SequenceScorer"] = stock_scorer
        if on_end is not None:
            on_end(scorer.counted)
        return total

    with_our_scorer.stock = stock
    names["eval_lm"] = with_our_scorer


def _known_to_stock(arguments: dict) -> dict:
    """The arguments without a form of pieces that fairseq's ``eval_lm`` does not know.

    Raises:
        UserError: if the words of that form are to be printed, which is done in there.
    """
    if arguments.get("post_process") != SENTENCEPIECE:
        return arguments
    if arguments.get("output_word_probs") or arguments.get("output_word_stats"):
        raise UserError(
            "--output-word-probs and --output-word-stats print the pieces of --remove-bpe "
            f"{SENTENCEPIECE}, not its words: drop one of them"
        )
    return {**arguments, "post_process": None}


class _CountingScorer:
    """A scorer whose results ``eval_lm`` can sum; it counts targets as ``eval_lm`` does.

    Args:
        scorer (KNNScorer): the scorer.
        dictionary: fairseq's dictionary of the data.
        post_process (str): ``--remove-bpe``: words are counted, see ``scoring.words``; None: every
            token counts.

    Attributes:
        counted (int): targets so far that count.
    """

    def __init__(self, scorer, dictionary, post_process):
        self._scorer = scorer
        self._targets = 0
        self.counted = 0
        self._words = self._bytes = None
        if post_process is not None:
            self._words = Words(dictionary, post_process)
            self._bytes = TextBytes(dictionary, post_process)
        # What the stock ``eval_lm`` divides by.
        self._stock_counts_words = post_process not in (None, SENTENCEPIECE)

    def generate(self, models, sample):
        """Score a sample, with finite scores only.

        Args:
            models (list): of one fairseq decoder-only language model.
            sample (dict): from ``encoding.ChunkCollater``.
        """
        hypotheses = self._scorer.generate(models, sample)
        for (hypothesis,) in hypotheses:
            hypothesis["positional_scores"].clamp_(min=_IMPOSSIBLE)
        if sample["history"]:
            return hypotheses
        self._targets += len(sample["target"])
        self.counted += self._count(sample["target"].cpu(), sample["target_lengths"])
        return hypotheses

    def _count(self, targets, lengths) -> int:
        if self._words is None:
            return len(targets)
        self._bytes.add(targets)
        return len(self._words.starts(targets, lengths))

    def total(self, results):
        """The result of all processes; a warning says so where impossible targets decide it.

        Args:
            results (dict): what the stock ``eval_lm`` returns in this process.

        Raises:
            UserError: if there was nothing to score, which fairseq calls a perplexity of 1.
        """
        bits = float(results["loss"]) * (
            self.counted if self._stock_counts_words else self._targets
        )
        text_bytes = math.nan if self._bytes is None else self._bytes.total or math.nan
        bits, counted, targets, impossible, text_bytes = _sum_over_processes(
            bits, self.counted, self._targets, self._scorer.impossible, text_bytes
        )
        if not counted:
            raise UserError(
                "there is no perplexity of no tokens: this share of the split is empty, see "
                "--num-shards and --shard-id"
            )
        loss = bits / counted
        if impossible:
            logger.warning(
                f"{impossible:,.0f} of {targets:,.0f} targets have probability 0, because no "
                "neighbour has them and --knn-lambda and --knn-cache-lambda leave no weight for "
                "the language model: perplexity is infinite"
            )
            loss = bits = math.inf
        if self._words is not None and targets:
            logger.info(_in_words(bits, counted, targets, text_bytes))
        return {"loss": loss, "perplexity": 2.0**loss}


def _in_words(bits: float, words: float, tokens: float, text_bytes: float) -> str:
    """What perplexity is of, and the same of other units; *text_bytes*: nan where not known."""
    line = (
        f"perplexity is of {words:,.0f} words; of their {tokens:,.0f} tokens it is "
        f"{2.0 ** (bits / tokens):.2f}"
    )
    if math.isnan(text_bytes):
        return f"{line}; bits per byte are not known, the text having words that are unknown"
    return f"{line}; {bits / text_bytes:.3f} bits for each of {text_bytes:,.0f} bytes"


def _sum_over_processes(*numbers: float):
    if not (dist.is_available() and dist.is_initialized()):
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    totals = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()
