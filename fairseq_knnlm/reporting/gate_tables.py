"""Which tokens a gate trusts neighbours with, whom it helps, and what skipping searches costs."""

from collections.abc import Iterator
from typing import NamedTuple, Optional

import numpy as np

from ..gating.gates import quality
from ..probability.metrics import perplexity
from ..tuning.choice import Chosen
from ..tuning.tuning_data import TuningData
from .tables import helped_or_hurt

# Tokens are put in so many equal groups by entropy and by the quality of their neighbours.
_GROUPS = 10


class _Tokens(NamedTuple):
    """What is known of N tokens, arrays of shape (N,): lambda, and log p by three mixtures."""

    knn_lambda: np.ndarray
    base: np.ndarray
    constant: np.ndarray
    gate: np.ndarray

    def group(self, rows: np.ndarray, measure: np.ndarray) -> dict:
        """What is shown of some of them, which have something in common."""
        return {
            "lowest": float(measure[rows].min()),
            "highest": float(measure[rows].max()),
            "tokens": len(rows),
            "knn_lambda": float(self.knn_lambda[rows].mean()),
            "base_perplexity": perplexity(self.base[rows]),
            "constant_perplexity": perplexity(self.constant[rows]),
            "gate_perplexity": perplexity(self.gate[rows]),
        }


def make_gate_tables(
    chosen: Chosen, data: TuningData, counts: np.ndarray, word_starts: Optional[np.ndarray] = None
) -> dict:
    """The tables of a gate: lists of rows, a dictionary each, by name.

    Args:
        chosen (Chosen): with a gate.
        data (TuningData): of the split that is reported on.
        counts (ndarray): shape (V,), from ``training_counts``.
        word_starts (ndarray): shape (W,), rows at which the words begin that perplexity in
            ``gate_skip`` is of; None: it is of tokens, as in all groups of them.

    Returns:
        dict: mean lambda and perplexities of groups of tokens, ``gate_frequency`` by how often the
        target is in the datastore, ``gate_quality`` by d_1 / d_k and, of a gate that looks before
        the search, ``gate_entropy`` by the entropy of p_lm; ``gate_helped_or_hurt``, with the
        constant weights and with the gate's; and ``gate_skip``, see ``Chosen.skip_curve``.
    """
    log_probs = chosen.log_probs(data)
    tokens = _Tokens(
        chosen.weigh(data).knn_lambda.numpy(),
        log_probs["base"].double().numpy(),
        log_probs.get("knn_cache", log_probs["knn"]).double().numpy(),
        log_probs["gate"].double().numpy(),
    )
    distances = data.distances[:, : chosen.gate.k]
    measures = {"gate_quality": quality(distances, "ratio").numpy()}
    if chosen.gate.looks_before:
        measures["gate_entropy"] = data.confidence[:, 1].numpy()
    return {
        "gate_frequency": list(_by_frequency(tokens, counts[data.targets.numpy()])),
        **{name: list(_by_rank(tokens, measure)) for name, measure in measures.items()},
        "gate_helped_or_hurt": [
            {"weights": name, **helped_or_hurt(getattr(tokens, name) - tokens.base)}
            for name in ("constant", "gate")
        ],
        "gate_skip": list(_with_speed(chosen.skip_curve(data, word_starts), data)),
    }


def _by_frequency(tokens: _Tokens, frequencies: np.ndarray) -> Iterator[dict]:
    """Targets that the datastore has 0, 1-9, 10-99, ... times."""
    digits = np.char.str_len(frequencies.astype(str)) * (frequencies > 0)
    for digit in np.unique(digits):
        yield tokens.group(np.flatnonzero(digits == digit), frequencies)


def _by_rank(tokens: _Tokens, measure: np.ndarray) -> Iterator[dict]:
    """Equal groups of tokens, from the lowest to the highest of a measure."""
    for rows in np.array_split(np.argsort(measure, kind="stable"), _GROUPS):
        if len(rows):
            yield tokens.group(rows, measure)


def _with_speed(curve: list[dict], data: TuningData) -> Iterator[dict]:
    """The curve over skipping with tokens a second, if the time of the one retrieval is known.

    The model reads every token, and only what is not skipped is searched.
    """
    for point in curve:
        tokens_per_s = None
        if data.seconds is not None:
            model_s, search_s = data.seconds.tolist()
            spent_s = model_s + (1.0 - point["skipped"]) * search_s
            tokens_per_s = len(data.log_p_lm) / spent_s if spent_s > 0 else None
        yield {**point, "tokens_per_s": tokens_per_s}
