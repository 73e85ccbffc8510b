"""Puts our scorer into the running ``fairseq-eval-lm``.

fairseq asks the task for everything but the scorer: ``fairseq_cli.eval_lm.eval_lm`` builds
fairseq's own from its module's globals. This is the one place that patches fairseq at run time. It
swaps the function ``eval_lm`` for one call; that call swaps the scorer class, runs the stock
function and puts both back.
"""

import logging
import math
import sys

import torch

logger = logging.getLogger(__name__)

# fairseq-eval-lm leaves infinite scores out of sum and count, which would flatter perplexity. They
# are handed over as a number that no sum or exponential survives, and the result is set to what
# it is: infinite.
_IMPOSSIBLE = -1e30


def use_scorer(make_scorer) -> None:
    """Make the ``fairseq-eval-lm`` that runs in this process score with our scorer, once.

    Args:
        make_scorer (callable): takes ``softmax_batch``, gives a ``KNNScorer``.
    """
    module = _running_module()
    if module is None:
        return
    stock = getattr(module.eval_lm, "stock", module.eval_lm)

    def eval_lm(*args, **kwargs):
        module.eval_lm, stock_scorer = stock, module.SequenceScorer
        used = []

        def scorer(dictionary, softmax_batch=None, **options):
            used.append(_Adapter(make_scorer(softmax_batch or 0)))
            return used[-1]

        module.SequenceScorer = scorer
        try:
            results = stock(*args, **kwargs)
        finally:
            module.SequenceScorer = stock_scorer
        return used[0].finish(results)

    eval_lm.stock = stock
    module.eval_lm = eval_lm


def _running_module():
    """The module of ``fairseq-eval-lm``: ``__main__`` under ``python -m``."""
    for name in ("__main__", "fairseq_cli.eval_lm"):
        module = sys.modules.get(name)
        if hasattr(module, "eval_lm") and hasattr(module, "SequenceScorer"):
            return module
    return None


class _Adapter:
    """A scorer in the form that ``eval_lm`` can count: no infinite scores."""

    def __init__(self, scorer):
        self._scorer = scorer
        self._tokens = 0

    def generate(self, models, sample):
        hypotheses = self._scorer.generate(models, sample)
        for (hypothesis,) in hypotheses:
            hypothesis["positional_scores"].clamp_(min=_IMPOSSIBLE)
            self._tokens += len(hypothesis["tokens"])
        return hypotheses

    def finish(self, results):
        """Say in words, and in the result, that an impossible target makes it infinite."""
        impossible = self._scorer.impossible
        if impossible:
            logger.warning(
                f"{impossible:,} of {self._tokens:,} targets have probability 0, because no "
                "neighbour has them and --knn-lambda is 1: perplexity is infinite"
            )
            results = {**results, "loss": torch.tensor(math.inf), "perplexity": math.inf}
        return results
