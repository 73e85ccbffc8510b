"""Fitting a gate to a text that is tuned on, for the neighbours and the cache chosen there."""

import logging
import time

import torch

from ..gating.features import before_search
from ..gating.gates import Gate
from ..gating.ngram_counts import NgramCounts
from ..probability.metrics import perplexity
from ..units import in_time
from .choice import Chosen
from .fit_gate import fit_buckets, fit_nest, held_out
from .gate_data import FOLDS
from .train_gate import TEMPERATURES, train_gate
from .tuning_data import TuningData

logger = logging.getLogger("fairseq_knnlm.tune")


def with_gate(
    chosen: Chosen, kind: str, data: TuningData, datastores, types: int, eos: int
) -> Chosen:
    """What was chosen, with a gate for its k, its T and its cache.

    Args:
        chosen (Chosen): with neighbours.
        kind (str): ``buckets``, ``nest`` or ``learned``.
        data (TuningData): of the text that is tuned on; for ``learned``, collected for a gate.
        datastores (list of Datastore): that were searched.
        types (int): V, the size of the dictionary.
        eos (int): id of the end of a line.
    """
    started = time.monotonic()
    if kind == "learned":
        gate, log_p = _learned(chosen, data, datastores, types, eos)
    else:
        gate, log_p = _of_few_numbers(
            chosen, {"buckets": fit_buckets, "nest": fit_nest}[kind], data
        )
    logger.info(
        f"gate {kind!r} fitted in {in_time(time.monotonic() - started)}: perplexity "
        f"{perplexity(log_p):.2f} of what was held out, {FOLDS} times a part of the documents"
    )
    return chosen._replace(gate=gate)


def _of_few_numbers(chosen: Chosen, fit, data: TuningData) -> tuple[Gate, torch.Tensor]:
    """The gate, and log p of each token by one that was fitted without it."""
    gate_data = chosen.gate_data(data, [chosen.knn.temperature])

    def fit_some(some):
        return fit(some, chosen.knn.k, chosen.knn.temperature)

    return fit_some(gate_data), held_out(gate_data, fit_some)


def _learned(chosen: Chosen, data: TuningData, datastores, types: int, eos: int):
    """The same of the learned gate."""
    counts = NgramCounts.of([datastore.text for datastore in datastores], types, eos)
    log_counts = torch.from_numpy(counts.log_counts(data.contexts.numpy()))
    before = before_search(data.queries, data.confidence, log_counts)
    k, temperature = chosen.knn.k, chosen.knn.temperature
    gate_data = chosen.gate_data(data, [factor * temperature for factor in TEMPERATURES], before)
    return train_gate(gate_data, k, temperature, counts, data.queries.size(1))
