"""What one retrieval says beyond its best setting: the tables of a report.

The curves of Khandelwal et al. (2020), section 5, over k, lambda, temperature and datastore size;
perplexity by frequency of the target; and where neighbours help and where they hurt. Settings are
chosen on the split that is tuned on, figures are of the split that is reported on.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..probability.bootstrap import paired_interval
from ..probability.metrics import perplexity
from ..probability.mixture import mix
from ..tuning.grid import KNNGridPoint, best
from ..tuning.knn_sweep import Prefixes, best_of_each_k, log_p_knn, mixture_perplexities
from ..tuning.tuning_data import TuningData
from .sizes import SizePoint, size_curve

# Steps of the curve over lambda.
_LAMBDAS = 50
# Values that are counted together: they may be more than memory holds.
_BATCH_VALUES = 1 << 24
# Width of a bin of the histogram of log-ratios.
BIN_NATS = 0.1
# Where the first bin ends and where the last one begins; both are open on the other side.
_FIRST_BIN_NATS, _LAST_BIN_NATS = -4.0, 7.0
# So many words that gain most are listed, and as many that lose most.
_EXTREME_TYPES = 15


def training_counts(datastores: Sequence, types: int) -> np.ndarray:
    """How often each token is a value.

    Args:
        datastores (sequence of Datastore): all that were searched.
        types (int): V, the size of the dictionary.

    Returns:
        ndarray: shape (V,), int64.
    """
    counts = np.zeros(types, dtype=np.int64)
    for datastore in datastores:
        for start in range(0, len(datastore.values), _BATCH_VALUES):
            batch = datastore.values[start : start + _BATCH_VALUES]
            counts += np.bincount(batch, minlength=types)
    return counts


def make_tables(
    grid: Sequence[KNNGridPoint],
    data: TuningData,
    retuned: bool,
    sizes: Sequence[SizePoint],
    counts: np.ndarray,
    symbols: Sequence[str],
) -> dict:
    """All tables of a report: lists of rows, a dictionary each, by name.

    Args:
        grid (sequence of KNNGridPoint): all that was tried on the split that is tuned on.
        data (TuningData): of the split that is reported on, with targets and documents.
        retuned (bool): whether that is another split than the one that is tuned on.
        sizes (sequence of SizePoint): from ``tune_sizes``, of the split that is tuned on.
        counts (ndarray): shape (V,), from ``training_counts``.
        symbols (sequence of str): shape (V,), the dictionary.

    Returns:
        dict: ``grid``; the curves ``k``, ``k_at_temperature``, ``temperature``, ``lambda`` and
        ``size``; ``found``, ``frequency``, ``log_ratio``, ``types`` and ``helped_or_hurt``.
    """
    chosen = best(grid)
    (scores,) = log_p_knn(data, [chosen.k], chosen.temperature)
    mixed = mix(data.log_p_lm, scores, knn_lambda=chosen.knn_lambda)
    log_p_lm, mixed = data.log_p_lm.double().numpy(), mixed.double().numpy()
    targets, log_ratios = data.targets.numpy(), mixed - log_p_lm
    at_chosen_temperature = [point for point in grid if point.temperature == chosen.temperature]
    curves = {
        "k": best_of_each_k(grid),
        "k_at_temperature": best_of_each_k(at_chosen_temperature),
        "temperature": _best_of_each_temperature(grid),
    }
    return {
        "grid": [point._asdict() for point in grid],
        **dict(zip(curves, _evaluated(data, list(curves.values()), retuned))),
        "lambda": list(_lambda_curve(data.log_p_lm, scores, chosen.knn_lambda)),
        "size": list(size_curve(data, sizes, chosen.temperature, counts.sum())),
        "found": list(_targets_found(data.matches, sorted({point.k for point in grid}))),
        "frequency": list(_by_frequency(counts[targets], log_p_lm, mixed, data.document_starts)),
        "log_ratio": list(_histogram(log_ratios)),
        "types": list(_extreme_types(targets, log_ratios, counts, symbols)),
        "helped_or_hurt": [_helped_or_hurt(log_ratios)],
    }


# -- curves ----------------------------------------------------------------------------------------


def _best_of_each_temperature(grid: Sequence[KNNGridPoint]) -> list[KNNGridPoint]:
    by_temperature: dict = {}
    for point in sorted(grid, key=lambda point: point.temperature):
        by_temperature.setdefault(point.temperature, []).append(point)
    return [best(points) for points in by_temperature.values()]


def _evaluated(
    data: TuningData, curves: Sequence[Sequence[KNNGridPoint]], retuned: bool
) -> Iterator[list[dict]]:
    """The points of each curve with their perplexity here and on the split that is tuned on."""
    points = sorted({point for curve in curves for point in curve})
    results = {point: point.perplexity for point in points}
    if retuned:
        prefixes = Prefixes(data, sorted({point.k for point in points}))
        for temperature in sorted({point.temperature for point in points}):
            scores = dict(zip(prefixes.ks, prefixes.log_p_knn(temperature)))
            for point in points:
                if point.temperature == temperature:
                    (results[point],) = mixture_perplexities(
                        data.log_p_lm, scores[point.k], [point.knn_lambda]
                    )
    for curve in curves:
        yield [
            {
                **point._asdict(),
                "perplexity": results[point],
                "tuned_perplexity": point.perplexity,
            }
            for point in curve
        ]


def _lambda_curve(log_p_lm: torch.Tensor, scores: torch.Tensor, chosen: float) -> Iterator[dict]:
    lambdas = sorted({chosen, *(step / _LAMBDAS for step in range(_LAMBDAS))})
    for knn_lambda, result in zip(lambdas, mixture_perplexities(log_p_lm, scores, lambdas)):
        yield {"knn_lambda": knn_lambda, "perplexity": result}


def _targets_found(matches: torch.Tensor, ks: Sequence[int]) -> Iterator[dict]:
    """Share of the targets that are among the k nearest."""
    first = torch.where(matches.any(dim=1), matches.byte().argmax(dim=1), matches.size(1))
    for k in ks:
        yield {"k": k, "targets_found": (first < k).double().mean().item()}


# -- tokens ----------------------------------------------------------------------------------------


def _by_frequency(frequencies, log_p_lm, mixed, document_starts) -> Iterator[dict]:
    """Perplexity by how often the target is in the training text: 0, 1-9, 10-99, ..."""
    digits = np.where(frequencies > 0, np.floor(np.log10(np.maximum(frequencies, 1))) + 1, 0)
    for digit in np.unique(digits).astype(int).tolist():
        rows = np.flatnonzero(digits == digit)
        starts = np.searchsorted(rows, document_starts)
        change = paired_interval(log_p_lm[rows], mixed[rows], starts[starts < len(rows)])
        yield {
            "lowest": 10 ** (digit - 1) if digit else 0,
            "highest": 10**digit - 1 if digit else 0,
            "tokens": len(rows),
            "share": len(rows) / len(frequencies),
            "base_perplexity": perplexity(log_p_lm[rows]),
            "knn_perplexity": perplexity(mixed[rows]),
            "relative_change": change.value,
            "low": change.low,
            "high": change.high,
            "nats": float((mixed[rows] - log_p_lm[rows]).sum()),
        }


def _helped_or_hurt(log_ratios: np.ndarray) -> dict:
    helped, hurt = log_ratios > 0, log_ratios < 0
    return {
        "tokens": len(log_ratios),
        "helped": float(helped.mean()),
        "hurt": float(hurt.mean()),
        "nats_gained": float(log_ratios[helped].sum()),
        "nats_lost": float(log_ratios[hurt].sum()),
        "median": float(np.median(log_ratios)),
        "doubled": float((log_ratios >= math.log(2)).mean()),
        "halved": float((log_ratios <= -math.log(2)).mean()),
    }


def _histogram(log_ratios: np.ndarray) -> Iterator[dict]:
    """Tokens by ln(p_mixture / p_lm); the first and the last bin are open."""
    first, last = round(_FIRST_BIN_NATS / BIN_NATS), round(_LAST_BIN_NATS / BIN_NATS)
    # A log-ratio of exactly 0 is neither help nor harm; it is counted in the bin that begins at 0.
    bins = np.floor(np.clip(log_ratios / BIN_NATS, first, last)).astype(int)
    lowest = int(bins.min())
    tokens = np.bincount(bins - lowest)
    nats = np.bincount(bins - lowest, log_ratios)
    for number, (count, total) in enumerate(zip(tokens, nats), start=lowest):
        yield {
            "from": round(number * BIN_NATS, 1) if number > first else None,
            "to": round((number + 1) * BIN_NATS, 1) if number < last else None,
            "tokens": int(count),
            "nats": float(total),
        }


def _extreme_types(targets, log_ratios, counts, symbols) -> Iterator[dict]:
    """The targets that gain most and those that lose most, all their occurrences together."""
    nats = np.bincount(targets, log_ratios, len(counts))
    seen = np.bincount(targets, minlength=len(counts))
    order = np.argsort(nats, kind="stable")
    lost = [token for token in order[:_EXTREME_TYPES] if nats[token] < 0]
    gained = [token for token in order[::-1][:_EXTREME_TYPES] if nats[token] > 0]
    for token in gained + lost:
        yield {
            "token": symbols[token],
            "nats": float(nats[token]),
            "occurrences": int(seen[token]),
            "training_count": int(counts[token]),
            "mean_log_ratio": float(nats[token] / seen[token]),
        }
