"""Which memories spoke: what is known of each token of a passage, and of its nearest neighbours.

A continuous cache may be one of the memories: what it would have said, and its weight.

A datastore keeps no text, but the token ids of its text in their order: those around an entry are
its context, and every ``</s>`` that fairseq puts behind a line ends one. Where empty lines separate
documents (as ``--sample-break-mode complete_doc`` reads them) documents are counted as well. A
datastore that was built in that mode holds no empty lines, so its documents are unknown.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..errors import UserError
from ..gating.gates import Gate, joined
from ..neighbors import Neighbors
from ..probability.knn import knn_log_probs, knn_weights
from ..probability.metrics import perplexity
from ..probability.mixture import mix, weights_of_rows

# Tokens of a text that are looked through at a time for the ends of lines.
_BATCH_TOKENS = 1 << 24
# So many tokens that the model, and as many that the neighbours, would rather have said.
GUESSES = 5


# Log-probabilities of the most probable tokens, and their ids, each of shape (N, n).
Top = tuple[torch.Tensor, torch.Tensor]


class Guess(NamedTuple):
    """What a distribution says comes next.

    token (str): one of its most probable tokens.
    p (float): its probability, in [0, 1].
    matches (bool): whether that is the token that is predicted.
    """

    token: str
    p: float
    matches: bool


class Memory(NamedTuple):
    """One neighbour: an entry of a datastore that is near to a token's context.

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
    p_lm, p_knn, p_mixture (float): probabilities, in [0, 1]; p_knn is nan without any neighbour.
    log_ratio (float): ln(p_mixture / p_lm), > 0 where the memories helped, never below
        ln(lm_lambda); -inf where the mixture makes the token impossible.
    lm_lambda, knn_lambda, cache_lambda (float): the weights of model, neighbours and cache in
        p_mixture, together 1; 0 for a memory that had nothing to say here.
    p_cache (float): probability by the continuous cache, in [0, 1]; nan where it is empty, None
        without one.
    matching (int): how many of the k neighbours have this token as their value.
    neighbors (list of Memory): the nearest, nearest first, and the nearest that has this token
        where it is further away.
    lm_guesses, knn_guesses, cache_guesses (list of Guess): the most probable tokens by p_lm, p_knn
        and p_cache, at most ``GUESSES`` of each; by p_lm none where they were not asked for.
    """

    index: int
    text: str
    unknown: bool
    ends_line: bool
    p_lm: float
    p_knn: float
    p_mixture: float
    log_ratio: float
    lm_lambda: float
    knn_lambda: float
    cache_lambda: float
    p_cache: Optional[float]
    matching: int
    neighbors: list
    lm_guesses: list
    knn_guesses: list
    cache_guesses: list

    def to_dict(self) -> dict:
        """Plain lists and dicts."""
        lists = ("neighbors", "lm_guesses", "knn_guesses", "cache_guesses")
        return {
            **self._asdict(),
            **{name: [each._asdict() for each in getattr(self, name)] for name in lists},
        }


class Passage(NamedTuple):
    """A passage, token by token.

    source (str): where it is from, for a person to read.
    settings (dict): what the neighbours were found and mixed with, by name.
    tokens (list of Token): in the order of the text.
    datastores (int): how many were searched.
    with_cache (bool): whether a continuous cache is one of the memories.
    words (int): how many words the tokens are, of which perplexity is; None: it is of tokens.
    gated (bool): whether a gate weighs each token.
    """

    source: str
    settings: dict
    tokens: list
    datastores: int
    with_cache: bool = False
    words: Optional[int] = None
    gated: bool = False

    @property
    def counted(self) -> int:
        """How many there are of what perplexity is of."""
        return len(self.tokens) if self.words is None else self.words

    @property
    def memories(self) -> str:
        """What is mixed with the model, in words."""
        return "neighbours and cache" if self.with_cache else "neighbours"

    def perplexities(self) -> dict:
        """Perplexity per token or word, ``</s>`` included: of the model and of the mixture."""
        probabilities = [(token.p_lm, token.p_mixture) for token in self.tokens]
        with np.errstate(divide="ignore"):
            lm, mixture = np.log(probabilities).T
        per_unit = len(self.tokens) / self.counted
        return {"lm": perplexity(lm, per_unit), "mixture": perplexity(mixture, per_unit)}

    def to_dict(self) -> dict:
        """Plain lists and dicts for ``files.write_json``, infinite numbers among them."""
        return {
            "source": self.source,
            "settings": self.settings,
            "perplexity": self.perplexities(),
            "tokens": [token.to_dict() for token in self.tokens],
        }


def place_in_words(memory: Memory, datastores: int) -> str:
    """Where a memory stands.

    Args:
        memory (Memory): of one of the datastores.
        datastores (int): how many were searched; the datastore is named only if there are several.

    Returns:
        str: ``document 3, line 25, token 4, row 1,201``.
    """
    parts = [f"datastore {memory.datastore + 1}"] if datastores > 1 else []
    if memory.document is not None:
        parts.append(f"document {memory.document:,}")
    parts += [f"line {memory.line:,}", f"token {memory.place:,}", f"row {memory.row:,}"]
    return ", ".join(parts)


def size_in_words(passage: Passage) -> str:
    """How long a passage is: ``40 tokens``, or ``31 words of 40 tokens``."""
    tokens = f"{len(passage.tokens):,} tokens"
    return tokens if passage.words is None else f"{passage.words:,} words of {tokens}"


class Lines:
    """Lines and documents of a text of which only the token ids are kept.

    Args:
        text (ndarray): shape (N,), token ids in the order of the text.
        eos (int): the token behind every line.
    """

    def __init__(self, text: np.ndarray, eos: int):
        starts = range(0, len(text), _BATCH_TOKENS)
        ends = [
            start + np.flatnonzero(text[start : start + _BATCH_TOKENS] == eos) for start in starts
        ]
        self._ends = np.concatenate([np.empty(0, dtype=np.int64), *ends])
        lengths = np.diff(self._ends, prepend=-1)
        empty = lengths == 1
        # A document begins at a line with text that is the first or follows an empty one.
        begins = ~empty & np.concatenate([[True], empty])[: len(empty)]
        self._document_lines = np.flatnonzero(begins) if empty.any() else None

    def locate(self, position: int) -> tuple[int, int, Optional[int]]:
        """Where a token of the text stands.

        Returns:
            tuple: line from 1, token within it from 1, and document from 1, or None.
        """
        line = int(np.searchsorted(self._ends, position))
        first = int(self._ends[line - 1]) + 1 if line else 0
        document = None
        if self._document_lines is not None:
            document = int(np.searchsorted(self._document_lines, line, side="right"))
            document = max(document, 1)  # Empty lines in front of the first belong to it.
        return line + 1, position - first + 1, document


class Inspector:
    """Says of scored tokens what is known of them.

    Args:
        datastores (list of Datastore): those that were searched, in that order.
        dictionary: fairseq's, of the model and the datastores.
        knn_lambda (float): weight of p_knn, in [0, 1].
        temperature (float): T > 0, divides the distances.
        show (int): nearest neighbours to describe for each token, >= 1.
        window (int): tokens of context on either side of a neighbour, >= 0.
        cache_lambda (float): weight of p_cache, in [0, 1], of tokens that a cache is asked for.
        gate (Gate): says weights and temperature of each token; None: they are the same for all.

    Raises:
        UserError: if a number is outside its range.
    """

    def __init__(
        self,
        datastores,
        dictionary,
        knn_lambda,
        temperature,
        show=3,
        window=8,
        cache_lambda=0.0,
        gate: Optional[Gate] = None,
    ):
        for name, value, holds, expected in (
            ("datastores", len(datastores), len(datastores) >= 1, "one or more"),
            ("knn_lambda", knn_lambda, 0.0 <= knn_lambda <= 1.0, "in [0, 1]"),
            ("cache_lambda", cache_lambda, 0.0 <= cache_lambda <= 1.0, "in [0, 1]"),
            ("temperature", temperature, temperature > 0.0, "> 0"),
            ("show", show, show >= 1, ">= 1"),
            ("window", window, window >= 0, ">= 0"),
        ):
            if not holds:
                raise UserError(f"Inspector: {name} must be {expected}, got {value}")
        self.dictionary = dictionary
        self.knn_lambda, self.cache_lambda = knn_lambda, cache_lambda
        self.temperature = temperature
        self.show = show
        self.window = window
        self._gate = gate
        self._datastores = datastores
        self._last_ids = np.cumsum([len(datastore) for datastore in datastores]) - 1
        self._lines = functools.lru_cache(maxsize=None)(
            lambda number: Lines(datastores[number].text, dictionary.eos())
        )

    def tokens(
        self,
        first: int,
        targets: torch.Tensor,
        log_p_lm: torch.Tensor,
        neighbors: Neighbors,
        words: Optional[Sequence[str]] = None,
        lm_top: Optional[Top] = None,
        log_p_cache: Optional[torch.Tensor] = None,
        cache_top: Optional[Top] = None,
        before: Optional[torch.Tensor] = None,
    ) -> list[Token]:
        """What is known of consecutive tokens.

        Args:
            first (int): position of the first of them.
            targets (LongTensor): shape (N,), token ids.
            log_p_lm (Tensor): shape (N,), natural log.
            neighbors (Neighbors): shape (N, k).
            words (sequence of str): N words as they were written; None: as the dictionary has
                them.
            lm_top (tuple of Tensor): log p_lm of the most probable tokens, and their ids, each of
                shape (N, n), the most probable first; None: not known.
            log_p_cache (Tensor): shape (N,), natural log, nan where the cache is empty; None
                without one.
            cache_top (tuple of Tensor): as *lm_top*, of the cache; -inf where there are fewer.
            before (Tensor): shape (N, F), what the gate knows before a search (``Gate.look``).

        Returns:
            list of Token: N of them.
        """
        targets, log_p_lm = targets.cpu(), log_p_lm.cpu()
        before = None if before is None else before.cpu()
        neighbors = Neighbors(*(part.cpu() for part in neighbors))
        log_p_cache = None if log_p_cache is None else log_p_cache.cpu()
        log_p_knn, weights, *lambdas = self._weighed(
            targets, neighbors, before, log_p_cache is not None
        )
        mixture = (log_p_lm, log_p_knn, log_p_cache, *lambdas)
        log_p = mix(*mixture)
        columns = (log_p_lm, log_p_knn, log_p, log_p - log_p_lm, *weights_of_rows(*mixture).t())
        rows = torch.stack([column.double() for column in columns], dim=1).tolist()
        p_cache = _probabilities(log_p_cache, len(targets))
        lm_best, cache_best = (
            _pairs(*top) if top else [[]] * len(targets) for top in (lm_top, cache_top)
        )
        return [
            Token(
                first + i,
                words[i] if words else self.dictionary[target],
                target == self.dictionary.unk(),
                target == self.dictionary.eos(),
                *map(math.exp, rows[i][:3]),
                *rows[i][3:],
                p_cache[i],
                *self._memories(target, weights[i], *(part[i] for part in neighbors)),
                self._guesses(target, lm_best[i]),
                self._guesses(target, _largest_sums(neighbors.values[i], weights[i])),
                self._guesses(target, cache_best[i]),
            )
            for i, target in enumerate(targets.tolist())
        ]

    def _weighed(self, targets, neighbors: Neighbors, before, with_cache: bool):
        """What neighbours say, and how much it counts.

        Returns:
            tuple: log p_knn, shape (N,); the share of each neighbour in it, shape (N, k); and the
            weights of p_knn and p_cache, of all tokens or of each.
        """
        distances, values, _ = neighbors
        if self._gate is None:
            log_p_knn = knn_log_probs(distances, values, targets, self.temperature)
            shares = knn_weights(distances, self.temperature)
            return log_p_knn, shares, self.knn_lambda, self.cache_lambda
        weights = self._gate.weigh(before, distances, values)
        if not with_cache:
            weights = weights.without_cache()
        temperatures = self._gate.temperatures
        every = [knn_log_probs(distances, values, targets, each) for each in temperatures]
        knn_lambda = weights.knn_lambda.unsqueeze(1)
        # Neighbours without any weight are shown as well: each temperature counts the same then.
        of_temperatures = torch.where(
            knn_lambda > 0, weights.knn / knn_lambda, 1 / len(temperatures)
        )
        parts = zip(of_temperatures.t(), (knn_weights(distances, each) for each in temperatures))
        shares = sum(share.unsqueeze(1) * part for share, part in parts)
        return joined(weights, every), shares, weights.knn_lambda, weights.cache

    def _memories(self, target: int, weights, distances, values, ids) -> tuple[int, list[Memory]]:
        """How many of a token's neighbours match, and those to describe."""
        present = ids >= 0
        matching = torch.nonzero((values == target) & present).flatten().tolist()
        shown = torch.nonzero(present[: self.show]).flatten().tolist()
        shown += [rank for rank in matching[:1] if rank >= self.show]
        columns = (part[shown].tolist() for part in (weights, distances, values, ids))
        return len(matching), [self._memory(target, *each) for each in zip(shown, *columns)]

    def _guesses(self, target: int, pairs: Iterable[tuple[int, float]]) -> list[Guess]:
        return [Guess(self.dictionary[token], p, token == target) for token, p in pairs]

    def _memory(self, target, rank, weight, distance, value, id_) -> Memory:
        number = int(np.searchsorted(self._last_ids, id_))
        row = id_ - (int(self._last_ids[number - 1]) + 1 if number else 0)
        datastore = self._datastores[number]
        before, after = datastore.context(row, self.window, self.window)
        line, place, document = self._lines(number).locate(int(datastore.positions([row])[0]))
        return Memory(
            rank + 1,
            self.dictionary[value],
            value == target,
            distance,
            weight,
            self._decode(before),
            self._decode(after),
            number,
            row,
            line,
            place,
            document,
        )

    def _decode(self, token_ids: np.ndarray) -> list[str]:
        return [self.dictionary[int(token)] for token in token_ids]


def _probabilities(log_p: Optional[torch.Tensor], count: int) -> list[Optional[float]]:
    """Of each row; None where there is no such distribution."""
    return [None] * count if log_p is None else log_p.double().exp().tolist()


def _pairs(log_probs: torch.Tensor, ids: torch.Tensor) -> list[list[tuple[int, float]]]:
    """Token and probability of the most probable ones, for each row."""
    rows = zip(ids.tolist(), log_probs.double().exp().tolist())
    return [[pair for pair in zip(*row) if pair[1] > 0.0][:GUESSES] for row in rows]


def _largest_sums(values: torch.Tensor, weights: torch.Tensor) -> list[tuple[int, float]]:
    """The values with the largest sums of weights, largest first: the top of p_knn.

    Args:
        values (LongTensor): shape (k,), token ids.
        weights (Tensor): shape (k,), of the neighbours; 0 where there is none.
    """
    tokens, places = values.unique(return_inverse=True)
    sums = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, places, weights.double())
    largest = sums.topk(min(GUESSES, len(tokens)))
    pairs = zip(tokens[largest.indices].tolist(), largest.values.tolist())
    return [(token, p) for token, p in pairs if p > 0.0]
