"""The memories behind generated tokens, among the lines that fairseq's commands print.

fairseq prints ``H-``, ``D-`` and ``P-`` lines of each hypothesis and asks the task for nothing
more. Right before it prints a ``P-`` line it reads the hypothesis's scores; the scores handed to it
report that, and the ``print`` that the command calls, replaced meanwhile, adds the ``N-`` lines of
the same hypothesis. The command has its own ``print`` again once every hypothesis has been printed
or dropped.
"""

import weakref

import torch

from ..inspection.as_text import printable, words
from ..inspection.tokens import place_in_words
from .commands import running_names

_COMMANDS = ("interactive", "generate")


class Memories:
    """Prints the memories of each hypothesis right behind its ``P-`` line.

    Args:
        inspector (Inspector): says what is known of tokens.
        nbest (int): hypotheses of a sentence that are printed.
        datastores (int): how many were searched.
    """

    def __init__(self, inspector, nbest: int, datastores: int):
        self.nbest = nbest
        self._inspector = inspector
        self._datastores = datastores
        self._waiting = 0  # hypotheses that are neither printed nor dropped
        self._announced = None  # memories of the hypothesis whose scores were read last

    def take(self, hypothesis: dict, log_p_lm, neighbors, first: int, before=None) -> None:
        """Keep what is to be printed of a hypothesis.

        Args:
            hypothesis (dict): fairseq's, with n tokens; its scores are replaced by equal ones that
                report when they are read.
            log_p_lm (Tensor): shape (n,), natural log.
            neighbors (Neighbors): shape (n, k), on any device.
            first (int): number of the prompt's tokens, whose memories are not printed.
            before (Tensor): see ``Inspector.tokens``.
        """
        tokens = self._inspector.tokens(0, hypothesis["tokens"], log_p_lm, neighbors, before=before)
        memories = _Announcement(line for token in tokens[first:] for line in self._of(token))
        memories.close = weakref.finalize(memories, self._close)
        self._waiting += 1
        scores = hypothesis["positional_scores"].as_subclass(_ReportingScores)
        scores.on_read = lambda: self._announce(memories)
        hypothesis["positional_scores"] = scores
        for names in _names_of_commands():
            names["print"] = self._print

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

    def _announce(self, memories):
        self._announced = memories

    def _print(self, *values, **options):
        print(*values, **options)
        label = str(values[0] if values else "").partition("\t")[0]
        if not label.startswith("P-") or self._announced is None:
            return
        memories, self._announced = self._announced, None
        for line in memories.lines:
            print(f"N-{label[2:]}\t{line}", **options)
        memories.close()

    def _close(self):
        """Called once for each hypothesis, when it has been printed or nothing refers to it."""
        self._waiting -= 1
        if not self._waiting:
            for names in _names_of_commands():
                names.pop("print", None)


class _Announcement:
    """The ``N-`` lines of one hypothesis.

    Args:
        lines: each without its label.

    Attributes:
        close (callable): says that the lines have been printed.
    """

    def __init__(self, lines):
        self.lines = list(lines)
        self.close = None


class _ReportingScores(torch.Tensor):
    """Scores that report when they are read as a list, which fairseq does to print them."""

    def on_read(self):
        """Nothing, for a tensor computed from such scores; ``Memories.take`` sets another."""

    def tolist(self):
        """As of any tensor, after the report."""
        self.on_read()
        return super().tolist()


def _names_of_commands():
    every = map(running_names, _COMMANDS)
    return [names for names in every if names is not None]
