"""The memories behind generated tokens, among the lines that fairseq's commands print.

fairseq prints ``H-``, ``D-`` and ``P-`` lines of each hypothesis and asks the task for nothing
more. Here the commands' ``print`` is replaced until the hypotheses that are waited for have been
printed; ``N-`` lines come right behind their ``P-`` line.
"""

import collections
import math
import sys

from .inspection import place_in_words
from .inspection_text import printable, words

# What both modules have; under ``python -m`` one of them is ``__main__``.
_COMMANDS = ("__main__", "fairseq_cli.interactive", "fairseq_cli.generate")
_THEIRS = "get_symbols_to_strip_from_output"


class Memories:
    """Tells of the memories of hypotheses once fairseq has printed them.

    Args:
        inspector (Inspector): says what is known of tokens.
        nbest (int): hypotheses of a sentence that are printed.
        datastores (int): how many were searched.
    """

    def __init__(self, inspector, nbest: int, datastores: int):
        self.nbest = nbest
        self._inspector = inspector
        self._datastores = datastores
        # by the text of their scores: those that have it in common are the same tokens
        self._waiting = collections.defaultdict(collections.deque)

    def take(self, hypothesis: dict, log_p_lm, neighbors, first: int) -> None:
        """Keep what is to be told of a hypothesis.

        Args:
            hypothesis (dict): fairseq's, with n tokens.
            log_p_lm (Tensor): shape (n,), natural log.
            neighbors (Neighbors): shape (n, k), on the CPU or not.
            first (int): tokens before it are the prompt, of which nothing is told.
        """
        tokens = self._inspector.tokens(0, hypothesis["tokens"], log_p_lm, neighbors)
        bits = (hypothesis["positional_scores"] / math.log(2)).tolist()
        scores = " ".join(f"{score:.4f}" for score in bits)
        self._waiting[scores].append([line for token in tokens[first:] for line in self._of(token)])
        for command in _running_commands():
            command.print = self._print

    def _of(self, token):
        """Tab-separated: place in the P- line, token, weight, value, where it stands, text."""
        for neighbor in token.neighbors:
            yield "\t".join(
                (
                    str(token.index + 1),
                    printable(words(token)),
                    f"{neighbor.weight:.4f}",
                    printable(neighbor.token),
                    place_in_words(neighbor, self._datastores),
                    printable(" ".join(neighbor.before)),
                )
            )

    def _print(self, *values, **options):
        print(*values, **options)
        label, _, scores = str(values[0] if values else "").partition("\t")
        if not (label.startswith("P-") and self._waiting.get(scores)):
            return
        for line in self._waiting[scores].popleft():
            print(f"N-{label[2:]}\t{line}", **options)
        if not any(self._waiting.values()):
            self._waiting.clear()
            for command in _running_commands():
                del command.print


def _running_commands():
    modules = [sys.modules.get(name) for name in _COMMANDS]
    return [module for module in modules if hasattr(module, _THEIRS)]
