"""Which memories spoke: what is known of each token of a passage, and of its nearest neighbours.

A datastore keeps no text, but its values are the tokens of its text in corpus order: those around a
row are its context, and the ``</s>`` that fairseq puts behind every line tell the line it is on.
Where empty lines separate documents (as ``--sample-break-mode complete_doc`` reads them) they count
documents as well; a datastore built in that mode holds no empty lines, and so knows of none.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from .interpolation import interpolate, knn_log_probs, knn_weights
from .metrics import perplexity

# Values looked through at a time for the ends of lines.
_ROWS = 1 << 24


class Neighbor(NamedTuple):
    """One memory: an entry of a datastore that is near to a token's context.

    rank (int): from 1, the nearest.
    token (str): the value, what followed in the text of the datastore.
    matches (bool): whether that is the token that is predicted.
    distance (float): as the search gives it; lower is closer.
    weight (float): its share of p_knn's mass, exp(-d / T) over the sum of all k; in [0, 1].
    before, after (list of str): the tokens around the value in the text of the datastore.
    datastore (int): which one, from 0, in the order of ``--knn-datastore``.
    row (int): of that datastore, from 0.
    line (int): line of that datastore's text, from 1.
    place (int): token within the line, from 1.
    document (int): from 1; None where no empty lines separate documents.
    """

    rank: int
    token: str
    matches: bool
    distance: float
    weight: float
    before: list
    after: list
    datastore: int
    row: int
    line: int
    place: int
    document: Optional[int]


class Token(NamedTuple):
    """One token of a passage.

    index (int): position among the target tokens of the text, from 0.
    text (str): as it was written, also where the model knows no such word.
    unknown (bool): whether the model sees ``<unk>``.
    ends_line (bool): whether it is the ``</s>`` behind a line.
    p_lm, p_knn, p_mixture (float): probabilities, in [0, 1].
    log_ratio (float): ln(p_mixture / p_lm), > 0 where the neighbours helped, never below
        ln(1 - lambda); -inf where the mixture makes the token impossible.
    matching (int): how many of the k neighbours have this token as their value.
    neighbors (list of Neighbor): the nearest, nearest first, and the nearest that has this token
        where it is further away.
    """

    index: int
    text: str
    unknown: bool
    ends_line: bool
    p_lm: float
    p_knn: float
    p_mixture: float
    log_ratio: float
    matching: int
    neighbors: list


class Inspection(NamedTuple):
    """A passage, token by token.

    source (str): where it is from, for a person to read.
    settings (dict): what the neighbours were found and mixed with, by name.
    tokens (list of Token): in the order of the text.
    """

    source: str
    settings: dict
    tokens: list

    def datastores(self) -> int:
        """How many were searched."""
        return len(self.settings["datastore"].split(":"))

    def perplexities(self) -> dict:
        """Perplexity per token, ``</s>`` included: of the language model and of the mixture."""
        probabilities = [(token.p_lm, token.p_mixture) for token in self.tokens]
        with np.errstate(divide="ignore"):
            lm, mixture = np.log(probabilities).T
        return {"lm": perplexity(lm), "mixture": perplexity(mixture)}

    def to_dict(self) -> dict:
        """Plain lists and dicts, for JSON: infinity is None."""
        tokens = [
            {
                **token._asdict(),
                "log_ratio": token.log_ratio if math.isfinite(token.log_ratio) else None,
                "neighbors": [neighbor._asdict() for neighbor in token.neighbors],
            }
            for token in self.tokens
        ]
        perplexities = {
            name: value if math.isfinite(value) else None
            for name, value in self.perplexities().items()
        }
        return {
            "source": self.source,
            "settings": self.settings,
            "perplexity": perplexities,
            "tokens": tokens,
        }


def place_in_words(neighbor: Neighbor, datastores: int) -> str:
    """Where a neighbour stands; in which datastore only if there are several."""
    parts = [f"datastore {neighbor.datastore + 1}"] if datastores > 1 else []
    if neighbor.document is not None:
        parts.append(f"document {neighbor.document:,}")
    parts += [f"line {neighbor.line:,}", f"token {neighbor.place:,}", f"row {neighbor.row:,}"]
    return ", ".join(parts)


class Lines:
    """Lines and documents of a text of which only the token ids are kept.

    Args:
        values (ndarray): shape (N,), token ids in corpus order.
        eos (int): the token behind every line.
    """

    def __init__(self, values: np.ndarray, eos: int):
        starts = range(0, len(values), _ROWS)
        ends = [start + np.flatnonzero(values[start : start + _ROWS] == eos) for start in starts]
        self._ends = np.concatenate([np.empty(0, dtype=np.int64), *ends])
        lengths = np.diff(self._ends, prepend=-1)
        empty = lengths == 1
        # a document begins at a line with text that is the first or follows an empty one
        begins = ~empty & np.concatenate([[True], empty])[: len(empty)]
        self._document_lines = np.flatnonzero(begins) if empty.any() else None

    def locate(self, row: int) -> tuple[int, int, Optional[int]]:
        """Line from 1, token within it from 1, and document from 1, or None, of a row."""
        line = int(np.searchsorted(self._ends, row))
        first = int(self._ends[line - 1]) + 1 if line else 0
        document = None
        if self._document_lines is not None:
            document = int(np.searchsorted(self._document_lines, line, side="right"))
            document = max(document, 1)  # empty lines in front of the first
        return line + 1, row - first + 1, document


class Inspector:
    """Says of scored tokens what is known of them.

    Args:
        datastores (list of Datastore): those that were searched, in that order.
        dictionary: fairseq's, of the model and the datastores.
        knn_lambda (float): weight of p_knn.
        temperature (float): T, divides the distances.
        show (int): nearest neighbours to tell of, for each token.
        window (int): tokens of context on either side of a neighbour.
    """

    def __init__(self, datastores, dictionary, knn_lambda, temperature, show=3, window=8):
        self.dictionary = dictionary
        self.knn_lambda = knn_lambda
        self.temperature = temperature
        self.show = show
        self.window = window
        self._datastores = datastores
        self._last_ids = np.cumsum([len(datastore) for datastore in datastores]) - 1
        self._lines = functools.lru_cache(maxsize=None)(
            lambda number: Lines(datastores[number].values, dictionary.eos())
        )

    def tokens(
        self, first: int, targets, log_p_lm, neighbors, words: Optional[Sequence] = None
    ) -> list:
        """What is known of consecutive tokens.

        Args:
            first (int): position of the first of them.
            targets (LongTensor): shape (N,), token ids.
            log_p_lm (Tensor): shape (N,), natural log.
            neighbors (Neighbors): shape (N, k).
            words: N words as they were written; None: as the dictionary has them.

        Returns:
            list of Token: N of them.
        """
        targets, log_p_lm = targets.cpu(), log_p_lm.cpu()
        neighbors = type(neighbors)(*(part.cpu() for part in neighbors))
        log_p_knn = knn_log_probs(neighbors.distances, neighbors.values, targets, self.temperature)
        log_p = interpolate(log_p_lm, log_p_knn, self.knn_lambda)
        columns = (log_p_lm, log_p_knn, log_p, log_p - log_p_lm)
        rows = torch.stack([column.double() for column in columns], dim=1).tolist()
        weights = knn_weights(neighbors.distances, self.temperature)
        return [
            Token(
                first + i,
                words[i] if words else self.dictionary[target],
                target == self.dictionary.unk(),
                target == self.dictionary.eos(),
                *map(math.exp, rows[i][:3]),
                rows[i][3],
                *self._memories(target, weights[i], *(part[i] for part in neighbors)),
            )
            for i, target in enumerate(targets.tolist())
        ]

    def _memories(self, target: int, weights, distances, values, ids) -> tuple[int, list]:
        """How many neighbours match, and those to tell of."""
        found = ids >= 0
        matching = torch.nonzero((values == target) & found).flatten().tolist()
        shown = torch.nonzero(found[: self.show]).flatten().tolist()
        shown += [rank for rank in matching[:1] if rank >= self.show]
        columns = (part[shown].tolist() for part in (weights, distances, values, ids))
        return len(matching), [self._neighbor(target, *each) for each in zip(shown, *columns)]

    def _neighbor(self, target, rank, weight, distance, value, id_) -> Neighbor:
        number = int(np.searchsorted(self._last_ids, id_))
        row = id_ - (int(self._last_ids[number - 1]) + 1 if number else 0)
        values = self._datastores[number].values
        line, place, document = self._lines(number).locate(row)
        return Neighbor(
            rank + 1,
            self.dictionary[value],
            value == target,
            distance,
            weight,
            self._decode(values[max(0, row - self.window) : row]),
            self._decode(values[row + 1 : row + 1 + self.window]),
            number,
            row,
            line,
            place,
            document,
        )

    def _decode(self, values) -> list:
        return [self.dictionary[int(value)] for value in values]
