"""A search whose results a gate weighs, and that is not made where the gate sees no use in it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

import torch

from ..encoding.chunks import tokens_of_search
from ..encoding.contexts import latest_tokens
from ..encoding.encode import Encoded
from ..errors import UserError
from ..neighbors import Neighbors
from .gates import Gate, joined, refuse_other_k
from .ngram_counts import ORDERS

if TYPE_CHECKING:  # FAISS is loaded where a datastore is opened: training needs none
    from ..search.retriever import Retriever

# Called with rows (LongTensor of shape (n,)), their neighbours and a temperature: log p_knn, shape
# (n,) or (n, V).
LogProbs = Callable[[torch.Tensor, Neighbors, float], torch.Tensor]


class Gated(NamedTuple):
    """What a gated search gives, for ``probability.mix``.

    log_p_knn (Tensor): shape (N,) or (N, V), float32, natural log; nan in rows that were not
        searched. None where none was.
    knn_lambda, cache_lambda (Tensor): shape (N,), float32, weights of each row.
    """

    log_p_knn: Optional[torch.Tensor]
    knn_lambda: torch.Tensor
    cache_lambda: torch.Tensor


class GatedSearch:
    """Searches what a gate wants searched.

    Args:
        retriever (Retriever): searches the datastore.
        gate (Gate): fitted with as many neighbours as it searches.
        skip (float): share of the searches that are not made, in [0, 1], of the text that the gate
            was fitted on. 0: all are made; 1: none is.
        with_cache (bool): whether there is a cache to weigh.

    Raises:
        UserError: if the gate is of another k, or cannot tell before a search.
    """

    def __init__(
        self, retriever: "Retriever", gate: Gate, skip: float = 0.0, with_cache: bool = False
    ):
        refuse_other_k(gate, retriever.k)
        refuse_blind(gate, skip)
        self.gate, self.skip, self._with_cache = gate, skip, with_cache
        self._retriever = retriever

    def search(
        self,
        queries: torch.Tensor,
        before: Optional[torch.Tensor],
        log_probs: LogProbs,
    ) -> Gated:
        """Search some queries, and weigh what is found.

        Args:
            queries (Tensor): shape (N, D), any float dtype and device.
            before (Tensor): shape (N, F), what the gate knows of them (``Gate.look``), or None.
            log_probs (callable): see ``LogProbs``.

        Returns:
            Gated: on the device of *queries*.
        """
        searched = self.gate.wants(before, self.skip) if self.skip else None
        if searched is None:
            searched = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
        rows = searched.nonzero().squeeze(1)
        log_p_knn, knn_lambda = None, queries.new_zeros(len(queries), dtype=torch.float32)
        cache_lambda = knn_lambda.clone()
        if self._with_cache and len(rows) < len(queries):
            cache_lambda.fill_(self.gate.cache_share)
        for some, neighbors in self._batches(queries, rows):
            found = Neighbors(*(part.to(queries.device) for part in neighbors))
            weights = self.gate.weigh(
                None if before is None else before[some], found.distances, found.values
            )
            weights = weights if self._with_cache else weights.without_cache()
            log_p = joined(weights, [log_probs(some, found, t) for t in self.gate.temperatures])
            if log_p_knn is None:
                log_p_knn = log_p.new_full((len(queries), *log_p.shape[1:]), torch.nan)
            log_p_knn[some], knn_lambda[some] = log_p, weights.knn_lambda
            cache_lambda[some] = weights.cache
        return Gated(log_p_knn, knn_lambda, cache_lambda)

    def _batches(self, queries, rows) -> Iterator[tuple[torch.Tensor, Neighbors]]:
        """Some of the rows, and what is nearest to their queries.

        A text may want more searches than the one that the gate was fitted on: no search is of more
        queries than there is memory for.
        """
        for part in rows.split(tokens_of_search(self._retriever.k)) if len(rows) else ():
            for batch, neighbors in self._retriever.batches(queries[part]):
                yield part[batch], neighbors


def looks_before(gate: Optional[Gate]) -> bool:
    """Whether there is a gate, and it looks before the search."""
    return gate is not None and gate.looks_before


def looked(gate: Gate, encoded: Encoded, sample: dict) -> Optional[torch.Tensor]:
    """What a gate knows of the targets of a sample before the search, see ``Gate.look``.

    Args:
        gate (Gate): of this model.
        encoded (Encoded): of the sample, with keys and, if the gate looks before, confidence.
        sample (dict): from ``encoding.ChunkCollater``.
    """
    return gate.look(encoded.keys, encoded.confidence, latest_tokens(sample, ORDERS))


def refuse_blind(gate: Gate, skip: float) -> None:
    """Refuse to skip searches by a gate that looks at their results.

    Raises:
        UserError: naming the kind.
    """
    if skip and not gate.looks_before:
        raise UserError(
            f"--knn-skip {skip}: a gate of the kind {gate.kind!r} looks at neighbours only, and "
            "cannot tell before a search: fit one with fairseq-knnlm-tune --knn-gate learned"
        )
